"""Batches: what a dying worker says, taking one simulation out, and several regions of a simulation."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tskit
from helpers.repository import REPOSITORY, run_python
from helpers.simulations import build_dataset, constant_scenario

import cxt
from cxt.config.variants import list_variants
from cxt.data.grid import Grid
from cxt.data.manifest import read_manifest
from cxt.data.preprocessing import compute_region_start, preprocess_simulation
from cxt.data.shards import read_shard
from cxt.data.targets import pair_log_tmrca
from cxt.errors import BadRequest
from cxt.scenarios.batches import read_batch, write_batch
from cxt.scenarios.registry import simulate_tree_sequence

SLOW = {
    "name": "slow", "kind": "constant", "population_size": 10_000_000, "individuals": 25, "sequence_length": 1_000_000,
    "mutation_rate": 1e-9, "recombination_rate": 1e-8,
}  # fmt: skip


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_simulating(spec, out, *, start=20) -> subprocess.Popen:
    """`python -m cxt.simulate` at work on *spec*, its simulating child started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cxt.simulate", "--spec", json.dumps(spec), "--start", str(start), "--count", "2", "--seed", "7",
         "--out", out],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not children_of(process.pid):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(1)
    return process


def reproduces(message: str, *, name: str, index: int, seed: int) -> list[str]:
    """The command that a message gives for one simulation, after checking that it names that simulation."""
    assert f"simulation {index} of '{name}' with seed {seed}" in message
    command = shlex.split(re.search(r"^  (python -m cxt\.simulate .*)$", message, flags=re.M)[1])
    assert command[command.index("--start") + 1] == str(index)
    assert command[command.index("--count") + 1] == "1"
    return command


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for the child process")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_worker_that_dies_is_named(tmp_path, number):
    out = tmp_path / "slow.trees.batch"
    process = start_simulating(SLOW, out)
    os.kill(children_of(process.pid)[0], number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"killed by {number.name}" in message
    reproduces(message, name="slow", index=20, seed=7)
    assert not out.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for the child process")
def test_terminated_stage_leaves_no_child(tmp_path):
    out = tmp_path / "slow.trees.batch"
    process = start_simulating(SLOW, out)
    child = children_of(process.pid)[0]
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
    assert not out.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for the child process")
def test_child_of_a_killed_stage_publishes_nothing(tmp_path):
    """The stage is killed in its only simulation: its child ends with that, and leaves no file under the final name."""
    out = tmp_path / "slow.trees.batch"
    process = start_simulating(SLOW | {"population_size": 400_000}, out)
    child = children_of(process.pid)[0]
    process.kill()
    process.communicate(timeout=60)
    until = time.monotonic() + 120
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert not out.exists()


def test_specs_that_are_refused(tmp_path):
    good = {"name": "x", "kind": "constant", "population_size": 100, "sequence_length": 1000, "individuals": 1}
    for spec, message in (
        (good | {"population_size": [100, 200]}, "must be one variant, not a sweep"),
        (good | {"kind": []}, "must be a variant with a name and a kind"),
        (good | {"name": 5}, "must be a variant with a name and a kind"),
        ({"name": "x", "kind": "demes", "demography": "no.yaml", "samples": {"a": 1}, "mutation_rate": 0.1,
          "recombination_rate": 0}, "there is no file"),
    ):  # fmt: skip
        arguments = ["--spec", json.dumps(spec), "--count", 1, "--out", tmp_path / "x.batch"]
        refused = run_python("-m", "cxt.simulate", *arguments, check=False)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.batch", tmp_path):
        arguments = ["--spec", json.dumps(good), "--count", 1, "--out", out]
        refused = run_python("-m", "cxt.simulate", *arguments, check=False)
        assert refused.returncode == 2
        assert "cannot be written" in refused.stderr


def test_exception_says_how_to_reproduce(tmp_path):
    """A population so large that msprime gives up: its error, the simulation, and a command that repeats it."""
    spec = {
        "name": "huge", "kind": "constant", "population_size": 1e308, "individuals": 2, "sequence_length": 1000,
        "mutation_rate": 1e-8, "recombination_rate": 1e-8,
    }  # fmt: skip
    out = tmp_path / "huge.trees.batch"
    arguments = ["--spec", json.dumps(spec), "--start", 5, "--count", 3, "--seed", 9, "--out", out]
    done = run_python("-m", "cxt.simulate", *arguments, check=False)
    assert done.returncode == 1
    command = reproduces(done.stderr, name="huge", index=5, seed=9)
    again = run_python(*command[1:-2], "--out", tmp_path / "one.trees.batch", check=False)
    assert again.returncode == 1
    assert "simulation 5 of 'huge'" in again.stderr
    assert not out.exists()


def test_one_simulation_reproduced_alone(tmp_path):
    spec = list_variants("constant", constant_scenario())[0].spec
    write_batch(tmp_path / "all", spec, start=10, count=5, seed=3)
    write_batch(tmp_path / "one", spec, start=13, count=1, seed=3)
    alone = next(read_batch(tmp_path / "one", start=13, count=1))
    assert list(read_batch(tmp_path / "all", start=10, count=5))[3].tables.equals(alone.tables, ignore_provenance=True)


def test_trees_takes_one_out(tmp_path):
    spec = list_variants("constant", constant_scenario())[0].spec
    batch, out = tmp_path / "b.trees.batch", tmp_path / "x" / "one.trees"
    write_batch(batch, spec, start=10, count=3, seed=1)
    done = run_python("-m", "cxt.commands.trees", batch, "--index", 11, "--out", out)
    assert "simulation 11 of 'constant'" in done.stdout
    assert tskit.load(out).tables.equals(simulate_tree_sequence(spec, index=11, seed=1).tables, ignore_provenance=True)
    damaged, foreign = tmp_path / "cut", tmp_path / "foreign"
    damaged.write_bytes(batch.read_bytes()[:-1000])
    foreign.write_text("no trees")
    plain = tmp_path / "plain.trees"
    tables = tskit.load(out).dump_tables()
    tables.metadata_schema = tskit.MetadataSchema.null()
    tables.metadata = b""
    tables.dump(plain)
    for arguments, message in (
        ([batch, "--index", 13], "does not contain simulation 13; its indices: 10 to 12"),
        ([damaged, "--index", 12], "damaged after 2 tree sequences"),
        ([foreign, "--index", 0], "is not a simulation batch"),
        ([plain, "--index", 0], "has no cxt identity"),
        ([tmp_path / "none", "--index", 0], "cannot be read: No such file"),
    ):
        refused = run_python("-m", "cxt.commands.trees", *arguments, "--out", tmp_path / "no.trees", check=False)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (tmp_path / "no.trees").exists()
    before = batch.read_bytes()
    plain.write_bytes(before)
    for over in (batch, plain):  # a batch is never written over
        refused = run_python("-m", "cxt.commands.trees", over, "--index", 11, "--out", over, check=False)
        assert refused.returncode == 2
        assert "is a simulation batch; choose another name" in refused.stderr
    assert batch.read_bytes() == plain.read_bytes() == before


def test_regions_by_hand(tmp_path):
    """Three regions of each simulation: each is the definition applied to that stretch alone, with pairs of its own."""
    entry = constant_scenario(sequence_length=70_000, simulations=20)
    one = build_dataset(tmp_path / "one", entry=entry, regions_per_simulation=1)
    three = build_dataset(tmp_path / "three", entry=entry, regions_per_simulation=3)
    manifest = read_manifest(three)
    assert manifest["splits"]["train"]["simulations"] == 18
    assert manifest["splits"]["train"]["items"] == 18 * 3 * 6
    items, first = cxt.PairDataset(three, "train"), cxt.PairDataset(one, "train")
    assert len(items) == 3 * len(first)
    assert {items.start(i) for i in range(len(items))} == {0, 23_333, 46_666}
    spec = list_variants("constant", entry)[0].spec
    chosen = {}
    for i in range(0, len(items), 7):
        _, index, pair = items.describe(i)
        start = items.start(i)
        chosen.setdefault((index, start), set()).add(pair)
        ts = simulate_tree_sequence(spec, index=index, seed=1)
        stretch = ts.keep_intervals([[start, start + 20_000]]).trim()
        truth = pair_log_tmrca(stretch, np.array([pair]), window_size=1000, sequence_length=20_000)[0]
        np.testing.assert_array_equal(items[i][1], Grid().tokens(truth.astype(np.float32)))
        counts = np.expm1(items[i][0].numpy()).round()
        expected = cxt.pair_features(
            stretch.genotype_matrix(),
            stretch.sites_position,
            np.array([pair]),
            window_size=1000,
            sequence_length=20_000,
            scales=[2, 4],
        )[0]
        np.testing.assert_array_equal(counts[..., 1:], np.asarray(expected)[..., 1:])
    # The first region is what one region would be, pairs included.
    arrays, _ = read_shard(three / "train/constant-0.zarr.zip")
    alone, _ = read_shard(one / "train/constant-0.zarr.zip")
    at_zero = arrays["start"] == 0
    np.testing.assert_array_equal(arrays["pairs"][at_zero], alone["pairs"])
    np.testing.assert_array_equal(arrays["log_tmrca"][at_zero], alone["log_tmrca"])
    assert not np.array_equal(arrays["pairs"][0], arrays["pairs"][1])


def test_regions_have_their_own_mask(tmp_path):
    mask = np.random.default_rng(1).random(300_000) < 0.3
    entry = constant_scenario(sequence_length=70_000, simulations=20)
    dataset = build_dataset(tmp_path, entry=entry, mask=mask, regions_per_simulation=2)
    arrays, _ = read_shard(dataset / "train/constant-0.zarr.zip")
    assert len(np.unique(arrays["mask_offset"])) > len(arrays["mask_offset"]) / 2
    assert set(arrays["start"]) == {0, 35_000}


def test_regions_that_do_not_fit():
    assert [compute_region_start(r, regions=4, length=100.0) for r in range(4)] == [0, 25, 50, 75]
    ts = simulate_tree_sequence(list_variants("constant", constant_scenario())[0].spec, index=0, seed=1)
    spec = {
        "window_size": 1000,
        "sequence_length": 15_000,
        "samples": 20,
        "pairs": 3,
        "scales": [2],
        "regions_per_simulation": 2,
    }
    with pytest.raises(BadRequest, match="15000 bp requested from 10000 on; the tree sequence has only 20000 bp"):
        preprocess_simulation(ts, spec, region=1)
