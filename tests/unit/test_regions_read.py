"""Reading regions of other lengths, continuing from piece to piece, and summaries of whole regions."""

import warnings

import numpy as np
import pytest
import torch
from helpers.simulations import simulate
from helpers.training import objective_record

import cxt
from cxt.checkpoints.file import write_checkpoint
from cxt.checkpoints.inspection import describe_checkpoint
from cxt.checkpoints.record import build_checkpoint_record
from cxt.config.network import ModelConfig
from cxt.model.adapter import build_model
from cxt.model.decoder import Decoder
from cxt.random_seeds import hash_key

WINDOW, WINDOWS, SCALES = 2000, 20, (2, 4)
LENGTH = WINDOW * WINDOWS
PAIRS = [(0, 1), (7, 2)]


def saved(path, *, objective="autoregressive", regions=None, dataset_windows=None):
    """A checkpoint with random weights that was trained with settings *regions*, of examples of *dataset_windows* windows."""
    config = ModelConfig(layers=1, heads=2, width=16, windows=WINDOWS, samples=10, scales=2, bins=20)
    torch.manual_seed(3)
    model = build_model(config, None)
    for parameter in model.parameters():  # such that predictions depend on the input
        torch.nn.init.normal_(parameter, std=0.3)
    record = objective_record(objective)
    if regions is not None:
        record["training"]["regions"] = regions
    dataset = {"scales": list(SCALES), "missing": False, "ranges": None}
    if dataset_windows is not None:
        dataset["sequence_length"] = dataset_windows * WINDOW
    write_checkpoint(path, model.state_dict(), build_checkpoint_record(config, None, name="x", dataset=dataset, **record))
    return path


@pytest.fixture(scope="module")
def ts():
    return simulate(seed=1, rate=2e-7)  # 100 kb, 10 haplotypes


def input_of(ts, *, first, windows):
    """Log1p of the counts of the windows from *first* on, as a region of its own."""
    part = ts.keep_intervals([[first * WINDOW, (first + windows) * WINDOW]], simplify=False)
    positions = part.sites_position - first * WINDOW
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # genotypes of the cut tree sequence
        counts = cxt.pair_features(
            part.genotype_matrix(), positions, PAIRS, window_size=WINDOW, sequence_length=windows * WINDOW, scales=SCALES
        )
    return torch.log1p(torch.from_numpy(counts))


def test_a_shorter_region(tmp_path, ts):
    model = cxt.load_model(saved(tmp_path / "x.ckpt", objective="marginal", regions={"shortest": 5}))
    assert (model.shortest_region, model.trained_on.windows) == (5, (5, 20))
    posterior = cxt.predict_ts(model, ts, PAIRS, sequence_length=7 * WINDOW)
    with torch.no_grad():
        expected = model.marginal_logits(input_of(ts, first=0, windows=7))[..., 2:].softmax(-1)
    np.testing.assert_allclose(posterior.distribution, expected, atol=1e-6)
    with pytest.raises(cxt.BadRequest, match=r"at least 5 windows of 2000 bp, 10000 bp in all, but 8000 bp are 4 windows"):
        cxt.predict_ts(model, ts, PAIRS, sequence_length=4 * WINDOW)
    other = cxt.load_model(saved(tmp_path / "y.ckpt"))
    assert other.shortest_region == 20
    with pytest.raises(cxt.BadRequest, match="this model reads 20 windows"):
        cxt.predict_ts(other, ts, PAIRS, sequence_length=19 * WINDOW)
    with pytest.raises(cxt.BadRequest, match="X has 19 windows"):
        other.generate(input_of(ts, first=0, windows=19), window_size=WINDOW)


def test_packed_rows_have_room_for_shorter_regions(tmp_path, ts):
    """Of the 20 windows that the network reads, another region of each row took 3 or more."""
    regions = {"shortest": 3, "pack": True}
    path = saved(tmp_path / "x.ckpt", objective="marginal", regions=regions, dataset_windows=20)
    model = cxt.load_model(path)
    assert model.trained_on.windows == (3, 17)
    with pytest.warns(cxt.OutsideTraining, match="regions of 20 windows, trained on 3 to 17"):
        cxt.predict_ts(model, ts, PAIRS)
    assert "effective batch 8, " in (text := describe_checkpoint(path))  # rows of 2, batch_size 4
    assert "regions of 3 to 17 windows" in text
    assert cxt.load_model(path, windows=17).trained_on.windows == (3, 17)
    roomy = cxt.load_model(saved(tmp_path / "y.ckpt", regions=regions, dataset_windows=60))
    assert roomy.trained_on.windows == (3, 20)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([1], "its training.regions must be a table, got "),
        ({"shortest": "2"}, "its training.regions.shortest must be a whole number, got '2'"),
        ({"shortest": -2}, "its training.regions.shortest must not be negative, got -2"),
        ({"carry": 1}, "its training.regions.carry must be true or false, got 1"),
    ],
)
def test_damaged_settings(tmp_path, regions, message):
    with pytest.raises(cxt.BadRequest, match=message):
        cxt.load_model(saved(tmp_path / "x.ckpt", regions=regions))


def test_another_number_of_windows(tmp_path, ts):
    path = saved(tmp_path / "x.ckpt", objective="marginal")
    model = cxt.load_model(path, windows=40)
    assert (model.config.windows, model.trained_on.windows) == (40, (20, 20))
    with pytest.warns(cxt.OutsideTraining, match="regions of 40 windows, trained on 20"):
        posterior = cxt.predict_ts(model, ts, PAIRS, sequence_length=40 * WINDOW)
    with torch.no_grad():
        expected = model.marginal_logits(input_of(ts, first=0, windows=40))[..., 2:].softmax(-1)
    np.testing.assert_allclose(posterior.distribution, expected, atol=1e-6)
    shorter = cxt.load_model(path, windows=10)
    with pytest.warns(cxt.OutsideTraining, match="regions of 10 windows, trained on 20"):
        assert cxt.predict_ts(shorter, ts, PAIRS, sequence_length=10 * WINDOW).distribution.shape == (2, 10, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cxt.predict_ts(cxt.load_model(path, windows=20), ts, PAIRS, sequence_length=2 * LENGTH)
    for wrong in (0, -1, True, 2.5, "40", 10**8):
        with pytest.raises(cxt.BadRequest, match="windows must be a whole number from 1"):
            cxt.load_model(path, windows=wrong)


def test_sequences_that_continue_from_piece_to_piece(tmp_path, ts):
    length, replicates = 50, 3  # windows; pieces begin at 0, 20 and 30, and the last repeats 10 windows
    model = cxt.load_model(saved(tmp_path / "x.ckpt", regions={"carry": True}))
    assert model.carries_bin
    ours = cxt.predict_ts(model, ts, PAIRS, sequence_length=length * WINDOW, replicates=replicates, seed=4)
    decoder = Decoder(model, replicates=replicates, seed=4)
    bins = np.zeros((2, replicates, length), dtype=int)
    expected = np.zeros(ours.distribution.shape)
    for first, known in ((0, 0), (20, 20), (30, 40)):
        x = input_of(ts, first=first, windows=20)
        ids = [hash_key("predict", first, *sorted(pair)) - 2**63 for pair in PAIRS]
        start = torch.ones((2, replicates), dtype=torch.int64) if not first else torch.from_numpy(bins[:, :, first - 1] + 2)
        tokens, probabilities = decoder.decode(x, example_ids=ids, start=start)
        bins[:, :, known : first + 20] = tokens[:, :, known - first :] - 2
        expected[:, known : first + 20] = probabilities.double().mean(1)[:, known - first :]
    np.testing.assert_allclose(ours.distribution, expected, atol=1e-6)
    plain = cxt.load_model(saved(tmp_path / "y.ckpt"))
    other = cxt.predict_ts(plain, ts, PAIRS, sequence_length=length * WINDOW, replicates=replicates, seed=4)
    np.testing.assert_array_equal(other.distribution[:, :20], ours.distribution[:, :20])
    assert np.abs(other.distribution[:, 20] - ours.distribution[:, 20]).max() > 1e-3


@pytest.mark.parametrize("objective", ["autoregressive", "marginal"])
def test_the_summary_of_a_region(objective, tmp_path, ts):
    model = cxt.load_model(saved(tmp_path / "x.ckpt", objective=objective))
    length = 25 * WINDOW - 500  # the last window is shorter, and the pieces overlap
    settings = {"sequence_length": length, "replicates": 4, "start": 1000.0}
    posterior = cxt.predict_ts(model, ts, PAIRS, **settings)
    summary = cxt.predict_ts(model, ts, PAIRS, **settings, summarise="region")
    assert isinstance(summary, cxt.RegionSummary)
    assert (summary.start, summary.end) == (1000.0, 1000.0 + length)
    np.testing.assert_array_equal(summary.pairs, PAIRS)
    spans = [2000] * 24 + [1500]
    centres = posterior.grid.centres
    for pair in range(2):
        by_window = [posterior.distribution[pair, w].astype(float) for w in range(25)]
        mixture = sum(span * one / one.sum() for span, one in zip(spans, by_window, strict=True)) / sum(spans)
        np.testing.assert_allclose(summary.distribution[pair], mixture, atol=1e-6)
        mean = sum(span * value for span, value in zip(spans, posterior.log_tmrca[pair], strict=True)) / sum(spans)
        assert abs(summary.log_tmrca[pair] - mean) < 1e-5
        generations = sum(p * np.exp(centre) for p, centre in zip(mixture, centres, strict=True))
        assert abs(summary.tmrca[pair] / generations - 1) < 1e-5
        cumulative = np.cumsum(mixture)
        median = summary.quantile_along(0.5)[pair]
        assert abs(np.searchsorted(cumulative, 0.5) - int((median - posterior.grid.low) / posterior.grid.step)) <= 1
    several = summary.quantile_along([0.1, 0.5])
    assert several.shape == (2, 2)
    np.testing.assert_array_equal(several[1], summary.quantile_along(0.5))
    with pytest.raises(cxt.BadRequest, match=r"q must be from 0 to 1, got \[0.5, 2\]"):
        summary.quantile_along([0.5, 2])
    if objective == "marginal":
        assert summary.samples is None
        with pytest.raises(cxt.BadRequest, match="read in one pass, which does not give the uncertainty"):
            _ = summary.log_tmrca_sd
        return
    assert summary.samples.shape == (2, 4)
    np.testing.assert_allclose(summary.log_tmrca_sd, [np.std(list(row), ddof=1) for row in summary.samples])
    assert (summary.log_tmrca_sd > 0).all()
    one = cxt.predict_ts(model, ts, PAIRS, sequence_length=length, replicates=1, summarise="region")
    with pytest.raises(cxt.BadRequest, match="at least 2 replicates"):
        _ = one.log_tmrca_sd


def test_the_samples_of_a_summary_are_means_of_the_sampled_sequences(tmp_path, ts):
    model = cxt.load_model(saved(tmp_path / "x.ckpt"))
    summary = cxt.predict_ts(model, ts, PAIRS, sequence_length=LENGTH, replicates=3, summarise="region")
    ids = [hash_key("predict", 0, *sorted(pair)) - 2**63 for pair in PAIRS]
    tokens, _ = model.generate(input_of(ts, first=0, windows=WINDOWS), window_size=WINDOW, replicates=3, example_ids=ids)
    centres = cxt.Grid(3.0, 17.0, 20).centres
    for pair in range(2):
        for replicate in range(3):
            values = [centres[token - 2] for token in tokens[pair, replicate]]
            assert abs(summary.samples[pair, replicate] - sum(values) / WINDOWS) < 1e-9


def test_a_summary_that_does_not_exist(tmp_path, ts):
    model = cxt.load_model(saved(tmp_path / "x.ckpt"))
    with pytest.raises(cxt.BadRequest, match="summarise must be windows or region, got 'regions'"):
        cxt.predict_ts(model, ts, PAIRS, sequence_length=LENGTH, summarise="regions")


def test_translating_a_contig_that_is_shorter_than_the_network_reads(tmp_path, ts):
    windows = 7
    short = ts.keep_intervals([[0, windows * WINDOW]]).trim()
    short.dump(tmp_path / "short.trees")
    path = saved(tmp_path / "x.ckpt", objective="marginal", regions={"shortest": 5})
    tracks = cxt.translate(tmp_path / "short.trees", model=path, out=tmp_path / "out", pairs="all", max_gap=0, min_accessible=0)
    read = tracks.read("1")
    every = [(a, b) for a in range(10) for b in range(a + 1, 10)]
    posterior = cxt.predict_ts(cxt.load_model(path), short, every)
    assert read.mean.shape == (45, windows)
    ours = {tuple(sorted(pair)): row for pair, row in zip(tracks.pairs, read.mean, strict=True)}
    for pair, row in zip(every, posterior.log_tmrca, strict=True):
        np.testing.assert_allclose(ours[pair], row, atol=2e-3)
    with pytest.raises(cxt.BadRequest, match="has 7 windows of 2000 bp, but checkpoint .* reads 20"):
        cxt.translate(tmp_path / "short.trees", model=saved(tmp_path / "y.ckpt"), out=tmp_path / "other")
