"""Noise of training examples, against the same errors made one by one in plain arrays of genotypes."""

import math
import pickle
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.simulations import build_dataset, constant_scenario, simulate
from helpers.training import FINE, SMALL, equal, train, weights

from cxt import PairDataset, pair_features
from cxt.config.learning import NOISE_RATES, Noise
from cxt.config.training import TrainingConfig
from cxt.config.variants import list_variants
from cxt.data.features import pack_haplotypes, select_usable_sites
from cxt.data.kernels import pack_haplotype_words
from cxt.data.loaders import DataModule, SequentialBatchSampler
from cxt.data.noise import NoiseSchedule, add_noise, build_noise
from cxt.data.shards import read_shard
from cxt.data.simulated import SimulatedDataset, build_simulated_manifest
from cxt.errors import BadRequest
from cxt.random_seeds import hash_key
from cxt.scenarios.registry import simulate_tree_sequence
from cxt.trainer.fit import build_data
from cxt.trainer.options import read_options
from cxt.trainer.request import build_request

EVERY = {
    "thinning": 0.2, "mispolarised": 0.1, "genotype_errors": 0.02, "missing_genotypes": 0.1, "phase_switches": 0.1,
}  # fmt: skip
KINDS = [*({name: rate} for name, rate in EVERY.items()), EVERY, dict.fromkeys(EVERY, 0.6)]


def draw_events(rng, probability: float, places: int) -> Iterator[int]:
    """Places of independent events, from the numbers of places between them, which have a geometric distribution."""
    place = -1
    while probability:
        place += 1 + int(math.log1p(-rng.random()) / math.log1p(-probability))
        if place >= places:
            return
        yield place


def plainly_noisy(genotypes: np.ndarray, rates: dict, rng) -> tuple[np.ndarray, np.ndarray]:
    """Genotypes (sites, samples) after noise, and which sites are left; sites that no longer segregate are still there."""
    genotypes = genotypes.copy()
    sites, samples = genotypes.shape
    kept = np.ones(sites, bool)
    for site in draw_events(rng, rates.get("thinning", 0), sites):
        kept[site] = False
    for site in draw_events(rng, rates.get("mispolarised", 0), sites):
        genotypes[site] = 1 - genotypes[site]
    for place in draw_events(rng, rates.get("genotype_errors", 0), sites * samples):
        haplotype, site = divmod(place, sites)
        genotypes[site, haplotype] = 1 - genotypes[site, haplotype]
    for place in draw_events(rng, rates.get("missing_genotypes", 0), sites * samples):
        haplotype, site = divmod(place, sites)
        genotypes[site, haplotype] = 0
    for a in range(0, samples - 1, 2) if rates.get("phase_switches") else []:
        differ = [site for site in range(sites) if kept[site] and genotypes[site, a] != genotypes[site, a + 1]]
        for switch in draw_events(rng, rates["phase_switches"], len(differ)):
            genotypes[differ[switch] :, [a, a + 1]] = genotypes[differ[switch] :, [a + 1, a]]
    return genotypes, kept


def counts_after(genotypes, positions, pair, rates: dict, *, seed, epoch, example, scales=(2, 4), length=20_000):
    rng = np.random.default_rng([hash_key(seed, "noise", epoch), example])
    noisy, kept = plainly_noisy(genotypes, rates, rng)
    arguments = {"window_size": 1000, "sequence_length": length, "scales": scales}
    return pair_features(noisy[kept], positions[kept], [pair], **arguments)[0]


def example_genotypes(directory, example: int, samples: int):
    """Genotypes (sites, samples), positions, and the pair of a training example, from its shard."""
    arrays, _ = read_shard(next((directory / "train").glob("*.zarr.zip")))
    row, pair = divmod(example, arrays["pairs"].shape[1])
    sites = slice(arrays["site_offsets"][row], arrays["site_offsets"][row + 1])
    genotypes = np.unpackbits(arrays["genotypes"][sites], axis=1, count=samples, bitorder="little")
    return genotypes, arrays["positions"][sites], arrays["pairs"][row, pair]


def noisy_genotypes(genotypes, *, seed, **rates):
    """The same by the compiled functions: genotypes (sites, samples), 0 at dropped sites, and derived counts."""
    sites, samples = genotypes.shape
    words, derived = np.empty((samples, -(-sites // 64)), np.uint64), np.empty(sites, np.int32)
    pack_haplotype_words(pack_haplotypes(genotypes), words)
    add_noise(words, build_noise(Noise(**rates), seed=seed).rates, np.random.default_rng(seed), derived)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=64 * words.shape[1], bitorder="little")
    assert not bits[:, sites:].any()
    return bits[:, :sites].T, derived


@pytest.mark.parametrize("rates", KINDS, ids=lambda rates: "-".join(rates) if len(rates) == 1 else str(rates["thinning"]))
@pytest.mark.parametrize("masked", [False, True])
def test_counts_are_those_of_noisy_genotypes(request, masked, rates):
    directory = request.getfixturevalue("masked_dataset" if masked else "dataset")
    items = PairDataset(directory, "train")
    examples = [5, 90, 41, 0]
    clean = items.batch(examples)
    batch = items.batch(examples, noise=build_noise(Noise(**rates), seed=3, epoch=2))
    for i, example in enumerate(examples):
        expected = counts_after(*example_genotypes(directory, example, 20), rates, seed=3, epoch=2, example=example)
        assert np.array_equal(batch.counts[i], expected)
    assert not torch.equal(batch.counts, clean.counts)
    assert torch.equal(batch.tokens, clean.tokens)
    assert torch.equal(batch.rates, clean.rates)
    assert batch.missing is None or torch.equal(batch.missing, clean.missing)


@pytest.mark.parametrize(("sites", "samples"), [(0, 4), (1, 2), (64, 3), (65, 20), (200, 67), (1000, 301)])
def test_any_number_of_sites_and_samples(sites, samples):
    """An odd last haplotype has no partner to be exchanged with."""
    genotypes = (np.random.default_rng(1).random((sites, samples)) < 0.3).astype(np.uint8)
    for seed, rates in enumerate([*KINDS, {"missing_genotypes": 0.9, "genotype_errors": 0.001}]):
        expected, kept = plainly_noisy(genotypes, rates, np.random.default_rng(seed))
        count = expected.sum(axis=1)
        kept &= (count > 0) & (count < samples)
        noisy, derived = noisy_genotypes(genotypes, seed=seed, **rates)
        assert np.array_equal(derived, np.where(kept, count, 0))
        assert np.array_equal(noisy, expected * kept[:, None])


def test_rates():
    """How often each error occurs, within five standard deviations, and that it is the error it should be."""
    ts = simulate(seed=1, length=400_000, individuals=20, rate=1e-7)
    genotypes, _ = select_usable_sites(ts.genotype_matrix(), ts.sites_position, sequence_length=400_000)
    common = genotypes[(genotypes.sum(axis=1) > 4) & (genotypes.sum(axis=1) < 36)]  # which noise does not make monomorphic
    sites, samples = common.shape
    assert sites > 2000

    def check(events: int, chances: int, probability: float):
        assert abs(events - chances * probability) < 5 * math.sqrt(chances * probability * (1 - probability))
        assert events > 0

    for p in (0.001, 0.03, 0.4):
        _, derived = noisy_genotypes(common, seed=1, thinning=p)
        assert set(derived[derived > 0] - common.sum(axis=1)[derived > 0]) == {0}
        check((derived == 0).sum(), sites, p)
        noisy, derived = noisy_genotypes(common, seed=2, mispolarised=p)
        changed = (noisy != common).any(axis=1)
        assert (noisy[changed] == 1 - common[changed]).all()
        check(changed.sum(), sites, p)
        noisy, derived = noisy_genotypes(common, seed=3, genotype_errors=p)
        check((noisy != common)[derived > 0].sum(), (derived > 0).sum() * samples, p)
        noisy, derived = noisy_genotypes(common, seed=4, missing_genotypes=p / 4)
        assert not (noisy > common).any()
        check((noisy < common)[derived > 0].sum(), common[derived > 0].sum(), p / 4)
        noisy, derived = noisy_genotypes(common, seed=5, phase_switches=p)
        switches = chances = 0
        for a in range(0, samples, 2):
            differ = common[:, a] != common[:, a + 1]
            exchanged = noisy[differ, a] != common[differ, a]
            switches += int((np.diff(exchanged.astype(int), prepend=0) != 0).sum())
            chances += differ.sum()
        assert np.array_equal(noisy[:, ::2] + noisy[:, 1::2], common[:, ::2] + common[:, 1::2])
        check(switches, chances, p)


def test_rates_of_zero_change_nothing(masked_dataset):
    items = PairDataset(masked_dataset, "train")
    noise = build_noise(Noise(**EVERY, initial_factor=0.0), seed=1, progress=0.0)
    assert noise.rates == (0,) * 5
    for clean, noisy in zip(items.batch(range(20))[:4], items.batch(range(20), noise=noise)[:4], strict=True):
        assert torch.equal(clean, noisy)


def test_noise_of_an_example(dataset):
    """It is the same in any batch, at any place, by any index, and another in another epoch, run or example."""
    items = PairDataset(dataset, "train")

    def counts(examples, **arguments):
        return items.batch(examples, noise=build_noise(Noise(**EVERY), **({"seed": 1, "epoch": 0} | arguments))).counts

    one = counts([41])[0]
    assert torch.equal(one, counts([3, 41, 90])[1])
    assert torch.equal(one, counts([90, 3, 1, 41])[3])
    assert torch.equal(one, counts([41 - len(items)])[0])
    assert torch.equal(one, items.batch([41], noise=build_noise(Noise(**EVERY), seed=1), out=items.empty_batch(3)).counts[0])
    assert not torch.equal(one, counts([41], epoch=1)[0])
    assert not torch.equal(one, counts([41], seed=2)[0])
    rates = build_noise(Noise(thinning=0.3), seed=1)
    first, second = (rates.generator(example).random(5) for example in (0, 1))
    assert not (first == second).any()
    assert pickle.loads(pickle.dumps(rates)) == rates  # as loader processes get it


def test_more_sites_than_16_bits(tmp_path):
    """No bin of the simulation needs 32 bits, but those after noise may."""
    entry = constant_scenario(individuals=10, mutation_rate=4e-5, sequence_length=10_000, simulations=2, batch=10)
    directory = build_dataset(tmp_path, entry=entry, pairs=1, sequence_length=10_000, scales=[10])
    items = PairDataset(directory, "train")
    assert items.batch([0]).counts.dtype == torch.int16
    genotypes, positions, pair = example_genotypes(directory, 0, 20)
    assert len(positions) > 32767
    rates = {"missing_genotypes": 0.9}
    batch = items.batch([0], noise=build_noise(Noise(**rates), seed=1))
    arguments = {"seed": 1, "epoch": 0, "example": 0, "scales": [10], "length": 10_000}
    assert np.array_equal(batch.counts[0], counts_after(genotypes, positions, pair, rates, **arguments))
    with pytest.raises(ValueError, match="cannot hold the counts of examples with noise"):
        items.batch([0], noise=build_noise(Noise(**rates), seed=1), out=items.empty_batch(1))
    assert items.empty_batch(1, noisy=True).counts.dtype == torch.int32


def test_schedule():
    """Each step of a run has its own rates, by its number among all steps; batches that are accumulated share them."""
    noise = Noise(thinning=0.4, phase_switches=0.1, initial_factor=0.5, final_factor=0.0)
    schedule = NoiseSchedule(noise=noise, seed=7, grad_accum=2, steps_per_epoch=3, total_steps=9)
    for epoch, batch, step in ((0, 0, 0), (0, 1, 0), (0, 2, 1), (0, 4, 2), (1, 0, 3), (1, 2, 4), (2, 4, 8)):
        rates = dict(zip(NOISE_RATES, schedule.at(epoch, batch).rates, strict=True))
        assert rates["thinning"] == pytest.approx(0.4 * 0.5 * (1 - step / 8))
        assert rates["phase_switches"] == pytest.approx(0.1 * 0.5 * (1 - step / 8))
        assert rates["mispolarised"] == 0
    assert schedule.at(3, 5).rates == schedule.at(2, 4).rates  # prepared in advance, after the last step
    assert schedule.at(0, 0).key == schedule.at(0, 5).key != schedule.at(1, 0).key
    cosine = Noise(thinning=0.4, initial_factor=0, factor_schedule="cosine")
    values = [build_noise(cosine, seed=1, progress=progress).rates[0] for progress in (0, 0.25, 0.5, 1)]
    assert values == pytest.approx([0, 0.4 * 0.5 * (1 - math.cos(math.pi / 4)), 0.2, 0.4])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_training_batches_have_noise_and_validation_has_none(dataset, workers, rank):
    """Of two ranks, from the start and from where a run was resumed."""
    flags = [*SMALL, "--dataset-path", dataset, "--workers", workers, "--noise", "{thinning: 0.3, initial_factor: 0.0}"]
    request = build_request(read_options([str(flag) for flag in flags]))
    noise, examples = request.training.noise, PairDataset(dataset, "train")
    assert (request.steps_per_epoch, request.total_steps) == (7, 14)

    def data(start=(0, 0)) -> DataModule:
        module = build_data(request)
        module.start = start
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2, strategy=strategy)
        return module

    whole = data()
    for epoch in (0, 1):
        loader = whole.train_dataloader()
        loader.sampler.set_epoch(epoch)
        resumed = data(start=(epoch, 3)).train_dataloader()
        assert len(loader) == 6
        batches = [batch.counts.clone() for batch in loader]
        for number, counts in enumerate(batches):
            chosen, progress = loader.sampler.batch(epoch, number), (7 * epoch + number // 2) / 13
            expected = examples.batch(chosen, noise=build_noise(noise, seed=1, epoch=epoch, progress=progress))
            assert torch.equal(counts, expected.counts)
        assert all(torch.equal(a.counts, b) for a, b in zip(resumed, batches[3:], strict=True))
    validation = [batch.counts.clone() for batch in whole.val_dataloader()]
    expected = PairDataset(dataset, "test").batch(range(rank, 12, 2)).counts
    assert torch.equal(torch.cat(validation), expected)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 1])
def test_simulated_examples(processes):
    variants = [variant.spec for variant in list_variants("constant", constant_scenario())]
    manifest = build_simulated_manifest(variants, window_size=1000, samples=None, scales=(2, 64), held_out=3, examples=8)
    items = SimulatedDataset(variants, manifest, "train", seed=1)
    noise = NoiseSchedule(noise=Noise(**EVERY), seed=1, grad_accum=1, steps_per_epoch=4, total_steps=4)
    settings = {"batch_size": 2, "seed": 1, "workers": processes, "validation_items": 0, "noise": noise}
    data = DataModule(items, items, **settings, order=SequentialBatchSampler, in_processes=True)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    counts = torch.cat([batch.counts for batch in data.train_dataloader()])
    for example in range(8):
        about = items.describe(example)
        ts = simulate_tree_sequence(variants[0], index=about.index, seed=1)
        genotypes, positions = select_usable_sites(ts.genotype_matrix(), ts.sites_position, sequence_length=20_000)
        arguments = {"seed": 1, "epoch": 0, "example": example, "scales": (2, 64)}
        assert np.array_equal(counts[example], counts_after(genotypes, positions, about.pair, EVERY, **arguments))


def test_noise_changes_what_is_learned(dataset, tmp_path, monkeypatch):
    """Rates of 0 train as no noise does, other noise does not, with any number of workers the same."""
    arguments = [*SMALL, *FINE, "--dataset-path", dataset, "--epochs", 1, "--max-steps", 3, "--decode-items", 0]
    trained = {}
    for name, settings in {
        "clean": [],
        "zero": ["--noise", "{thinning: 0, final_factor: 0.5}"],
        "noisy": ["--noise", "{thinning: 0.3, genotype_errors: 0.01}"],
        "threads": ["--noise", "{thinning: 0.3, genotype_errors: 0.01}", "--workers", 2],
    }.items():
        train(monkeypatch, *arguments, *settings, "--run-dir", tmp_path / name, "--out", tmp_path / f"{name}.ckpt")
        trained[name] = weights(tmp_path / f"{name}.ckpt")
    assert equal(trained["clean"], trained["zero"])
    assert not equal(trained["clean"], trained["noisy"])
    assert equal(trained["noisy"], trained["threads"])


def test_note_and_identity(dataset, capsys):
    plain, without, zero, noisy = (
        build_request(read_options([*SMALL, "--dataset-path", str(dataset), *more]))
        for more in ([], ["--noise", "{}"], ["--noise", "{thinning: 0.1, initial_factor: 0, final_factor: 0}"],
                     ["--noise", "{thinning: 0.1, factor_schedule: cosine}"])
    )  # fmt: skip
    assert plain.identity == without.identity
    assert "noise" not in plain.identity["settings"]
    assert noisy.identity["settings"]["noise"]["thinning"] == 0.1
    assert build_data(plain).noise is build_data(zero).noise is None
    assert capsys.readouterr().err.count("noise has no effect, because all of its rates, or both of its factors, are 0") == 1


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"thining": 0.1}, "noise.thining: unknown key; did you mean 'thinning'"),
        ({"thinning": 1.0}, "thinning must be"),
        ({"genotype_errors": -0.1}, "genotype_errors must be"),
        ({"missing_genotypes": math.nan}, "missing_genotypes must be"),
        ({"phase_switches": "often"}, "phase_switches must be"),
        ({"initial_factor": 1.5}, "initial_factor must be"),
        ({"factor_schedule": "cosin"}, "factor_schedule must be one of linear, cosine, got 'cosin'"),
        ("{thinning: 0.1", "YAML"),
        (0.1, "noise must be"),
    ],
)
def test_bad_settings(noise, message):
    with pytest.raises(BadRequest) as error:
        TrainingConfig(noise=noise)
    assert message in str(error.value)
