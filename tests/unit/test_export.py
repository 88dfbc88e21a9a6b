"""Looking at a dataset from outside: with zarr alone, with info, verify and export; damage is named before anything starts."""

import contextlib
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from helpers.repository import GOLDEN, REPOSITORY, run_python
from helpers.simulations import build_dataset, constant_scenario, damage_shard

from cxt import PairDataset, pair_features
from cxt.data.export import describe_dataset, export_dataset, verify_dataset
from cxt.data.manifest import read_manifest, write_manifest
from cxt.data.preprocessing import preprocess_simulation
from cxt.data.shards import read_shard, write_shard
from cxt.errors import BadRequest


def test_the_snippet_in_the_documentation(dataset, tmp_path):
    """docs/reference/format.md, word for word, in a directory where the dataset has its usual place."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/reference/format.md").read_text(), flags=re.DOTALL)
    assert "cxt" not in snippet
    assert len([line for line in snippet.splitlines() if line and not line.startswith("import")]) <= 10
    shutil.copytree(dataset, tmp_path / "results/datasets/processed")
    code = snippet + "\nnp.savez('out.npz', genotypes=genotypes, positions=positions, pairs=pairs, log_tmrca=log_tmrca)"
    run_python("-c", code, cwd=tmp_path)
    arrays = np.load(tmp_path / "out.npz")
    items = PairDataset(dataset, "train")
    assert [tuple(pair) for pair in arrays["pairs"].tolist()] == [items.describe(i).pair for i in range(6)]
    expected = pair_features(
        arrays["genotypes"], arrays["positions"], arrays["pairs"], window_size=1000, sequence_length=20_000, scales=(2, 4)
    )
    assert np.array_equal(items.batch(range(6)).counts.numpy(), expected)
    assert np.array_equal(items.grid.tokens(arrays["log_tmrca"]), items.batch(range(6)).tokens.numpy())


def test_arrays_and_attributes_are_those_of_the_documentation(dataset, masked_dataset):
    text = (REPOSITORY / "docs/reference/format.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| .*? \| (\w+) \|", text, flags=re.MULTILINE))
    for directory, missing in ((dataset, False), (masked_dataset, True)):
        arrays, attributes = read_shard(directory / "train/constant-0.zarr.zip")
        expected = {name: dtype for name, dtype in documented.items() if missing or not name.startswith("mask")}
        assert {name: array.dtype.name for name, array in arrays.items()} == expected
        assert all(f"`{key}`" in text for key in attributes)
        manifest = read_manifest(directory)
        assert all(
            f"`{key}`" in text for key in [*manifest, *manifest["splits"]["train"], *manifest["splits"]["train"]["shards"][0]]
        )
        assert f"version {manifest['schema_version']}" in text


def test_info(dataset):
    text = describe_dataset(dataset)
    assert re.search(r"constant +train +18 +108 ", text)
    assert re.search(r"all +test +2 +12 ", text)
    assert run_python("-m", "cxt.commands.dataset", "info", dataset).stdout == text + "\n"


DAMAGE = {
    "flip": r"copy/test/constant-0\.zarr\.zip is not the one that dataset\.json lists \(its checksum differs\): it is damaged",
    "missing": r"copy/test/constant-0\.zarr\.zip cannot be read: No such file or directory; delete it and the",
    "another dataset": r"copy/test/constant-0\.zarr\.zip is not the one that dataset\.json lists",
    "newer": "copy/dataset.json has schema version 5, but this cxt reads version 4; update cxt",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_at_start(copy, masked_dataset, tmp_path, damage):
    verify_dataset(copy)
    if damage == "newer":
        text = (copy / "dataset.json").read_text()
        (copy / "dataset.json").write_text(text.replace('"schema_version": 4', '"schema_version": 5'))
    else:
        damage_shard(copy / "test/constant-0.zarr.zip", damage, other=masked_dataset)
    words = "--layers 1 --heads 2 --width 32 --batch-size 8 --devices 0 --threads 1 --run-dir"
    for command in (["dataset", "verify", copy], ["train", "--dataset-path", copy, *words.split(), tmp_path / "run"]):
        done = run_python("-m", "cxt", *command, check=False)
        assert done.returncode == 2
        assert re.search(DAMAGE[damage], done.stderr)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_finished_run_stays_where_it_is_if_the_new_data_are_bad(copy, tmp_path):
    words = "--layers 1 --heads 2 --width 32 --batch-size 8 --grad-accum 2 --devices 0 --threads 1 --max-steps 2 --epochs 1"
    command = ["-m", "cxt.train", "--dataset-path", copy, *words.split(), "--run-dir", tmp_path / "run"]
    run_python(*command)
    text = (copy / "dataset.json").read_text()
    sha256 = json.loads(text)["splits"]["train"]["shards"][0]["sha256"]
    (copy / "dataset.json").write_text(text.replace(sha256, sha256[::-1]))
    done = run_python(*command, check=False)
    assert done.returncode == 2
    assert "is not the one that dataset.json lists" in done.stderr
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run", "run.lock"]
    (copy / "dataset.json").write_text(text)
    assert "is finished: publishing its checkpoint again" in run_python(*command, "--out", tmp_path / "x.ckpt").stdout
    for more, message in (
        (["--out", tmp_path / "x.ckpt/y"], "cannot be written"),
        (["--run-dir", tmp_path / "x.ckpt/y"], "cannot be written"),
        (["--seed", -1], "seed must be a non-negative integer, got -1"),
    ):
        done = run_python(*command, *more, check=False)
        assert done.returncode == 2
        assert message in done.stderr
    (tmp_path / "run/run.json").write_text("")
    done = run_python(*command, check=False)
    assert done.returncode == 2
    assert "run.json is damaged" in done.stderr


def test_any_flipped_byte_is_found(copy):
    rng = np.random.default_rng(1)
    shard = copy / "train/constant-0.zarr.zip"
    whole = shard.read_bytes()
    for place in rng.choice(len(whole), 40, replace=False):
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        shard.write_bytes(data)
        with pytest.raises(BadRequest, match=r"train/constant-0\.zarr\.zip"):
            verify_dataset(copy)


@pytest.mark.long
@pytest.mark.slow
def test_damaged_headers_of_the_archive(copy):
    """Also where no checksum is known yet: every byte of the zip's own records, in every bit."""
    shard = copy / "train/constant-0.zarr.zip"
    whole = shard.read_bytes()
    places = [*range(60), *range(len(whole) - 120, len(whole))]
    for place in places:
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            shard.write_bytes(data)
            with pytest.raises(BadRequest, match=r"train/constant-0\.zarr\.zip"):
                read_shard(shard, sha256=hashlib.sha256(whole).hexdigest())
            with contextlib.suppress(BadRequest):  # what is of no account may also differ
                read_shard(shard)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "damaged"), (b"\xff", "damaged"), (b"[]", "a value is of the wrong type"), (b"{}", "it has no 'window_size'"),
        (b'{"schema_version": 4}', "it has no 'window_size'"), ("splits", "a value is of the wrong type"),
        ("items", "it has no 'items'"), ("windows", "windows 7 is not"), ("twice", "a shard of train is listed twice"),
        ("outside", "the entry of train/constant-0"), ("away", "../x is not a shard of train"), ("sum", "the items of train"),
        ("scales", "a size is not a whole number from 1 to"), ("missing", "`missing` or `schema_version`"),
    ],
)  # fmt: skip
def test_damaged_manifests(copy, text, message):
    manifest = json.loads((copy / "dataset.json").read_text())
    part = manifest["splits"]["train"]
    if text == "items":
        del part["shards"][0]["items"]
    elif text == "twice":
        part |= {key: 2 * part[key] for key in ("simulations", "items", "sites", "bytes", "shards")}
    elif text == "outside":
        part["shards"][0]["scenario"] = "../../evil"
    elif text == "away":
        part["shards"][0]["path"] = "../x"
    elif text == "sum":
        part["items"] += 1
    else:
        change = {"splits": 3, "windows": 7, "scales": [0], "missing": "no"}
        manifest |= {key: change[key] for key in change if key == text}
    (copy / "dataset.json").write_bytes(text if isinstance(text, bytes) else json.dumps(manifest).encode())
    with pytest.raises(BadRequest, match=message):
        read_manifest(copy)


@pytest.mark.parametrize("key", ["items", "sites", "simulations"])
def test_a_manifest_that_counts_wrong(copy, key):
    manifest = json.loads((copy / "dataset.json").read_text())
    part = manifest["splits"]["train"]
    for counts in (part, part["shards"][0]):
        counts[key] += 12
    (copy / "dataset.json").write_text(json.dumps(manifest))
    for read in (verify_dataset, lambda directory: PairDataset(directory, "train")):
        with pytest.raises(
            BadRequest, match=rf"train/constant-0\.zarr\.zip does not match dataset\.json: {key} \d+ instead of"
        ):
            read(copy)


def test_a_training_shard_among_the_held_out(copy):
    shutil.copy(copy / "train/constant-0.zarr.zip", copy / "test/constant-0.zarr.zip")
    with pytest.raises(BadRequest, match=r"test/constant-0\.zarr\.zip belongs to train, not to test"):
        write_manifest(copy, {split: [f"{split}/constant-0.zarr.zip"] for split in ("train", "test")})


def test_verify_names_every_bad_shard(copy):
    for split in ("train", "test"):
        (copy / split / "constant-0.zarr.zip").unlink()
    with pytest.raises(BadRequest, match=r"(?s)train/constant-0.*test/constant-0"):
        verify_dataset(copy)


def test_a_shard_of_other_shape_under_its_own_checksum(copy, dataset_n10):
    """Whoever edits the manifest too is still told."""
    path = copy / "test/constant-0.zarr.zip"
    shutil.copy(dataset_n10 / "test/constant-0.zarr.zip", path)
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["splits"]["test"]["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "dataset.json").write_text(json.dumps(manifest))
    for read in (verify_dataset, lambda directory: PairDataset(directory, "test")):
        with pytest.raises(BadRequest, match="belongs to another dataset: samples 10 instead of 20"):
            read(copy)
    with pytest.raises(BadRequest, match="belongs to another dataset: samples 10 instead of 20"):
        write_manifest(copy, {split: [f"{split}/constant-0.zarr.zip"] for split in ("train", "test")})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_export(masked_dataset, tmp_path, dtype):
    assert export_dataset(masked_dataset, tmp_path / "out", dtype=dtype, limit=3) == 5
    items = PairDataset(masked_dataset, "train")
    for row in range(3):
        index = items.describe(6 * row).index
        directory = tmp_path / "out/train/constant" / f"ts_{index:08d}_i{index}"
        x, y, pairs = (np.load(directory / f"{name}.npy") for name in ("X", "y", "pairs"))
        batch = items.batch(range(6 * row, 6 * row + 6))
        assert (x.shape, y.shape, pairs.dtype, x.dtype) == ((6, 2, 2, 20, 20), (6, 20), np.int32, np.dtype(dtype))
        assert np.array_equal(x[..., 1:], batch.counts.numpy()[..., 1:])
        f = batch.missing.numpy()
        np.testing.assert_allclose(x[:, 0, :, :, 0], np.exp(f), rtol=1e-3)
        np.testing.assert_allclose(x[:, 1, :, :, 0], np.exp(1 - f), rtol=1e-3)
        assert [tuple(pair) for pair in pairs.tolist()] == [items.describe(6 * row + p).pair for p in range(6)]
        assert np.abs(items.grid.tokens(y)[:, 1:] - batch.tokens.numpy()[:, 1:]).max() <= 1
        meta = json.loads((directory / "meta.json").read_text())
        assert (meta["dtype"], meta["split"], meta["file_index"], meta["window_size"]) == (dtype, "train", index, 1000)
    with pytest.raises(BadRequest, match="already exists; choose a new directory"):
        export_dataset(masked_dataset, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_bad_exports(copy, tmp_path):
    assert export_dataset(copy, tmp_path / "twice", splits=["test", "test"]) == 2
    with pytest.raises(BadRequest, match="--limit must be positive, got 0"):
        export_dataset(copy, tmp_path / "x", limit=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="cannot be written"):
        export_dataset(copy, tmp_path / "file" / "x")
    (copy / "train/constant-0.zarr.zip").unlink()
    with pytest.raises(BadRequest, match="cannot be read"):
        export_dataset(copy, tmp_path / "x")
    manifest = write_manifest_of(copy, {"simulations": 0, "items": 0, "sites": 0, "bytes": 0, "shards": []})
    assert manifest["splits"]["test"]["shards"] == []
    with pytest.raises(BadRequest, match="no simulation in test; there is nothing to export"):
        export_dataset(copy, tmp_path / "x", splits=["test"])
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))


def write_manifest_of(directory, test):
    """The manifest of *directory* with another test split."""
    manifest = json.loads((directory / "dataset.json").read_text())
    manifest["splits"]["test"] = test
    (directory / "dataset.json").write_text(json.dumps(manifest))
    return manifest


def test_export_of_regions_and_too_little_space(tmp_path, monkeypatch):
    directory = build_dataset(tmp_path / "data", entry=constant_scenario(sequence_length=40_000), regions_per_simulation=2)
    done = run_python(
        "-m", "cxt.commands.dataset", "export", directory, "--out", tmp_path / "out", "--split", "test", "--limit", 1
    )
    assert "1 simulation, " in done.stderr
    assert sorted(path.name for path in (tmp_path / "out/test/constant").iterdir()) == ["ts_00000000_i0", "ts_00000000_i0_r1"]
    assert read_manifest(directory)["regions_per_simulation"] == 2
    monkeypatch.setattr("cxt.data.export.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(BadRequest, match="export fewer with --split or --limit"):
        export_dataset(directory, tmp_path / "more")


GOLDEN_IDENTITY = {
    "scenario": "golden", "index": 1, "seed": 1, "spec": {"name": "golden"}, "mutation_rate": 1e-8, "recombination_rate": 1e-8,
}  # fmt: skip


def golden_entry(monkeypatch, ts, features, *, name, window_size, length, samples=50, mask=None):
    """The golden simulation as it is preprocessed, with the golden pairs; also its spec and counts."""
    few = {"X": features["n10_X"], "pairs": features["n10_pairs"], "y": features["n10_y"]}
    many = {"X": features.get(f"X_{name}"), "pairs": features["pairs200"], "y": features.get(f"y_{name}")}
    chosen = few if samples == 10 else many
    pairs = chosen["pairs"][: len(chosen["X"])]
    tables = ts.dump_tables()
    tables.metadata_schema = type(tables.metadata_schema)({"codec": "json"})
    tables.metadata = {"cxt": GOLDEN_IDENTITY}
    monkeypatch.setattr("cxt.data.preprocessing.choose_pairs", lambda rng, **shape: pairs)
    if mask is not None:
        monkeypatch.setattr("cxt.data.preprocessing.cut_mask", lambda whole, **shape: (whole, 0))
    spec = {
        "window_size": window_size,
        "sequence_length": length,
        "samples": samples,
        "pairs": len(pairs),
        "scales": [2, 8, 32, 64],
    }
    return preprocess_simulation(tables.tree_sequence(), spec, mask=mask), spec, chosen


@pytest.mark.parametrize(
    ("name", "window_size", "length", "samples", "masked"),
    [
        ("w2000", 2000, 1_000_000, 50, False),
        ("w200", 200, 100_000, 50, False),
        ("n10", 2000, 1_000_000, 10, False),
        ("w200_mask", 200, 100_000, 50, True),
    ],
)
def test_golden_through_store_loader_and_export(monkeypatch, tmp_path, name, window_size, length, samples, masked):
    """The published code's features, bit for bit at bins ≥ 1, of what a dataset stores, its items, and its export."""
    import tskit

    features = dict(np.load(GOLDEN / "features.npz"))
    mask = features["mask"].astype(bool) if masked else None
    entry, spec, chosen = golden_entry(
        monkeypatch, tskit.load(GOLDEN / "constant.trees"), features,
        name=name, window_size=window_size, length=length, samples=samples, mask=mask,
    )  # fmt: skip
    attributes = spec | {"missing": masked, "regions_per_simulation": 1, "scenario": "golden", "split": "train", "seed": 1}
    write_shard(tmp_path / "train/golden-0.zarr.zip", [entry], attributes)
    (tmp_path / "test").mkdir()
    write_manifest(tmp_path, {"train": ["train/golden-0.zarr.zip"], "test": []})
    expected = chosen["X"].astype(np.float32)
    batch = PairDataset(tmp_path, "train").batch(range(len(expected)))
    assert np.array_equal(batch.counts.numpy()[..., 1:], expected[..., 1:])
    if chosen["y"] is not None:
        assert np.array_equal(entry.log_tmrca.astype(np.float16), chosen["y"][: len(expected)])
    export_dataset(tmp_path, tmp_path / "out")
    (directory,) = (tmp_path / "out/train/golden").iterdir()
    x = np.load(directory / "X.npy")
    assert x.dtype == np.float16
    assert np.array_equal(x[..., 1:], chosen["X"][..., 1:])
    if masked:
        np.testing.assert_allclose(x[..., 0], chosen["X"][..., 0], atol=1e-3)
    elif chosen["y"] is not None:
        assert np.array_equal(np.load(directory / "y.npy"), chosen["y"][: len(expected)])


def test_golden_on_the_fly(monkeypatch):
    import tskit

    from cxt.data.simulated import SimulatedDataset, build_simulated_manifest

    features = dict(np.load(GOLDEN / "features.npz"))
    expected, pairs = features["X_w2000"], features["pairs200"]
    tables = tskit.load(GOLDEN / "constant.trees").dump_tables()
    tables.metadata_schema = type(tables.metadata_schema)({"codec": "json"})
    tables.metadata = {"cxt": GOLDEN_IDENTITY}
    ts = tables.tree_sequence()
    variant = {"name": "golden", "sequence_length": 1_000_000, "individuals": 25}
    manifest = build_simulated_manifest([variant], window_size=2000, samples=50, scales=(2, 8, 32, 64), held_out=1, examples=3)
    monkeypatch.setattr("cxt.data.simulated.simulate_tree_sequence", lambda *args, **kwargs: ts)
    for i in range(3):
        monkeypatch.setattr("cxt.data.preprocessing.choose_pairs", lambda rng, i=i, **shape: pairs[i : i + 1])
        counts = SimulatedDataset([variant], manifest, "train", seed=1).batch([i]).counts.numpy()
        assert np.array_equal(counts[0, ..., 1:], expected[i, ..., 1:].astype(np.int32))
