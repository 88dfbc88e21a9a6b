"""Decoding: what is drawn depends on the item alone, the cache changes nothing, and sampling does what it says."""

import numpy as np
import pytest
import torch
from helpers.network import inputs, model_of
from helpers.repository import GOLDEN

from cxt import load_model
from cxt.errors import BadRequest
from cxt.model.adapter import build_model
from cxt.model.decoder import Decoder
from cxt.model.inputs import OutsideTraining
from cxt.model.sampling import draw_uniforms, sample_bins, top_k_filter


def test_the_same_tokens_in_any_batch():
    model = model_of()
    x, _ = inputs(items=64)
    whole, _ = model.generate(x, window_size=2000, replicates=3, seed=4)
    for size in (1, 7):
        parts = [
            model.generate(
                x[start : start + size], window_size=2000, example_ids=range(start, min(64, start + size)), replicates=3, seed=4
            )[0]
            for start in range(0, 64, size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    # Numbers tell items apart, not places: in another order, and as few of many.
    order = [5, 63, 0]
    assert torch.equal(model.generate(x[order], window_size=2000, example_ids=order, replicates=3, seed=4)[0], whole[order])
    fewer, _ = model.generate(x, window_size=2000, replicates=2, seed=4)
    assert torch.equal(fewer, whole[:, :2])
    other, _ = model.generate(x, window_size=2000, replicates=3, seed=5)
    assert not torch.equal(other, whole)
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_a_wider_view_of_the_cache_changes_nothing():
    """On a GPU a step looks at more slots than are filled, and hides the rest."""
    model = model_of()
    x, _ = inputs(items=4)
    tokens, probabilities = model.generate(x, window_size=2000, replicates=3, seed=4)
    for slots in (5, 12, 100):
        same_tokens, distribution = model.generate(x, window_size=2000, replicates=3, seed=4, slots=slots)
        assert torch.equal(same_tokens, tokens)
        torch.testing.assert_close(distribution, probabilities, atol=1e-6, rtol=1e-5)


def test_a_decoder_is_used_again():
    model = model_of()
    x, y = inputs(items=8)
    decoder = Decoder(model, replicates=2, seed=3)
    first = decoder.decode(x[:4])[0].clone()
    second = decoder.decode(x[4:], example_ids=range(4, 8))[0].clone()
    assert torch.equal(torch.cat([first, second]), model.generate(x, window_size=2000, replicates=2, seed=3)[0])
    fed = y[:4, None].expand(-1, 2, -1)
    for _ in range(2):
        tokens, _ = decoder.decode(x[:4], tokens=fed)
        assert torch.equal(tokens, fed[:, :, 1:])
    assert torch.equal(decoder.decode(x[:4])[0], first)
    assert torch.equal(decoder.decode(x[:3])[0], first[:3])


def test_published_network_with_and_without_a_cache():
    """500 windows; decoding has no start token in its prefix, so the uncached network must not have one either."""
    published = load_model(GOLDEN / "published_style.ckpt")
    model = build_model(published.config.replace(start_token_in_prefix=False)).eval()
    model.load_state_dict(published.state_dict())
    expected = np.load(GOLDEN / "model.npz")
    x, y = torch.from_numpy(expected["x"]), torch.from_numpy(expected["y"])
    with pytest.warns(
        OutsideTraining, match="do not contain the same sites at each of the scales 2, 8, 32, 64"
    ):  # random counts
        _, probabilities = published.generate(x, window_size=2000, tokens=y[:, None])
    with torch.no_grad():
        torch.testing.assert_close(probabilities[:, 0], model(x, y)[..., 2:].softmax(-1), atol=1e-5, rtol=1e-4)


def test_sampling_without_a_cache_draws_the_same():
    """Token by token with the whole network, from the same uniform numbers."""
    model = model_of()
    x, y = inputs(items=3)
    tokens, _ = model.generate(x, window_size=2000, replicates=2, seed=9, temperature=0.7, top_k=40)
    uniform = draw_uniforms(9, range(3), replicates=2, windows=12)
    for replicate in range(2):
        past = torch.ones_like(y)
        for window in range(12):
            with torch.no_grad():
                logits = model(x, past)[:, window, 2:].double().numpy() / 0.7
            for item in range(3):
                kept = np.argsort(logits[item])[-40:]
                weights = np.zeros(324)
                weights[kept] = np.exp(logits[item][kept] - logits[item].max())
                cumulative = np.cumsum(weights)
                bin_ = np.searchsorted(cumulative, uniform[item, replicate, window] * cumulative[-1], side="right")
                past[item, window + 1] = int(bin_) + 2
        assert torch.equal(past[:, 1:], tokens[:, replicate])


def test_half_precision_is_close():
    """Keys, values and products in bfloat16, as on a GPU: the distributions move little."""
    model = model_of(scale=3.0)
    x, y = inputs(items=2)
    _, exact = model.generate(x, window_size=2000, tokens=y[:, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = Decoder(model)
        _, rough = decoder.decode(x, tokens=y[:, None])
    assert {cache.k.dtype for cache in decoder.caches} == {torch.bfloat16}
    assert 0 < float((exact - rough).abs().max()) < 0.05
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for bf16-true
    try:
        _, rougher = model.to(torch.bfloat16).generate(x, window_size=2000, tokens=y[:, None])
    finally:
        torch.set_default_dtype(before)
    assert rougher.dtype == torch.float32
    assert float((exact - rougher).abs().max()) < 0.05


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"top_k": 0}, {"replicates": 0}, {"slots": -1}])
def test_bad_settings(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=rf"{name} must be positive, got"):
        model_of().generate(inputs()[0], window_size=2000, **setting)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, "seed must be .* 9223372036854775807, got -1"),
        (10**29, "seed must be .* 9223372036854775807, got 1"),
        (0.5, "seed must be a whole number, got 0.5"),
    ],
)
def test_bad_seeds(seed, message):
    with pytest.raises(BadRequest, match=message):
        model_of().generate(inputs()[0], window_size=2000, seed=seed)


def test_uniform_numbers():
    """Each a function of its key only; evenly spread, and independent along every axis as far as moments tell."""
    numbers = draw_uniforms(7, range(100), replicates=20, windows=50)
    assert numbers.shape == (100, 20, 50)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.unique(numbers).size == numbers.size
    assert np.array_equal(draw_uniforms(7, [93, 5], replicates=3, windows=10), numbers[[93, 5], :3, :10])
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-square of 99 degrees of freedom: 1e-4
    centred = numbers - 0.5
    for axis in range(3):
        first, second = np.delete(centred, 0, axis=axis), np.delete(centred, -1, axis=axis)
        assert abs((first * second).mean()) * 12 < 5 / first.size**0.5
    assert abs((centred * (draw_uniforms(8, range(100), replicates=20, windows=50) - 0.5)).mean()) * 12 < 5 / centred.size**0.5


def test_uniform_numbers_of_seeds_and_items():
    """No seed's items are another seed's, however close the two: (1, 5) and (2, 4) once had the same numbers."""
    seeds = [0, 1, 2, 3, 2**32, 2**32 + 1, 2**63 - 1]
    grid = np.stack([draw_uniforms(seed, range(64), replicates=8, windows=32) for seed in seeds])
    assert np.unique(grid).size == grid.size
    flat = grid.reshape(len(seeds) * 64, -1) - 0.5  # one row for each (seed, item)
    correlations = np.corrcoef(flat)[np.triu_indices(len(flat), 1)]
    assert abs(correlations).max() < 6.5 / flat.shape[1] ** 0.5  # of 100 128, normal with that standard deviation
    assert abs(correlations.mean()) < 5 / (correlations.size * flat.shape[1]) ** 0.5
    counts, _ = np.histogram(grid, bins=100, range=(0, 1))
    expected = grid.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-square of 99 degrees of freedom: 1e-4
    for seed in (-1, 10**29, 2**63, 1.5, None):
        with pytest.raises(BadRequest, match="seed must be .* 9223372036854775807, got"):
            draw_uniforms(seed, [0], replicates=1, windows=1)


def test_drawing():
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.full(30, 0.3), size=200)
    probabilities[:, ::3] = 0  # bins that must not be drawn
    uniform = rng.random(200)
    uniform[:3] = 0.0, 1 - 2**-53, 0.5
    bins = sample_bins(torch.from_numpy(probabilities), torch.from_numpy(uniform)).numpy()
    for row, u, bin_ in zip(probabilities, uniform, bins, strict=True):
        cumulative = np.cumsum(row)
        assert bin_ == np.searchsorted(cumulative, u * cumulative[-1], side="right")
        assert row[bin_] > 0
    # The largest number there can be stays within what has probability.
    assert int(sample_bins(torch.tensor([0.0, 0.5, 0.5, 0.0]), torch.tensor(1.0, dtype=torch.float64))) == 2


def test_most_probable_bins():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    for k in (1, 4, 30, 99):
        kept = torch.isfinite(top_k_filter(logits, k))
        assert kept.sum(-1).tolist() == [min(k, 30)] * 5
        for row, kept_bins in zip(logits, kept, strict=True):
            assert set(kept_bins.nonzero()[:, 0].tolist()) == set(row.argsort()[-min(k, 30) :].tolist())
    assert top_k_filter(logits, None) is logits
    ties = torch.zeros(1, 6)
    assert int(torch.isfinite(top_k_filter(ties, 2)).sum()) == 2


def test_a_model_that_was_not_trained_to_sample_is_refused():
    model = model_of()
    x, _ = inputs()
    model.objective = "marginal"
    with pytest.raises(BadRequest, match="trained with the objective marginal, so that reading must be marginal"):
        model.generate(x, window_size=2000)
    model.objective = "joint"
    model.generate(x, window_size=2000)
