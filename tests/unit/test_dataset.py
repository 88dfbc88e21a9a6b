"""From tree sequences to shards, the manifest, and items; damaged files are named."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.repository import run_python
from helpers.simulations import build_dataset, constant_scenario, damage_shard

from cxt import PairDataset, pair_features, pair_log_tmrca
from cxt.config.variants import list_variants
from cxt.data.examples import compute_model_input
from cxt.data.grid import Grid
from cxt.data.manifest import plan_shards, read_manifest, write_manifest
from cxt.data.preprocessing import preprocess_batch, preprocess_simulation
from cxt.data.shards import read_shard
from cxt.errors import BadRequest
from cxt.scenarios.indices import simulation_batches
from cxt.scenarios.registry import simulate_tree_sequence

SPEC = list_variants("constant", constant_scenario())[0].spec


def expected_item(index, pair, *, samples=20, mask=None, **arguments):
    """X and y of one item by the public definitions, from the simulation itself."""
    arguments = {"window_size": 1000, "sequence_length": 20_000} | arguments
    ts = simulate_tree_sequence(SPEC, index=index, seed=1)
    ts = ts.simplify(ts.samples()[:samples])
    x = pair_features(ts.genotype_matrix(), ts.sites_position, [pair], mask=mask, scales=(2, 4), **arguments)
    y = pair_log_tmrca(ts, [pair], **arguments)
    return np.log1p(x[0]), Grid().tokens(y.astype(np.float32))[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_items_are_the_definitions(dataset, split):
    items = PairDataset(dataset, split)
    assert len(items) == {"train": 18 * 6, "test": 2 * 6}[split]
    seen = set()
    for i in range(0, len(items), 5):
        scenario, index, pair = items.describe(i)
        assert scenario == "constant"
        assert (index % 10 == 0) == (split == "test")
        x, y = items[i]
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert (tuple(x.shape), tuple(y.shape)) == ((2, 2, 20, 20), (21,))
        expected_x, expected_y = expected_item(index, pair)
        np.testing.assert_allclose(x.numpy(), expected_x, rtol=1e-6)
        assert np.array_equal(y.numpy(), expected_y)
        seen.add((index, pair))
    assert len(seen) == len(range(0, len(items), 5))
    assert torch.equal(items[-1][0], items[len(items) - 1][0])
    with pytest.raises(IndexError):
        items[len(items)]


def test_ten_samples_by_simplification(dataset_n10):
    items = PairDataset(dataset_n10, "train")
    _, index, pair = items.describe(7)
    x, y = items[7]
    expected_x, expected_y = expected_item(index, pair, samples=10)
    np.testing.assert_allclose(x.numpy(), expected_x, rtol=1e-6)
    assert np.array_equal(y.numpy(), expected_y)


def test_missingness(masked_dataset):
    mask = np.random.default_rng(1).random(50_000) < 0.3
    arrays, _ = read_shard(masked_dataset / "train" / "constant-0.zarr.zip")
    items = PairDataset(masked_dataset, "train")
    for i in (0, 50, 107):
        _, index, pair = items.describe(i)
        offset = arrays["mask_offset"][list(arrays["index"]).index(index)]
        x, _ = items[i]
        expected_x, _ = expected_item(index, pair, mask=mask[offset : offset + 20_000])
        np.testing.assert_allclose(x.numpy(), expected_x, rtol=1e-5)
    assert len(set(arrays["mask_offset"].tolist())) > 10


def test_batches_equal_items(masked_dataset):
    items = PairDataset(masked_dataset, "train")
    batch = items.batch([3, 90, 41])
    x = compute_model_input(batch.counts, batch.missing)
    assert batch.counts.dtype == torch.int16
    for row, i in enumerate((3, 90, 41)):
        torch.testing.assert_close(x[row], items[i][0])
        assert torch.equal(batch.tokens[row], items[i][1])


def test_pairs_and_targets_do_not_depend_on_the_dataset(dataset, masked_dataset):
    """Everything random is keyed on the simulation: the same pairs, whatever else the dataset asks for."""
    plain, masked = PairDataset(dataset, "train"), PairDataset(masked_dataset, "train")
    assert [plain.describe(i) for i in range(30)] == [masked.describe(i) for i in range(30)]
    assert torch.equal(plain[4][1], masked[4][1])


def test_same_seed_same_bytes(dataset, tmp_path):
    build_dataset(tmp_path / "again")
    build_dataset(tmp_path / "other", seed=2)
    for name in ("train/constant-0.zarr.zip", "test/constant-0.zarr.zip", "dataset.json"):
        assert (dataset / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (dataset / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_batching_does_not_change_simulations(dataset, tmp_path):
    """The 15th simulation is the same whether its batch begins at 0 or at 10."""
    from cxt.scenarios.batches import write_batch

    write_batch(tmp_path / "batch", SPEC, start=10, count=10, seed=1)
    spec = {"window_size": 1000, "sequence_length": 20_000, "samples": 20, "pairs": 6, "scales": [2, 4]}
    preprocess_batch({"train": tmp_path / "x.zarr.zip"}, tmp_path / "batch", spec, start=10, count=10)
    part, _ = read_shard(tmp_path / "x.zarr.zip")
    whole, _ = read_shard(dataset / "train" / "constant-0.zarr.zip")
    assert part["index"].tolist() == list(range(11, 20))
    assert np.array_equal(part["log_tmrca"], whole["log_tmrca"][9:])
    assert np.array_equal(part["pairs"], whole["pairs"][9:])


def test_manifest(dataset):
    manifest = read_manifest(dataset)
    assert (manifest["windows"], manifest["samples"], manifest["missing"]) == (20, 20, False)
    assert manifest["splits"]["train"]["items"] == 108
    assert "constant" in json.dumps(manifest)
    assert all(word not in json.dumps(manifest) for word in ("lineage", "time"))


def test_planned_shards():
    """A batch of one simulation, which would hold no training simulation, joins the one before."""
    planned = plan_shards({"a": (21, 10), "b": (5, 100), "c": (12, 10), "d": (0, 10)})
    names = ["a-0", "a-10", "b-0", "c-0", "c-10"]
    assert planned == {split: [f"{split}/{name}.zarr.zip" for name in names] for split in ("train", "test")}
    assert simulation_batches(simulations=21, batch=10) == [(0, 10), (10, 11)]
    assert simulation_batches(simulations=1, batch=10, start=70) == [(70, 1)]
    assert simulation_batches(simulations=0, batch=10) == []


def test_simulation_without_sites(tmp_path):
    entry = constant_scenario(mutation_rate=1e-15)
    directory = build_dataset(tmp_path, entry=entry)
    items = PairDataset(directory, "train")
    x, y = items[5]
    assert not x.any()
    assert (y[1:] >= 2).all()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "another dataset"])
def test_damaged_shards_are_named(copy, damage, masked_dataset):
    damage_shard(copy / "train/constant-0.zarr.zip", damage, other=masked_dataset)
    with pytest.raises(BadRequest, match=r"train/constant-0\.zarr\.zip"):
        PairDataset(copy, "train")
    if damage != "flip":
        with pytest.raises(BadRequest, match=r"constant-0\.zarr\.zip"):
            write_manifest(copy, {s: [f"{s}/constant-0.zarr.zip"] for s in ("train", "test")})


def test_bad_directories(copy, tmp_path):
    with pytest.raises(BadRequest, match="no dataset directory"):
        PairDataset(tmp_path / "nowhere", "train")
    with pytest.raises(BadRequest, match="split must be one of train, test, got 'val'"):
        PairDataset(copy, "val")
    with pytest.raises(BadRequest, match="copy/train is one of the two splits of a dataset; give the dataset, .*/copy$"):
        PairDataset(copy / "train", "train")
    shutil.move(copy / "test", tmp_path / "elsewhere")
    with pytest.raises(BadRequest, match=r"has no test/ \(found: batch, dataset.json, train\)"):
        PairDataset(copy, "train")
    shutil.move(tmp_path / "elsewhere", copy / "test")
    manifest = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(BadRequest, match="schema version 99, but this cxt reads"):
        PairDataset(copy, "train")
    (copy / "dataset.json").unlink()
    with pytest.raises(BadRequest, match=r"has no dataset.json"):
        PairDataset(copy, "train")


@pytest.mark.parametrize("key", ["recombination_rate", "mutation_rate", "seed"])
def test_a_batch_of_an_older_version(tmp_path, key):
    tables = simulate_tree_sequence(SPEC, index=0, seed=1).dump_tables()
    tables.metadata = {"cxt": {name: value for name, value in tables.metadata["cxt"].items() if name != key}}
    tables.dump(tmp_path / "batch")
    spec = {"window_size": 1000, "sequence_length": 20_000, "samples": 20, "pairs": 6, "scales": [2, 4]}
    with pytest.raises(
        BadRequest, match=f"tree sequence 0 has no {key} in its metadata, perhaps written by an older cxt; delete "
    ):
        preprocess_batch({"test": tmp_path / "x.zarr.zip"}, tmp_path / "batch", spec, start=0, count=1)


def test_too_many_pairs_and_too_few_samples():
    ts = simulate_tree_sequence(SPEC, index=1, seed=1)
    spec = {"window_size": 1000, "sequence_length": 20_000, "samples": 10, "pairs": 46}
    with pytest.raises(BadRequest, match="46 pairs requested, but 10 samples have only 45"):
        preprocess_simulation(ts, spec)
    with pytest.raises(BadRequest, match="60 samples requested, but the tree sequence has only 20"):
        preprocess_simulation(ts, spec | {"samples": 60})
    with pytest.raises(BadRequest, match="mask is 15000 bp long, shorter than the sequence of 20000 bp"):
        preprocess_simulation(ts, spec | {"pairs": 3}, mask=np.zeros(15_000, bool))


def test_all_pairs_are_possible():
    ts = simulate_tree_sequence(SPEC, index=1, seed=1)
    entry = preprocess_simulation(ts, {"window_size": 1000, "sequence_length": 20_000, "samples": 10, "pairs": 45})
    assert len({tuple(pair) for pair in entry.pairs}) == 45


@pytest.mark.slow
def test_commands(tmp_path, dataset):
    """By hand as by the functions: the same bytes."""
    batch = dataset / "batch"
    spec = json.dumps({"window_size": 1000, "sequence_length": 20_000, "samples": 20, "pairs": 6, "scales": [2, 4]})
    run_python(
        "-m", "cxt.preprocess", "shard", "--batch", batch, "--start", 0, "--count", 20, "--spec", spec,
        "--train", tmp_path / "d/train/constant-0.zarr.zip", "--test", tmp_path / "d/test/constant-0.zarr.zip",
    )  # fmt: skip
    run_python("-m", "cxt.preprocess", "manifest", "--dataset", tmp_path / "d")
    for name in ("train/constant-0.zarr.zip", "dataset.json"):
        assert (tmp_path / "d" / name).read_bytes() == (dataset / name).read_bytes()
    batch_copy = tmp_path / "cut"
    batch_copy.write_bytes(batch.read_bytes()[:-1000])
    done = run_python(
        "-m", "cxt.preprocess", "shard", "--batch", batch_copy, "--start", 0, "--count", 20,
        "--spec", spec, "--test", tmp_path / "no.zarr.zip", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "damaged or truncated at tree sequence 19 of 20" in done.stderr
    for change, message in (
        (["--scenario", "other"], "must be simulation 0 of 'other'"),
        (["--seed", 7], "must be 7, got 1"),
        (["--spec", '{"windowsize": 10}'], "--spec.windowsize: unknown key; did you mean 'window_size'"),
    ):
        done = run_python(
            "-m", "cxt.preprocess", "shard", "--batch", batch, "--start", 0, "--count", 20,
            "--spec", spec, "--test", tmp_path / "no.zarr.zip", *change, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "no.zarr.zip").exists()
