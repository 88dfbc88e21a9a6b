"""Training on items that are simulated when they are asked for."""

import re

import numpy as np
import pytest
import torch
import yaml
from helpers.repository import run_python
from helpers.simulations import constant_scenario

from cxt import pair_features, pair_log_tmrca
from cxt.config.variants import list_variants
from cxt.data.grid import Grid
from cxt.data.loaders import ProcessLoader
from cxt.data.simulated import ON_THE_FLY_START, SimulatedDataset, build_simulated_manifest
from cxt.errors import BadRequest
from cxt.scenarios.registry import simulate_tree_sequence

LEAVES = [
    variant.spec
    for variant in list_variants("constant", constant_scenario(population_size=[10_000, 20_000], sequence_length=20_000))
]
MANIFEST = build_simulated_manifest(LEAVES, window_size=1000, samples=None, scales=(2, 4), held_out=5, examples=40)


def live(split="train", seed=1, manifest=MANIFEST):
    return SimulatedDataset(LEAVES, manifest, split, seed=seed)


def test_item_is_a_function_of_seed_and_number():
    for split, first in (("test", 0), ("train", 5)):
        items = live(split)
        for i in (0, 3):
            number = first + i
            scenario, index, pair = items.describe(i)
            assert (scenario, index) == (LEAVES[number % 2]["name"], ON_THE_FLY_START + number // 2)
            ts = simulate_tree_sequence(LEAVES[number % 2], index=index, seed=1)
            arguments = {"window_size": 1000, "sequence_length": 20_000}
            expected = pair_features(ts.genotype_matrix(), ts.sites_position, [pair], scales=(2, 4), **arguments)
            batch = items.batch([i])
            assert np.array_equal(batch.counts.numpy(), expected)
            y = pair_log_tmrca(ts, [pair], **arguments).astype(np.float32)
            assert np.array_equal(batch.tokens.numpy(), Grid().tokens(y))
            torch.testing.assert_close(items[i][0], torch.from_numpy(np.log1p(expected[0])))


def test_seeds_and_splits():
    numbers = range(12)
    again, other = live().batch(numbers), live(seed=2).batch(numbers)
    assert torch.equal(live().batch(numbers).counts, again.counts)
    assert not torch.equal(again.counts, other.counts)
    held_out = {live("test").describe(i)[:2] for i in range(5)}
    assert not held_out & {live().describe(i)[:2] for i in range(40)}
    # A longer run begins with the items of a shorter one.
    longer = build_simulated_manifest(LEAVES, window_size=1000, samples=None, scales=(2, 4), held_out=5, examples=400)
    assert torch.equal(live(manifest=longer).batch(numbers).counts, again.counts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 3000}, "not a multiple of --window-size 3000"),
        ({"samples": 21}, "--samples must be from 2 to 20, .*, got 21"),
        ({"window_size": 0}, "--window-size must be positive, got 0"),
        ({"variants": [*LEAVES, LEAVES[1]]}, "population_size=20000 repeated"),
        (
            {"variants": [*LEAVES, LEAVES[0] | {"name": "short", "sequence_length": 5000}]},
            r"same length, got \[5000, 20000\] bp",
        ),
    ],
)
def test_bad_shapes(change, message):
    arguments = {
        "variants": LEAVES,
        "window_size": 1000,
        "samples": None,
        "scales": (2,),
        "held_out": 1,
        "examples": 1,
    } | change
    with pytest.raises(BadRequest, match=message):
        build_simulated_manifest(arguments.pop("variants"), **arguments)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """What a tiny network needs to train on a scenario of its own."""
    entry = constant_scenario(sequence_length=10_000)
    configfile = tmp_path_factory.mktemp("live") / "live.yaml"
    configfile.write_text(yaml.safe_dump({"scenarios": {"little": entry}}))
    words = "--model broad --layers 1 --heads 2 --width 32 --batch-size 8 --grad-accum 1 --lr 5e-3 --min-lr 1e-3 --threads 1"
    return ["--simulate", "little", "--configfile", configfile, "--window-size", 1000, "--devices", 0, *words.split()]


def train(flags, directory, *more, check=True):
    return run_python("-m", "cxt.train", *flags, "--run-dir", directory, *more, check=check)


def weights(directory):
    (path,) = (directory / "checkpoints").glob("broad_epoch=*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.long
def test_training_learns_and_repeats(flags, tmp_path):
    arguments = ["--max-steps", 60, "--eval-samples", 32]
    done = train(flags, tmp_path / "a", *arguments)
    losses = [float(x) for x in re.findall(r"validation loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    again = train(flags, tmp_path / "b", *arguments, "--workers", 2)
    assert [float(x) for x in re.findall(r"validation loss ([0-9.]+)", again.stdout)] == losses
    for key, value in weights(tmp_path / "a").items():
        assert torch.equal(value, weights(tmp_path / "b")[key])


@pytest.mark.slow
@pytest.mark.long
def test_resuming_goes_on_with_the_next_item(flags, tmp_path):
    """Killed right after a save, the run ends with the weights of an undisturbed one."""
    arguments = ["--max-steps", 12, "--eval-max-batches", 1, "--save-every", 5]
    train(flags, tmp_path / "whole", *arguments)
    code = (
        "import os, sys, signal; from cxt.data import simulated; from cxt.train import main\n"
        "original = simulated.SimulatedDataset.batch\n"
        "def batch(self, items, **k):\n"
        "    if self.split == 'train' and list(items)[0] >= 8 * 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, items, **k)\n"
        "simulated.SimulatedDataset.batch = batch; main()"
    )
    killed = run_python("-c", code, *flags, "--run-dir", tmp_path / "cut", *arguments, check=False)
    assert killed.returncode == -9
    resumed = train(flags, tmp_path / "cut", *arguments)
    assert "continuing from" in resumed.stdout
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "cut")[key])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-steps", 5], "set either --eval-samples or --eval-max-batches"),
        (["--max-steps", 5, "--eval-samples", 0], "must be positive, got 0"),
        (["--eval-samples", 5], "--simulate needs --max-steps"),
        (["--max-steps", 0, "--eval-samples", 5], "--max-steps must be a positive integer, got 0"),
        (["--max-steps", 5, "--eval-samples", 5, "--storage", "disk"], "--storage cannot be used with --simulate"),
        (["--max-steps", 5, "--eval-samples", 5, "--scratch", "/tmp"], "--scratch cannot be used with --simulate"),
        (["--max-steps", 5, "--eval-samples", 5, "--epochs", 3], "--epochs cannot be used with --simulate"),
        (["--max-steps", 5, "--eval-samples", 5, "--dataset-path", "x"], "but not both"),
        (["--max-steps", 5, "--eval-samples", 5, "--simulate", "litle"], "unknown scenario 'litle'; did you mean 'little'"),
        (["--max-steps", 5, "--eval-samples", 5, "--model", "w200_wmissing"], "reads missingness from bin 0"),
    ],
)
def test_bad_requests(flags, tmp_path, more, message):
    done = train(flags, tmp_path / "run", *more, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_bad_request_in_a_simulating_process(monkeypatch):
    """Comes as itself, not with the traceback of a process behind it."""

    def refuse(*args, **kwargs):
        raise BadRequest("no")

    monkeypatch.setattr("cxt.data.simulated.simulate_tree_sequence", refuse)
    for processes in (0, 1):
        with pytest.raises(BadRequest, match="^no$"):
            list(ProcessLoader(live(), [[0, 1]], processes=processes, pin=False))


def test_flags_of_simulation_need_it(dataset, tmp_path):
    for flag in (["--eval-samples", 0], ["--window-size", 1000], ["--configfile", "x"]):
        done = run_python(
            "-m", "cxt.train", "--dataset-path", dataset, "--run-dir", tmp_path / "run", *flag, check=False
        )  # fmt: skip
        assert done.returncode == 2
        assert f"{flag[0]} cannot be used without --simulate" in done.stderr


@pytest.mark.slow
def test_max_steps_with_a_dataset(dataset, tmp_path):
    words = "--model broad --layers 1 --heads 2 --width 32 --batch-size 8 --grad-accum 2 --threads 1 --devices 0 --epochs 2"
    done = run_python(
        "-m", "cxt.train", "--dataset-path", dataset, *words.split(), "--run-dir", tmp_path / "run", "--max-steps", 9
    )
    assert "9 steps" in done.stdout
    assert list((tmp_path / "run/checkpoints").glob("broad_epoch=1-step=9.ckpt"))
