"""`cxt translate --replicates`: sampled tracks, against a plain decoding of a block, and that nothing else changes them."""

from pathlib import Path

import msprime
import numpy as np
import pytest
import torch
from helpers.network import write_random_checkpoint

import cxt
from cxt.config.network import ModelConfig
from cxt.config.translation import Translation
from cxt.data.examples import compute_model_input
from cxt.data.grid import Grid
from cxt.model.decoder import Decoder
from cxt.random_seeds import hash_key
from cxt.translation.translate import run_translation

SIZE, WINDOWS, LENGTH = 500, 20, 30_000
BLOCK = 12  # windows that are kept of a block, without flanks of a fifth
SAMPLES = 6


def save_model(path, objective="autoregressive", *, samples=SAMPLES):
    """A network with random weights."""
    config = ModelConfig(
        layers=2, heads=2, width=16, windows=WINDOWS, samples=samples, scales=2, bins=30, window_size=SIZE, mask_singletons=True
    )
    return write_random_checkpoint(path, config, scales=[2, 4], objective=objective)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sampled")
    save_model(directory / "sampled.ckpt")
    ts = msprime.sim_ancestry(3, population_size=1e4, sequence_length=LENGTH, recombination_rate=1e-8, random_seed=1)
    ts = msprime.sim_mutations(ts, rate=1e-7, random_seed=1)
    positions, first = np.unique(ts.sites_position.astype(np.int64), return_index=True)
    genotypes = np.minimum(ts.genotype_matrix()[first], 1).reshape(-1, 3, 2)
    np.savez(directory / "genotypes.npz", genotypes=genotypes, positions=positions, sequence_length=LENGTH)
    return directory


def translate(here, out, **settings):
    settings = {"model": here / "sampled.ckpt", "replicates": 4, "max_gap": 0} | settings
    return cxt.translate(here / "genotypes.npz", out=out, **settings)


@pytest.fixture(scope="module")
def whole(here):
    return translate(here, here / "whole")


def all_bytes(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def test_replicates_are_the_sequences_that_estimates_average(here, whole):
    """The first block, decoded by hand."""
    found = whole.read("1")
    assert found.replicates.shape == (4, 3, LENGTH // SIZE)
    assert whole.attributes["replicates"] == 4
    assert whole.attributes["block_windows"] == BLOCK
    model = cxt.load_model(here / "sampled.ckpt")
    with np.load(here / "genotypes.npz") as data:
        inside = data["positions"] < WINDOWS * SIZE
        genotypes, positions = data["genotypes"][inside].reshape(-1, 6), data["positions"][inside]
    pairs = [(0, 1), (2, 3), (4, 5)]
    counts = cxt.pair_features(genotypes, positions, pairs, window_size=SIZE, sequence_length=WINDOWS * SIZE, scales=(2, 4))
    x = compute_model_input(torch.from_numpy(counts), None)
    ids = [hash_key("translate", "1", 0, 0, *pair) - 2**63 for pair in pairs]
    tokens, probabilities = Decoder(model, replicates=4, seed=0).decode(x, example_ids=ids)
    grid = Grid(model.config.grid_low, model.config.grid_high, model.config.bins)
    keep = slice(0, BLOCK)
    sampled = grid.centres[tokens.numpy() - 2][:, :, keep].transpose(1, 0, 2)
    assert found.replicates[:, :, keep] == pytest.approx(sampled, abs=1e-5)
    means = (probabilities.mean(dim=1).double().numpy() @ grid.centres)[:, keep]
    assert found.mean[:, keep] == pytest.approx(means, abs=1e-5)


def test_neither_batches_nor_interruptions_matter(here, whole, tmp_path):
    for size in (1, 2):
        translate(here, tmp_path / f"{size}", batch_size=size)
        assert all_bytes(tmp_path / f"{size}") == all_bytes(here / "whole")
    settings = {"input": str(here / "genotypes.npz"), "model": str(here / "sampled.ckpt"), "replicates": 4, "max_gap": 0}
    run = {"device": "cpu", "batch_size": 2, "bigwig": False, "force": False}
    request, out = Translation.read(settings), tmp_path / "parts"
    run_translation(request, out, step="read", part=(1, 1), **run)
    run_translation(request, out, step="blocks", part=(2, 3), **run)
    (out / ".work" / ".0-0-0.npz.part").write_bytes(b"half")  # what was being written
    tracks = run_translation(request, out, step="all", part=(1, 1), **run)
    assert tracks is not None
    assert tracks.read("1").replicates.shape[0] == 4
    assert all_bytes(out) == all_bytes(here / "whole")


def test_without_a_request_nothing_is_written_and_15_are_averaged(here, tmp_path):
    plain, asked = translate(here, tmp_path / "a", replicates=None), translate(here, tmp_path / "b", replicates=15)
    assert plain.read("1").replicates is None
    assert asked.read("1").replicates.shape[0] == 15
    assert "replicates" not in plain.attributes
    for name in ("tracks.tsv.gz", "ne.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_missing_windows_and_calibration(here, tmp_path):
    """Sampled tracks are missing where the estimates are, and calibrated as they are."""
    (tmp_path / "mask.bed").write_text("1\t5000\t9000\n")
    masked = {"mask": tmp_path / "mask.bed", "mask_marks": "inaccessible"}
    plain = translate(here, tmp_path / "plain", **masked).read("1")
    calibrated = translate(here, tmp_path / "calibrated", mutation_rate=1e-7, **masked).read("1")
    assert np.isnan(plain.mean).any()
    assert np.array_equal(np.isnan(plain.replicates), np.isnan(plain.mean)[None].repeat(4, axis=0))
    moved = (calibrated.mean - plain.mean)[None]
    assert np.nanmax(np.abs(calibrated.replicates - plain.replicates - moved)) < 1e-5
    assert np.nanmin(np.abs(moved)) > 0.01


def test_replicates_of_panels(here, tmp_path):
    """Of each panel in turn; the first panel is that of a translation without more."""
    model = save_model(tmp_path / "four.ckpt", samples=4)
    one = translate(here, tmp_path / "one", model=model, panels=1).read("1").replicates
    two = translate(here, tmp_path / "two", model=model, panels=2).read("1").replicates
    assert np.array_equal(one[[0, 2]], two[[0, 2]])
    assert not np.array_equal(one[1], two[1])


def test_a_checkpoint_that_is_read_in_one_pass(here, tmp_path):
    for objective, advice in (("marginal", "objective: autoregressive"), ("joint", "reading: sampled")):
        model = save_model(tmp_path / f"{objective}.ckpt", objective)
        with pytest.raises(cxt.BadRequest, match=f"read in one pass.*leave replicates out, or .*`{advice}`"):
            cxt.translate(tmp_path / "nothing.vcf", model=model, out=tmp_path / "x", replicates=4)
        assert not (tmp_path / "x").exists()
    tracks = translate(here, tmp_path / "joint", model=tmp_path / "joint.ckpt", reading="sampled")
    assert tracks.read("1").replicates.shape[0] == 4
