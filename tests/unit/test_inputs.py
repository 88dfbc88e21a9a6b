"""What a network is given: refused where it cannot be right, warned of where it is not like the training data."""

import re
import warnings
from itertools import combinations

import msprime
import numpy as np
import pytest
import torch
from helpers.simulations import simulate

from cxt import load_model, pair_features
from cxt.checkpoints.file import write_checkpoint
from cxt.checkpoints.record import build_checkpoint_record
from cxt.config.network import AdapterConfig, ModelConfig
from cxt.errors import BadRequest
from cxt.model.adapter import build_model
from cxt.model.inputs import OutsideTraining

WINDOW, LENGTH, SCALES, RATE = 2000, 99_000, (2, 4), 2e-7  # the last window of each scale is cut


def network(**changes) -> ModelConfig:
    return ModelConfig(
        **{"layers": 1, "heads": 2, "width": 16, "windows": 50, "samples": 10, "scales": 2, "bins": 20} | changes
    )


def diversity(ts, mask=None) -> float:
    """Mean differences per accessible bp among all pairs of haplotypes, over biallelic sites."""
    inside = np.ones(LENGTH, bool) if mask is None else ~mask[:LENGTH]
    genotypes, positions = ts.genotype_matrix(), ts.sites_position.astype(int)
    usable = (genotypes.max(axis=1) <= 1) & (positions < LENGTH) & inside[np.minimum(positions, LENGTH - 1)]
    pairs = list(combinations(range(ts.num_samples), 2))
    return float(np.mean([(genotypes[usable, a] != genotypes[usable, b]).sum() for a, b in pairs]) / inside.sum())


@pytest.fixture(scope="module")
def ts():
    return simulate(seed=1, rate=RATE)


@pytest.fixture(scope="module")
def mask():
    return np.random.default_rng(1).random(100_000) < np.linspace(0, 0.6, 100_000)


def counts(ts, **options) -> np.ndarray:
    options = {"window_size": WINDOW, "sequence_length": LENGTH, "scales": SCALES} | options
    return pair_features(ts.genotype_matrix(), ts.sites_position, [(0, 1), (2, 9)], **options)


def loaded(path, config, *, adapter=None, **ranges):
    """A model whose checkpoint says that it was trained on data in *ranges*."""
    torch.manual_seed(1)
    dataset = {"scales": list(SCALES), "missing": not config.mask_singletons, "ranges": ranges or None}
    write_checkpoint(
        path, build_model(config, adapter).state_dict(), build_checkpoint_record(config, adapter, name="x", dataset=dataset)
    )
    return load_model(path)


def warned(model, x, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(x, window_size=WINDOW, **options)
    assert all(warning.category is OutsideTraining and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_diversity_is_that_of_the_haplotypes(ts, mask, tmp_path):
    """Within the range nothing is said; half as much again beyond it, both numbers are."""
    # The region's length is taken as whole windows, which here is one in a hundred too long.
    for masked, config in ((None, network()), (mask, network(mask_singletons=False))):
        true = diversity(ts, masked)
        x = np.log1p(counts(ts, mask=masked))
        missing = [0.0, 0.7]
        for low, high, message in (
            (true / 2, true * 1.05, None),
            (true * 1.4, true * 2, None),
            (true * 1.6, true * 3, f"diversity .* in 2 of 2 examples, trained on {true * 1.6:.3g} to {true * 3:.3g}"),
            (true / 4, true / 1.6, f"trained on {true / 4:.3g} to {true / 1.6:.3g}"),
        ):
            messages = warned(loaded(tmp_path / "x.ckpt", config, diversity=[low, high], missingness=missing), x)
            assert len(messages) == (message is not None)
            if message:
                assert torch.tensor(float(messages[0].split("diversity ")[1].split()[0])) == pytest.approx(true, rel=0.02)
                assert re.search(message, messages[0])


def test_ten_times_the_mutation_rate(ts, tmp_path):
    """By what X shows, and by the rate that is given."""
    pi = diversity(ts)
    ranges = {"diversity": [0.8 * pi, 1.2 * pi], "mutation_rate": [RATE, RATE], "recombination_rate": [1e-8, 2e-8]}
    model = loaded(tmp_path / "x.ckpt", network(), **ranges)
    more = msprime.sim_mutations(ts, rate=10 * RATE, random_seed=2, discrete_genome=False, keep=False)
    (message,) = warned(model, np.log1p(counts(more)), mutation_rate=10 * RATE, recombination_rate=1e-7)
    for words in ("diversity ", f"mutation rate 2e-06, trained on {RATE:.3g} to", "recombination rate 1e-07, trained on 1e-08"):
        assert words in message
    assert not warned(model, np.log1p(counts(ts)), mutation_rate=RATE, recombination_rate=2.9e-8)
    assert not warned(loaded(tmp_path / "x.ckpt", network()), np.log1p(counts(more)), mutation_rate=1)  # an older checkpoint
    assert not warned(build_model(network()), np.log1p(counts(more)))
    for rate in (-1e-8, float("nan"), "1e-8", True):
        with pytest.raises(BadRequest, match="mutation_rate must be a number per bp and generation, got"):
            model.generate(np.log1p(counts(ts)), window_size=WINDOW, mutation_rate=rate)


def test_missing_data(ts, mask, tmp_path):
    share = float(mask[:LENGTH].mean())
    reads = network(mask_singletons=False)
    x, without = np.log1p(counts(ts, mask=mask)), np.log1p(counts(ts))
    assert not warned(loaded(tmp_path / "x.ckpt", reads, missingness=[share - 0.04, share - 0.04]), x)
    (message,) = warned(loaded(tmp_path / "x.ckpt", reads, missingness=[0.5, 0.6]), x)
    assert f"missingness {share:.2g}" in message
    assert "trained on 0.5 to 0.6" in message
    # A network that does not read bin 0 is told of what is missing there all the same.
    (message,) = warned(loaded(tmp_path / "x.ckpt", network(), missingness=[0.0, 0.0]), x)
    assert "trained on 0 to 0" in message
    with pytest.raises(BadRequest, match="reads the missing fraction of each window from frequency bin 0"):
        loaded(tmp_path / "x.ckpt", reads).generate(without, window_size=WINDOW)
    # Bin 0 holds something else, which that network overwrites.
    without[..., 0] = 3.0
    assert not warned(loaded(tmp_path / "x.ckpt", network(), missingness=[0.0, 0.0]), without)


def test_scales(ts, tmp_path):
    model = loaded(tmp_path / "x.ckpt", network(), diversity=[diversity(ts), diversity(ts)])
    assert not warned(model, np.log1p(counts(ts)))
    (message,) = warned(model, np.log1p(counts(ts, scales=(4, 8))))  # every site twice
    assert "diversity" in message
    (message,) = warned(model, np.log1p(counts(ts, scales=(2, 8))))
    assert "do not contain the same sites at each of the scales 2, 4" in message


def test_window_size(ts):
    model, x = build_model(network()), np.log1p(counts(ts))
    with pytest.raises(BadRequest, match="this model reads windows of 2000 bp, but the counts were computed with 1000 bp"):
        model.generate(x, window_size=1000)
    for size in (None, "2000", True):
        with pytest.raises(BadRequest, match="window_size must be the base pairs per window of X, got"):
            model.generate(x, window_size=size)
    with pytest.raises(TypeError, match="window_size"):
        model.generate(x)
    tokens, _ = model.generate(x, window_size=np.float64(2000))
    assert tokens.shape == (2, 1, 50)


def test_what_is_not_log1p_of_counts(ts):
    model, raw = build_model(network()), counts(ts)
    x = torch.log1p(torch.from_numpy(raw))
    for wrong in (raw, np.log2(1 + raw), np.log1p(np.log1p(raw)), raw / 2, -np.log1p(raw), np.log10(1 + raw)):
        with pytest.raises(BadRequest, match="and not of a count: pass the natural logarithm of 1 [+] count"):
            model.generate(wrong, window_size=WINDOW)
    for wrong, message in (
        (raw.astype(np.int32), "X must be floating-point log1p of counts, got int32"),
        (np.full_like(raw, np.nan), "X must be finite"),
        (np.full_like(raw, np.inf), "X must be finite"),
        ("text", "X must be an array of numbers|X must"),
        (None, "X must be an array of numbers"),
    ):
        with pytest.raises(BadRequest, match=message):
            model.generate(wrong, window_size=WINDOW)
    expected, _ = model.generate(x, window_size=WINDOW, seed=3)
    for given in (x.numpy(), x.double(), x.numpy().astype(np.float64)):
        assert torch.equal(model.generate(given, window_size=WINDOW, seed=3)[0], expected)
    for given in (x.half(), x.bfloat16(), x.numpy().astype(np.float16), x.bfloat16().float()):  # rounded, and still counts
        model.generate(given, window_size=WINDOW)


def test_shapes_in_words(ts):
    model, x = build_model(network()).eval(), torch.log1p(torch.from_numpy(counts(ts)))
    y = torch.ones(2, 51, dtype=torch.long)
    for wrong, message in (
        (
            x[..., :6],
            "this model reads 50 windows of 10 haplotypes at 2 scales; X has 6 haplotypes; a checkpoint with an adapter",
        ),
        (
            torch.cat([x, x], dim=3),
            "this model reads 50 windows of 10 haplotypes at 2 scales; X has 100 windows$",
        ),
        (x[:, :, :1], "X has 1 scales$"),
        (x[0], r"for one example, pass X\[None\]"),
        (x[:, :1], "cxt.pair_features makes such counts"),
    ):
        for use in (lambda x: model(x, y), lambda x: model.loss(x, y), lambda x: model.generate(x, window_size=WINDOW)):
            with pytest.raises(BadRequest, match=message):
                use(wrong)
    with pytest.raises(BadRequest, match="this model reads 50 windows of 10 haplotypes at 2 scales; X has 40 windows$"):
        model.generate(x[:, :, :, :40], window_size=WINDOW)
    adapted = build_model(network(), AdapterConfig(samples=6, bottleneck=4))
    with pytest.raises(BadRequest, match="reads 50 windows of 6 haplotypes at 2 scales; X has 10 haplotypes"):
        adapted.generate(x, window_size=WINDOW)
    with pytest.raises(BadRequest, match="X must be a tensor, .*, got ndarray"):
        model(x.numpy(), y)
    for wrong in (y[:, :50], y[:1], y.numpy()):
        with pytest.raises(BadRequest, match=r"the tokens must have shape \(2, 51\)"):
            model(x, wrong)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"replicates": 1.5}, "replicates must be a whole number, got 1.5"),
        ({"replicates": None}, "replicates must be a whole number, got None"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"top_k": "3"}, "top_k must be a whole number, got '3'"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number, got inf"),
        ({"temperature": "1"}, "temperature must be a finite number, got '1'"),
        ({"example_ids": [0]}, "example_ids must be 2 whole numbers"),
        ({"example_ids": [0, 0.5]}, "example_ids must be 2 whole numbers"),
        ({"tokens": torch.ones(2, 51, dtype=torch.long)}, r"the tokens must have shape \(2, 1, 51\)"),
        ({"tokens": torch.full((2, 1, 51), 22)}, "tokens must be whole numbers from 0 to 21"),
    ],
)
def test_settings(ts, setting, message):
    with pytest.raises(BadRequest, match=message):
        build_model(network()).generate(np.log1p(counts(ts)), window_size=WINDOW, **setting)
