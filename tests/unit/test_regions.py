"""Training on regions: each equals a region of its own, and which ones a batch has is a function of seed, epoch and example."""

import itertools

import numpy as np
import pytest
import torch
from helpers.simulations import build_dataset, constant_scenario

from cxt import PairDataset, pair_features
from cxt.config.learning import Noise
from cxt.config.network import SPECIAL_TOKENS, START_TOKEN, log_rates
from cxt.config.regions import RegionPlan, Regions
from cxt.data.features import compute_missing_fraction
from cxt.data.loaders import EpochBatchSampler, PrefetchLoader, RegionDataset, ValidationRegions
from cxt.data.noise import NoiseSchedule, build_noise
from cxt.data.regions import Cut, RegionSchedule, cut_for_validation, draw_numbers, fill_rows
from cxt.data.shards import read_shard
from cxt.errors import BadRequest

WINDOWS, SIZE, SCALES = 20, 1000, (2, 4)


def read_example(directory, example: int) -> dict:
    """Genotypes (sites, samples), positions, pair, ln TMRCA, mask and rates of a training example, from its shard."""
    arrays, attributes = read_shard(next((directory / "train").glob("*.zarr.zip")))
    row, pair = divmod(example, arrays["pairs"].shape[1])
    sites = slice(arrays["site_offsets"][row], arrays["site_offsets"][row + 1])
    samples = attributes["samples"]
    return {
        "genotypes": np.unpackbits(arrays["genotypes"][sites], axis=1, count=samples, bitorder="little"),
        "positions": arrays["positions"][sites],
        "pair": arrays["pairs"][row, pair],
        "log_tmrca": arrays["log_tmrca"][row, pair],
        "mask": np.unpackbits(arrays["mask"][row], count=WINDOWS * SIZE, bitorder="little") if "mask" in arrays else None,
        "rates": log_rates(arrays["mutation_rate"][row], arrays["recombination_rate"][row]),
    }


def expected_region(directory, items: PairDataset, example: int, start: int, windows: int, *, scales=SCALES) -> dict:
    """The parts of a batch for one region, from the sites of that region alone, at positions counted from its start."""
    one = read_example(directory, example)
    begin, end = start * SIZE, (start + windows) * SIZE
    inside = (one["positions"] >= begin) & (one["positions"] < end)
    counts = pair_features(
        one["genotypes"][inside], one["positions"][inside] - begin, [one["pair"]],
        window_size=SIZE, sequence_length=end - begin, scales=scales,
    )  # fmt: skip
    missing = None
    if one["mask"] is not None:
        missing = compute_missing_fraction(one["mask"][begin:end], window_size=SIZE, sequence_length=end - begin, scales=scales)
    return {
        "counts": counts[0],
        "missing": missing,
        "tokens": items.grid.tokens(one["log_tmrca"])[1:][start : start + windows],
        "rates": np.array(one["rates"], dtype=np.float32),
    }


def check_region(batch, row: int, place: slice, expected: dict) -> None:
    """The windows *place* of a row of a batch are those of a region of its own."""
    assert np.array_equal(batch.counts[row, :, :, place], expected["counts"])
    assert np.array_equal(batch.tokens[row, 1:][place], expected["tokens"])
    if expected["missing"] is not None:
        assert np.array_equal(batch.missing[row, :, place], expected["missing"].astype(np.float32))


def schedule_of(*, windows=10, seed=5, grad_accum=2, batches_per_epoch=7, total_steps=12, **regions) -> RegionSchedule:
    plan = RegionPlan(WINDOWS, windows, Regions(**regions))
    return RegionSchedule(
        plan=plan, seed=seed, grad_accum=grad_accum, batches_per_epoch=batches_per_epoch, total_steps=total_steps
    )


@pytest.mark.parametrize("masked", [False, True])
def test_every_region_is_one_of_its_own(request, masked):
    """All places and lengths of two examples of different simulations, and of one with two pairs of the same simulation."""
    directory = request.getfixturevalue("masked_dataset" if masked else "dataset")
    items = PairDataset(directory, "train")
    for start, windows in itertools.chain(
        ((start, 1) for start in range(WINDOWS)), ((start, 20 - start) for start in range(WINDOWS)), [(0, 10), (3, 7), (6, 3)]
    ):
        examples = [0, 1, 100]
        cut = Cut(np.full(3, start), np.full(3, windows))
        batch = items.batch(examples, cut=cut)
        assert batch.counts.shape == (3, 2, 2, windows, 20)
        assert batch.regions is None
        for row, example in enumerate(examples):
            expected = expected_region(directory, items, example, start, windows)
            check_region(batch, row, slice(0, windows), expected)
            assert np.array_equal(batch.rates[row], expected["rates"])
        assert (batch.tokens[:, 0] == START_TOKEN).all()


def test_different_places_in_one_batch(masked_dataset):
    items = PairDataset(masked_dataset, "train")
    examples, starts = [7, 7, 8, 55, 7], [0, 12, 12, 5, 3]
    batch = items.batch(examples, cut=Cut(np.array(starts), np.full(5, 8)))
    for row, (example, start) in enumerate(zip(examples, starts, strict=True)):
        check_region(batch, row, slice(0, 8), expected_region(masked_dataset, items, example, start, 8))


def test_a_whole_example_is_a_region(masked_dataset):
    items = PairDataset(masked_dataset, "train")
    examples = list(range(0, 108, 7))
    plain, cut = items.batch(examples), items.batch(examples, cut=Cut.whole(len(examples), WINDOWS))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, cut, strict=True))
    used = items.batch(
        examples, cut=Cut(np.full(len(examples), 5), np.full(len(examples), 8), carry=True), out=items.empty_batch(20)
    )
    again = items.batch(examples, out=items.empty_batch(20)._replace(tokens=torch.full((20, WINDOWS + 1), 7)))
    assert (used.tokens[:, 0] > START_TOKEN).all()
    assert torch.equal(again.tokens, plain.tokens)
    assert items.batch([]).counts.shape == (0, 2, 2, WINDOWS, 20)


def test_many_sites_in_a_bin(tmp_path):
    """More than 255 sites of one frequency in a window, so that the stored totals do not hold them."""
    entry = constant_scenario(simulations=4, individuals=3, mutation_rate=3e-6, population_size=50_000)
    directory = build_dataset(tmp_path, entry=entry, samples=6, pairs=2)
    items = PairDataset(directory, "train")
    assert not items._total_fits.all()
    for start, windows in ((0, 20), (5, 9), (19, 1)):
        batch = items.batch([1, 4], cut=Cut(np.full(2, start), np.full(2, windows)))
        for row, example in enumerate((1, 4)):
            check_region(batch, row, slice(0, windows), expected_region(directory, items, example, start, windows))


def test_without_sites(tmp_path):
    entry = constant_scenario(simulations=4, individuals=3, mutation_rate=1e-12)
    directory = build_dataset(tmp_path, entry=entry, samples=6, pairs=2)
    batch = PairDataset(directory, "train").batch([0, 3], cut=Cut(np.array([4, 0]), np.full(2, 5)))
    assert not batch.counts.any()


def test_noise_is_that_of_the_whole_example(masked_dataset):
    """A region of an example with noise is the region of the noisy example: its counts in windows that end inside it."""
    items = PairDataset(masked_dataset, "train")
    noise = build_noise(Noise(thinning=0.2, mispolarised=0.1, genotype_errors=0.01, phase_switches=0.2), seed=3, epoch=2)
    examples = [5, 90, 41]
    whole = items.batch(examples, noise=noise)
    batch = items.batch(examples, noise=noise, cut=Cut(np.full(3, 6), np.full(3, 9)))
    for scale, width in enumerate(SCALES):
        inside = 9 - width + 1
        assert torch.equal(batch.counts[:, :, scale, :inside], whole.counts[:, :, scale, 6 : 6 + inside])
    one = whole.counts.long()
    for k in range(9):  # windows that the region's end cuts off: from those of the narrowest scale, which are two wide
        end = min(k + 4, 9)
        pieces = [one[:, :, 0, 6 + at] for at in range(k, end - 1, 2)]
        if (end - k) % 2 == 0:
            assert torch.equal(batch.counts[:, :, 1, k].long(), sum(pieces))
    packed = items.batch([5, 90, 41, 7], noise=noise, cut=Cut(np.full(4, 6), np.array([9, 5, 5, 9]), 2, True))
    assert torch.equal(packed.counts[0, :, :, :9], batch.counts[0])


def test_soft_targets_are_cut(dataset_n10, tmp_path):
    from cxt.data.soft_targets import LEVELS, soft_targets_path, write_soft_targets

    rng = np.random.default_rng(1)
    written = {}
    manifest = PairDataset(dataset_n10, "train").manifest
    for split in ("train", "test"):
        (shard,) = manifest["splits"][split]["shards"]
        simulations = shard["items"] // 6
        written[split] = np.sort(rng.normal(9, 1, (simulations, 6, WINDOWS, len(LEVELS))), axis=-1)
        path = soft_targets_path(tmp_path, shard["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_soft_targets(
            path, written[split], {"shard": shard["sha256"], "teacher": {}, "grid": [3, 17, 324], "lineage": "x"}
        )
    items = PairDataset(dataset_n10, "train", soft_targets=tmp_path)
    batch = items.batch([0, 13], cut=Cut(np.array([2, 11]), np.full(2, 6)))
    expected = np.round(1000 * np.stack([written["train"][0, 0, 2:8], written["train"][2, 1, 11:17]])).astype(np.int16)
    assert np.array_equal(batch.soft_targets, expected)


def test_packed_regions_are_those_of_their_own(masked_dataset):
    items = PairDataset(masked_dataset, "train")
    examples, starts = [3, 50, 4, 77, 100, 3], [0, 13, 4, 5, 2, 9]
    lengths = np.array([5, 7, 8, 12, 4, 4])
    batch = items.batch(examples, cut=Cut(np.array(starts), lengths, 3, True))
    assert batch.counts.shape[:4] == (2, 2, 2, 20)
    assert batch.rates.shape == (2, 20, 2)
    for number, (example, start, windows) in enumerate(zip(examples, starts, lengths.tolist(), strict=True)):
        row, place = divmod(number, 3)
        first = int(lengths[3 * row : number].sum())
        there = slice(first, first + windows)
        expected = expected_region(masked_dataset, items, example, start, windows)
        check_region(batch, row, there, expected)
        assert (batch.regions[row, there] == place).all()
        assert np.array_equal(batch.rates[row, there], np.tile(expected["rates"], (windows, 1)))
    assert (batch.tokens[:, 0] == START_TOKEN).all()
    with pytest.raises(ValueError, match="same number of windows"):
        items.batch([0, 1], cut=Cut(np.zeros(2, int), np.array([3, 4])))


def test_carried_tokens(dataset):
    items = PairDataset(dataset, "train")
    batch = items.batch([0, 1, 30], cut=Cut(np.array([0, 1, 12]), np.full(3, 8), carry=True))
    whole = items.batch([0, 1, 30]).tokens
    assert batch.tokens[:, 0].tolist() == [START_TOKEN, int(whole[1, 1]), int(whole[2, 12])]
    assert (whole[:, 1:] >= SPECIAL_TOKENS).all()


# Which regions


@pytest.mark.parametrize(
    ("whole", "longest", "shortest", "per_row", "width"),
    [
        (500, 500, 100, 2, 500),  # 2 · 500 / 600 is about two
        (500, 100, 20, 8, 500),
        (40, 10, 10, 4, 40),
        (26, 10, 10, 2, 20),  # as wide as two regions can fill
        (40, 40, 15, 2, 40),
        (21, 4, 1, 8, 21),
        (10**6, 3, 1, 500_000, 10**6),
    ],
)  # fmt: skip
def test_rows_are_filled_exactly(whole, longest, shortest, per_row, width):
    plan = RegionPlan(whole, longest, Regions(shortest=shortest, pack=True))
    assert (plan.per_row, plan.row_windows) == (per_row, width)
    if per_row > 100:
        return
    shape = {"per_row": per_row, "shortest": shortest, "longest": longest, "windows": width}
    rows = fill_rows(9, np.arange(500), **shape)
    assert rows.shape == (500, per_row)
    assert (rows.sum(axis=1) == width).all()
    assert rows.min() >= shortest
    assert rows.max() <= longest
    assert np.array_equal(fill_rows(9, [17, 3], **shape), rows[[17, 3]])  # by example, not by place
    if longest > shortest:
        assert len(np.unique(rows, axis=0)) > 10
        means = rows.mean(axis=0)  # no place has longer regions than another
        assert np.abs(means - width / per_row).max() < 6 * rows.std() / np.sqrt(500)


def test_numbers_are_uniform():
    drawn = draw_numbers(3, np.arange(70_000), 7)
    assert np.abs(np.bincount(drawn, minlength=7) - 10_000).max() < 500
    assert np.array_equal(draw_numbers(3, [5, 6], [1, 7]), [0, drawn[6]])
    assert not np.array_equal(drawn, draw_numbers(4, np.arange(70_000), 7))


def test_regions_are_a_function_of_seed_epoch_and_example():
    schedule = schedule_of()
    starts = schedule.cut(3, 0, list(range(100))).starts
    assert np.array_equal(schedule.cut(3, 6, [40, 2]).starts, starts[[40, 2]])
    assert not np.array_equal(schedule.cut(4, 0, list(range(100))).starts, starts)
    assert not np.array_equal(schedule_of(seed=6).cut(3, 0, list(range(100))).starts, starts)
    assert set(starts) == set(range(11))


def test_lengths_of_batches():
    schedule = schedule_of(windows=12, shortest=3)
    drawn = [schedule.count_row_windows(0, batch) for batch in range(500)]
    assert set(drawn) == set(range(3, 13))
    assert drawn != [schedule.count_row_windows(1, batch) for batch in range(500)]
    for batch in (0, 1, 499):
        cut = schedule.cut(0, batch, [4, 5, 6])
        assert cut.row_windows == drawn[batch] == cut.lengths[0]
        assert (cut.starts + cut.lengths <= WINDOWS).all()


def test_the_curriculum_grows():
    """Linearly with the optimizer steps, over half of them; the batches of a step have the same length."""
    schedule = schedule_of(windows=20, first_windows=4, grad_accum=2, batches_per_epoch=5, total_steps=33)
    widths = [schedule.count_row_windows(epoch, batch) for epoch in range(11) for batch in range(5)]
    steps = [3 * epoch + batch // 2 for epoch in range(11) for batch in range(5)]
    assert widths == [round(4 + 16 * min(1, step / 16)) for step in steps]
    assert (widths[0], widths[-1]) == (4, 20)
    assert schedule_of(windows=20, first_windows=4, total_steps=1).count_row_windows(0, 0) == 4


def test_regions_in_order_and_what_they_carry(dataset):
    """An example is read from its start; the first token of a region is the last target of the one before."""
    schedule = schedule_of(windows=6, in_order=True, carry=True)
    items = PairDataset(dataset, "train")
    arguments = {"examples": 108, "batch_size": 4, "seed": 5}
    sampler, plain = EpochBatchSampler(**arguments, regions=schedule), EpochBatchSampler(**arguments)
    assert len(sampler) == 3 * len(plain) == 81
    batches = [RegionDataset(items, schedule.plan, noisy=False).batch(wanted) for wanted in sampler]
    for number, examples in enumerate(plain):
        whole = items.batch(examples)
        chunks = batches[3 * number : 3 * number + 3]
        assert torch.equal(torch.cat([chunk.tokens[:, 1:] for chunk in chunks], dim=1), whole.tokens[:, 1:19])
        assert (chunks[0].tokens[:, 0] == START_TOKEN).all()
        for before, after in itertools.pairwise(chunks):
            assert torch.equal(after.tokens[:, 0], before.tokens[:, -1])
        assert sampler.batch(0, 3 * number + 1) == examples


@pytest.mark.parametrize("settings", [{"shortest": 3}, {"first_windows": 2}, {"shortest": 3, "pack": True}, {"in_order": True}])
def test_batches_are_counted(settings):
    plan = RegionPlan(WINDOWS, 10, Regions(**settings))
    for examples, world in ((108, 1), (108, 2), (50, 3)):
        samplers = [
            EpochBatchSampler(examples=examples, batch_size=4, seed=1, rank=rank, world=world, regions=schedule_of(**settings))
            for rank in range(world)
        ]
        counted = plan.count_batches(examples=examples, batch_size=4, world=world)
        assert {len(sampler) for sampler in samplers} == {len(list(samplers[0]))} == {counted}
        seen = [example for sampler in samplers for examples, _, _ in sampler for example in examples]
        assert len(set(seen)) == len(seen) // plan.chunks  # none twice, but for the chunks of each
    with pytest.raises(BadRequest, match="fewer than one batch of 4"):
        plan.count_batches(examples=3, batch_size=4, world=1)


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [{"shortest": 3}, {"first_windows": 2}, {"shortest": 3, "pack": True}, {"in_order": True, "carry": True}, {"carry": True}],
)
def test_batches_made_in_advance(masked_dataset, settings, threads):
    """In buffers of the widest rows, which narrower ones use in part; the last two batches stay as they are."""
    items = PairDataset(masked_dataset, "train")
    schedule = schedule_of(**settings)
    noise = NoiseSchedule(noise=Noise(thinning=0.1), seed=1, grad_accum=2, steps_per_epoch=4, total_steps=12)

    def sampler():
        return EpochBatchSampler(examples=108, batch_size=5, seed=1, noise=noise, regions=schedule)

    read = RegionDataset(items, schedule.plan, noisy=True)
    loader = PrefetchLoader(read, sampler(), batch_size=5, threads=threads, pin=False)
    given = []
    for batch, wanted in zip(loader, sampler(), strict=True):
        given.append((batch, read.batch(wanted)))
        for kept, expected in given[-2:]:
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
        assert all(part is None or part.is_contiguous() for part in batch)


def test_a_sampler_continues(dataset):
    schedule = schedule_of(shortest=3)
    whole = list(EpochBatchSampler(examples=108, batch_size=5, seed=1, regions=schedule))
    sampler = EpochBatchSampler(examples=108, batch_size=5, seed=1, regions=schedule)
    sampler.skip = 6
    for (examples, _, cut), (others, _, other) in zip(sampler, whole[6:], strict=True):
        assert examples == others
        assert np.array_equal(cut.starts, other.starts)
        assert np.array_equal(cut.lengths, other.lengths)


def test_validation_has_fixed_regions(masked_dataset):
    items, plan = PairDataset(masked_dataset, "test"), RegionPlan(WINDOWS, 6, Regions(shortest=2, pack=True))
    test = ValidationRegions(items, plan)
    batch = test.batch([0, 5, 11], out=test.empty_batch(4))
    again = test.batch([11])
    assert batch.counts.shape == (3, 2, 2, 6, 20)
    assert torch.equal(batch.counts[2:], again.counts)
    assert batch.regions is None
    starts = cut_for_validation(range(12), plan).starts
    assert len(set(starts)) > 4
    assert (len(test), test.describe(3)) == (12, items.describe(3))


@pytest.mark.parametrize(
    ("settings", "factors"),
    [({}, [1, 1, 1, 1, 4 / 3, 4 / 3, 4 / 3]), ({"first_windows": 2}, [1, 1, 1, 1, 4 / 3, 4 / 3, 4 / 3])],
)  # fmt: skip
def test_weights_of_batches(settings, factors):
    schedule = schedule_of(grad_accum=4, **settings)
    assert [schedule.weigh(1, batch) for batch in range(7)] == pytest.approx(factors)


def test_every_window_counts_the_same():
    schedule = schedule_of(grad_accum=4, shortest=2)
    for step in range(2):
        batches = range(4 * step, min(4 * step + 4, 7))
        widths = [schedule.count_row_windows(2, batch) for batch in batches]
        assert len(set(widths)) > 1
        per_window = [schedule.weigh(2, batch) / 4 / width for batch, width in zip(batches, widths, strict=True)]
        assert per_window == pytest.approx([1 / sum(widths)] * len(widths))
