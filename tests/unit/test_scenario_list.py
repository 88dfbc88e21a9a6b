"""Evaluating a checkpoint on scenarios that are cut from files: only on what is held out, and in regions of its length."""

import json

import msprime
import numpy as np
import pytest
import torch
from helpers.network import write_random_checkpoint

from cxt import evaluate as evaluate_stage
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.config.file import load
from cxt.config.network import ModelConfig
from cxt.errors import BadRequest
from cxt.evaluation.scenario_list import evaluate_on_scenarios

LENGTH = 10_000
NETWORK = ModelConfig(layers=1, heads=2, width=16, windows=10, samples=10, scales=2, window_size=1000, dropout=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network with random weights that reads 10 windows of 10 haplotypes in one pass."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random.ckpt", NETWORK, scales=[2, 4])


@pytest.fixture(scope="module")
def ancestry(tmp_path_factory):
    """A file of 25 pieces of 10 kb, of which the first, the eleventh and the twenty-first are held out."""
    ts = msprime.sim_ancestry(5, population_size=1e3, sequence_length=25.5 * LENGTH, recombination_rate=1e-7, random_seed=1)
    path = tmp_path_factory.mktemp("trees") / "mine.trees"
    ts.dump(path)
    return path, ts


def configuration(directory, path, **changes):
    scenario = {
        "kind": "trees", "files": str(path), "mutations": "overlay", "mutation_rate": 1e-7, "individuals": 5,
        "sequence_length": LENGTH,
    }  # fmt: skip
    file = directory / "mine.yaml"
    file.write_text(json.dumps({"scenarios": {"mine": scenario | changes}}), encoding="utf-8")
    return file


def evaluate(checkpoint, configfile, **settings):
    torch.manual_seed(1)
    settings = {"pairs": 4, "threads": 1, "seed": 5, "progress": lambda line: None} | settings
    return evaluate_on_scenarios(checkpoint, load([configfile]), ["mine"], **settings)


def test_only_pieces_that_are_held_out(checkpoint, ancestry, tmp_path):
    """However many are asked for; their targets are those of the file at these places."""
    path, ts = ancestry
    lines: list[str] = []
    _, tracks = evaluate(checkpoint, configuration(tmp_path, path), simulations=10, progress=lines.append)
    assert lines[0] == "mine: cutting 3 pieces of 10,000 bp, all that are held out of training, instead of 10"
    truth = tracks["mine"][0]
    assert truth.shape == (3, 4, 10)
    windows = 1000.0 * np.arange(int(ts.sequence_length) // 1000 + 1)
    windows[-1] = ts.sequence_length
    samples = [[node] for node in ts.samples()]
    indexes = [(a, b) for a in range(10) for b in range(a)]
    every = np.log(ts.divergence(samples, indexes=indexes, mode="branch", windows=windows) / 2)  # (windows, pairs)
    for place, found in zip((0, 100, 200), truth, strict=True):
        for row in found:
            distance = np.abs(every[place : place + 10] - row[:, None]).max(axis=0)
            assert distance.min() < 1e-5
    _, fewer = evaluate(checkpoint, configuration(tmp_path, path), simulations=2)
    assert np.array_equal(fewer["mine"][0], truth[:2])


def test_pieces_of_another_length_are_refused(checkpoint, ancestry, tmp_path):
    """They could contain what the checkpoint was trained on, since others of them are held out."""
    configfile = configuration(tmp_path, ancestry[0], sequence_length=20_000)
    message = "'mine' is cut into pieces of 20,000 bp, but .* on examples of 10,000 bp.*set sequence_length to 10000"
    with pytest.raises(BadRequest, match=message):
        evaluate_stage.main([str(checkpoint), "--scenarios", "mine", "--configfile", str(configfile)])


def test_members_that_hold_out_different_pieces(checkpoint, ancestry, tmp_path):
    """Examples of 20 kb, of which the network reads 10 kb: a piece that one member holds out, the other may have trained on."""
    other, stored = tmp_path / "other.ckpt", read_checkpoint(checkpoint)
    data = stored.record["dataset"] | {"sequence_length": 2 * LENGTH}
    write_checkpoint(other, stored.state_dict, stored.record | {"dataset": data})
    configfile = configuration(tmp_path, ancestry[0])
    settings = {"ensemble": "both", "simulations": 2}
    for members in ([checkpoint, other], [other, checkpoint]):
        with pytest.raises(BadRequest, match=r"was trained on examples of \S+ bp, and \S+ on examples of \S+ bp, so that they"):
            evaluate(members, configfile, **settings)
    evaluate_on_scenarios([checkpoint, other], load(), ["constant"], pairs=2, seed=5, progress=lambda line: None, **settings)
