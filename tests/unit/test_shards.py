"""Shards and manifests that claim what cannot be, or hold what preprocessing never makes: refused before they are used."""

import json
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
import zarr
from helpers.simulations import build_dataset, constant_scenario
from zarr.codecs import GzipCodec, ZstdCodec
from zarr.storage import MemoryStore

from cxt import PairDataset
from cxt.data.export import describe_dataset, export_dataset, verify_dataset
from cxt.data.manifest import read_manifest, write_manifest
from cxt.data.shards import read_shard
from cxt.errors import BadRequest
from cxt.scenarios.batches import read_simulation

SPLITS = ("train", "test")
SHARD = "train/constant-0.zarr.zip"


def entries_of(arrays, attributes, **settings) -> dict[str, bytes]:
    """The entries of a shard of any arrays and attributes, each array one chunk."""
    content: dict = {}
    group = zarr.open_group(MemoryStore(content), mode="w", zarr_format=3)
    group.attrs.update(attributes)
    for name, array in arrays.items():
        chunks = tuple(max(1, n) for n in array.shape)
        stored = group.create_array(name, shape=array.shape, dtype=array.dtype, **({"chunks": chunks} | settings))
        stored[...] = array
    return {key: buffer.to_bytes() for key, buffer in content.items()}


def write_entries(path, entries, *, deflated=()) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for key, data in entries.items():
            archive.writestr(key, data, zipfile.ZIP_DEFLATED if key in deflated else zipfile.ZIP_STORED)


def refused(directory, message) -> None:
    """The training shard is refused by its reader, and dataset.json is not written anew."""
    with pytest.raises(BadRequest, match=rf"train/constant-0\.zarr\.zip is damaged or truncated: .*{message}"):
        read_shard(directory / SHARD)
    before = (directory / "dataset.json").read_bytes()
    with pytest.raises(BadRequest, match=message):
        write_manifest(directory, {split: [f"{split}/constant-0.zarr.zip"] for split in SPLITS})
    assert (directory / "dataset.json").read_bytes() == before
    for read in (verify_dataset, lambda path: PairDataset(path, "train")):
        with pytest.raises(BadRequest, match=r"train/constant-0\.zarr\.zip is not the one that dataset\.json lists"):
            read(directory)


def put(name, place, value):
    def change(arrays, attributes):
        arrays[name][place] = value

    return change


def cast(name, dtype):
    return lambda arrays, attributes: arrays.update({name: arrays[name].astype(dtype)})


def cut(name, axis):
    return lambda arrays, attributes: arrays.update({name: np.delete(arrays[name], -1, axis=axis)})


def lost(name):
    return lambda arrays, attributes: arrays.pop(name)


def said(**changes):
    return lambda arrays, attributes: attributes.update(changes)


def unsaid(key):
    return lambda arrays, attributes: attributes.pop(key)


def swap_positions(arrays, attributes):
    arrays["positions"][[3, 4]] = arrays["positions"][[4, 3]]


CONTENT = {
    "padding bits of a genotype": (put("genotypes", (5, -1), 0b1111_0001), "genotypes have bits beyond the 20 samples"),
    "a site that nobody carries": (put("genotypes", 5, 0), "sites at which the samples do not differ"),
    "a site that everybody carries": (put("genotypes", 5, (255, 255, 15)), "sites at which the samples do not differ"),
    "a pair out of range": (put("pairs", (2, 3), (1, 20)), r"must be two different haplotypes from 0 to 19, got \(1, 20\)"),
    "a pair far out of range": (put("pairs", (2, 3), (65535, 0)), r"got \(65535, 0\)"),
    "a pair of one haplotype": (put("pairs", (2, 3), (7, 7)), r"pairs must be two different haplotypes .*, got \(7, 7\)"),
    "a position that is no number": (put("positions", 3, np.nan), "a site at nan, outside its 20000 bp"),
    "an infinite position": (put("positions", 3, np.inf), "a site at inf, outside its 20000 bp"),
    "a negative position": (put("positions", 0, -1.0), "a site at -1.0, outside its 20000 bp"),
    "a position at the end": (put("positions", -1, 20_000.0), "a site at 20000.0, outside its 20000 bp"),
    "a position beyond the end": (put("positions", -1, 1e300), r"a site at 1e\+300, outside its 20000 bp"),
    "positions that fall": (swap_positions, "its positions do not rise"),
    "offsets that do not start at 0": (put("site_offsets", 0, 1), "site_offsets do not rise from 0"),
    "offsets that fall": (put("site_offsets", 2, -5), "site_offsets do not rise from 0"),
    "offsets beyond the sites": (put("site_offsets", -1, 10**9), "site_offsets do not rise from 0"),
    "targets that are not finite": (put("log_tmrca", (1, 1, 1), np.nan), "targets that are not finite"),
    "another split's simulation": (put("index", 0, 10), "simulation 10, which does not belong to train"),
    "a simulation twice": (put("index", 1, 1), "2 regions of simulation 1"),
    "a negative index": (put("index", 0, -1), "its index must be from 0 to .*, got -1"),
    "a huge start": (put("start", 0, 2**62), "its start must be from 0 to .*, got 4611686018427387904"),
    "a negative rate": (put("mutation_rate", 0, -1e-8), "its mutation_rate has a value that is not a rate"),
    "a rate that is no number": (put("mutation_rate", 0, np.nan), "its mutation_rate has a value that is not a rate"),
    "a rate that is infinite": (put("recombination_rate", 0, np.inf), "its recombination_rate has a value that is not a rate"),
    "genotypes of another width": (cut("genotypes", 1), r"array genotypes must be uint8 \(\d+, 3\), got uint8 \(\d+, 2\)"),
    "fewer genotypes": (cut("genotypes", 0), "array genotypes must be"),
    "fewer positions": (cut("positions", 0), "array genotypes must be"),
    "fewer offsets": (cut("site_offsets", 0), r"array site_offsets must be int64 \(19,\), got int64 \(18,\)"),
    "fewer pairs": (cut("pairs", 1), r"array pairs must be uint16 \(18, 6, 2\), got uint16 \(18, 5, 2\)"),
    "pairs of one": (cut("pairs", 2), r"array pairs must be .*, got uint16 \(18, 6, 1\)"),
    "fewer windows": (cut("log_tmrca", 2), r"array log_tmrca must be .*, got float32 \(18, 6, 19\)"),
    "fewer rates": (cut("mutation_rate", 0), r"array mutation_rate must be .*, got float64 \(17,\)"),
    "positions of float32": (cast("positions", "float32"), "array positions must be float64 .* got float32"),
    "signed genotypes": (cast("genotypes", "int8"), "array genotypes must be .*, got int8"),
    "complex targets": (cast("log_tmrca", "complex64"), "array log_tmrca must be .*, got complex64"),
    "pairs of int64": (cast("pairs", "int64"), "array pairs must be .*, got int64"),
    "an offset of bool": (cast("site_offsets", "bool"), "array site_offsets must be .*, got bool"),
    "an array more": (lambda arrays, attributes: arrays.update(more=np.ones(3)), "more should not be there, or is missing"),
    "a mask that is not announced": (lambda a, _: a.update(mask=np.ones((18, 2500), "uint8")), "mask should not be there"),
    "a mask that is not there": (said(missing=True), "mask, mask_offset should not be there, or is missing"),
    **{
        f"no {name}": (lost(name), f"no array {name}|{name} should not be there, or is missing")
        for name in ("genotypes", "positions", "site_offsets", "pairs", "log_tmrca", "index", "start", "mutation_rate",
                     "recombination_rate")
    },
    "no windows": (said(window_size=0), "window_size must be a whole number from 1 to .*, got 0"),
    "windows that do not fill the length": (said(window_size=999), "20000 is not a multiple of its window_size"),
    "a length of 4e18": (said(sequence_length=4 * 10**18), "sequence_length must be .*, got 4000000000000000000"),
    "a huge length that is allowed": (said(sequence_length=10**12), r"must be float32 \(18, 6, 1000000000\)"),
    "samples of text": (said(samples="20"), "samples must be .*, got '20'"),
    "more pairs than there are": (said(samples=3), "6 pairs cannot be taken from 3 samples"),
    "a scale of 0": (said(scales=[2, 0]), r"scales must be .*, got \[2, 0\]"),
    "no scales": (said(scales=[]), r"scales must be .*, got \[\]"),
    "missingness of text": (said(missing="no"), "its `missing` must be true or false, got 'no'"),
    "another split": (said(split="all"), "split 'all'"),
    "no seed": (unsaid("seed"), "its seed must be a whole number, got None"),
    "a lineage of numbers": (said(lineage=3), "its lineage is not text"),
    "a version of text": (said(schema_version="4"), "its schema version is '4'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENT)
def test_content(copy, case):
    change, message = CONTENT[case]
    arrays, attributes = read_shard(copy / SHARD)
    change(arrays, attributes)
    write_entries(copy / SHARD, entries_of(arrays, attributes))
    refused(copy, message)


def test_what_is_only_written_otherwise_is_read(copy):
    """The helpers of this file change nothing by themselves."""
    arrays, attributes = read_shard(copy / SHARD)
    write_entries(copy / SHARD, entries_of(arrays, attributes))
    again, _ = read_shard(copy / SHARD)
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
    write_manifest(copy, {split: [f"{split}/constant-0.zarr.zip"] for split in SPLITS})
    verify_dataset(copy)


def test_bits_beyond_the_end_of_a_mask(tmp_path):
    mask = np.random.default_rng(1).random(30_000) < 0.3
    entry = constant_scenario(simulations=12, batch=12, sequence_length=10_001)
    directory = build_dataset(tmp_path / "data", entry=entry, sequence_length=10_001, window_size=73, mask=mask)
    arrays, attributes = read_shard(directory / SHARD)
    arrays["mask"][0, -1] |= 0b10
    write_entries(directory / SHARD, entries_of(arrays, attributes))
    refused(directory, "mask has bits beyond its end")


def test_nothing_is_unpacked_of_a_compressed_entry(copy, monkeypatch):
    """A few hundred kilobytes that would become 200 MB."""
    arrays, attributes = read_shard(copy / SHARD)
    entries = entries_of(arrays, attributes)
    entries["log_tmrca/c/0/0/0"] = bytes(200_000_000)
    write_entries(copy / SHARD, entries, deflated=["log_tmrca/c/0/0/0"])
    assert (copy / SHARD).stat().st_size < 300_000
    (copy / "test/constant-0.zarr.zip").unlink()
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("an entry was read"))
    refused(copy, "entry log_tmrca/c/0/0/0 is compressed.*nothing was unpacked")


def test_entries_that_are_there_twice_or_larger_than_the_file(copy):
    arrays, attributes = read_shard(copy / SHARD)
    entries = entries_of(arrays, attributes)
    write_entries(copy / SHARD, entries)
    with zipfile.ZipFile(copy / SHARD, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("zarr.json", entries["zarr.json"])
    refused(copy, "it has two entries with the same name")
    with zipfile.ZipFile(copy / SHARD, "w") as archive:
        for key in entries:
            archive.writestr(key, entries[key])
        entry = archive.infolist()[0]
        entry.file_size = entry.compress_size = 10**9
    refused(copy, "its entries claim to be larger than the file")


@pytest.mark.parametrize("codec", ["gzip", "zstd twice", "none", "sharded"])
def test_chunks_that_unpack_into_any_size(copy, codec):
    """Only a single frame of zstd says beforehand what it unpacks into."""
    arrays, attributes = read_shard(copy / SHARD)
    settings = {
        "gzip": {"compressors": [GzipCodec()]},
        "zstd twice": {"compressors": [ZstdCodec(), ZstdCodec()]},
        "none": {"compressors": None},
    }
    if codec == "sharded":
        entries = entries_of(arrays, attributes) | {
            key: data
            for key, data in entries_of({"index": arrays["index"]}, attributes, chunks=(9,), shards=(18,)).items()
            if key.startswith("index")
        }
    else:
        entries = entries_of(arrays, attributes, **settings[codec])
    write_entries(copy / SHARD, entries)
    refused(copy, "is not stored as chunks of bytes, compressed once by zstd")


def test_more_chunks_than_entries(copy):
    """Twelve kilobytes of which reading would take minutes: a chunk that is not stored takes its time, too."""
    arrays, attributes = read_shard(copy / SHARD)
    arrays["site_offsets"][-1] = 10**6
    entries = entries_of(arrays, attributes)
    for name in ("positions", "genotypes"):
        about = json.loads(entries.pop(f"{name}/zarr.json"))
        about["shape"][0], about["chunk_grid"]["configuration"]["chunk_shape"][0], about["fill_value"] = 10**6, 1, 1
        entries = {key: data for key, data in entries.items() if not key.startswith(f"{name}/")}
        entries[f"{name}/zarr.json"] = json.dumps(about).encode()
    write_entries(copy / SHARD, entries)
    refused(copy, r"array genotypes must have at most \d\d chunks, got 1000000")


def test_targets_that_were_left_out(copy):
    """What is not stored is read as 0, as other arrays may rightly be."""
    with zipfile.ZipFile(copy / SHARD) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    del entries["log_tmrca/c/7/0/0"]
    write_entries(copy / SHARD, entries)
    refused(copy, "1 of 18 chunks of its targets are missing")


@pytest.mark.parametrize("masked", [False, True])
def test_scales_beyond_the_last_window(request, tmp_path, masked):
    """A window of any scale ends with the last one: the widest there can be is as wide as all, in time and memory, too."""
    source = request.getfixturevalue("masked_dataset" if masked else "dataset")
    items = []
    for scale in (20, 2**31):
        directory = shutil.copytree(source, tmp_path / str(scale))
        for split in SPLITS:
            shard = directory / split / "constant-0.zarr.zip"
            arrays, attributes = read_shard(shard)
            write_entries(shard, entries_of(arrays, attributes | {"scales": [2, scale]}))
        write_manifest(directory, {split: [f"{split}/constant-0.zarr.zip"] for split in SPLITS})
        items.append(PairDataset(directory, "train")[3][0])
        assert export_dataset(directory, tmp_path / f"out{scale}", splits=["test"], limit=1) == 1
    assert torch.equal(*items)
    exported = [np.load(next((tmp_path / f"out{scale}/test/constant").iterdir()) / "X.npy") for scale in (20, 2**31)]
    assert np.array_equal(*exported)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"\x28\xb5\x2f\xfd\xe0" + (2**62).to_bytes(8, "little"), f"must unpack into 144 bytes, but claims {2**62}"),
        (b"\x28\xb5\x2f\xfd\xa0" + (2**31).to_bytes(4, "little"), f"must unpack into 144 bytes, but claims {2**31}"),
        (b"\x28\xb5\x2f\xfd\x60" + (1000).to_bytes(2, "little"), "must unpack into 144 bytes, but claims 1256"),
        (b"\x28\xb5\x2f\xfd\x00\x58", "must unpack into 144 bytes, but claims -1"),
        (b"\x28\xb5\x2f\xfd", "a chunk is not a zstd frame"),
        (b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", "a chunk is not a zstd frame"),  # a skippable frame
        (b"", "a chunk is not a zstd frame"),
    ],
)
def test_a_frame_that_claims_another_size(copy, frame, message):
    arrays, attributes = read_shard(copy / SHARD)
    entries = entries_of(arrays, attributes) | {"index/c/0": frame + bytes(20) if len(frame) > 4 else frame}
    write_entries(copy / SHARD, entries)
    refused(copy, message)


@pytest.mark.parametrize("name", ["log_tmrca", "positions", "genotypes", "index"])
def test_a_declared_shape_of_4e18(copy, name):
    """Of an array with no chunk, whose entries are its zarr.json alone; nothing of that size is asked for."""
    arrays, attributes = read_shard(copy / SHARD)
    entries = {key: data for key, data in entries_of(arrays, attributes).items() if not key.startswith(f"{name}/c")}
    meta = json.loads(entries[f"{name}/zarr.json"])
    meta["shape"][0] = 4 * 10**18
    entries[f"{name}/zarr.json"] = json.dumps(meta).encode()
    write_entries(copy / SHARD, entries)
    tracemalloc.start()
    refused(copy, "400000000000000000[01]")
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


def test_arrays_that_agree_on_more_than_memory_holds(copy):
    """Every shape fits the others, the archive is small, and nothing is stored but how large it should be."""
    arrays, attributes = read_shard(copy / SHARD)
    entries = {key: data for key, data in entries_of(arrays, attributes).items() if key.endswith("zarr.json")}
    for name in arrays:
        if name not in ("genotypes", "positions"):
            meta = json.loads(entries[f"{name}/zarr.json"])
            meta["shape"][0] = 10**14 + (name == "site_offsets")
            entries[f"{name}/zarr.json"] = json.dumps(meta).encode()
    write_entries(copy / SHARD, entries)
    refused(copy, r"it claims to unpack into [\d,.]+ GB, but only [\d,.]+ GB are free")


def totals(manifest, split, key, value):
    manifest["splits"][split][key] = manifest["splits"][split]["shards"][0][key] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: totals(m, "train", "items", 4 * 10**18), "the items of train are not the sum over its shards"),
        (lambda m: totals(m, "train", "sites", 4 * 10**18), "the sites of train are not the sum over its shards"),
        (lambda m: totals(m, "train", "items", 6 * 10**12), "items (108 instead of )?6000000000000|do not fit into"),
        (lambda m: m["splits"]["train"]["shards"][0].update(scenario=[]), "is damaged: the entry of train/constant-0"),
        (lambda m: m.update(windows=4 * 10**18), "windows 4000000000000000000 is not"),
        (
            lambda m: m.update(windows=4 * 10**18, sequence_length=4 * 10**21),
            "a size is not a whole number from 1 to 1099511627776",
        ),
        (
            lambda m: m.update(windows=10**9, sequence_length=10**12),
            "sequence_length 20000 instead of 1000000000000|do not fit into",
        ),
    ],
)  # fmt: skip
def test_a_manifest_of_absurd_sizes(copy, tmp_path, change, message):
    manifest = json.loads((copy / "dataset.json").read_text())
    change(manifest)
    (copy / "dataset.json").write_text(json.dumps(manifest))
    for read in (verify_dataset, lambda path: PairDataset(path, "train")):
        with pytest.raises(BadRequest, match=message):
            read(copy)
    with pytest.raises(BadRequest):
        export_dataset(copy, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000])
def test_a_manifest_of_brackets_or_digits(copy, text):
    (copy / "dataset.json").write_text(text)
    for read in (read_manifest, describe_dataset, verify_dataset):
        with pytest.raises(BadRequest, match=r"dataset\.json is damaged"):
            read(copy)


@pytest.mark.parametrize("masked", [False, True])
def test_ranges_of_training_data(dataset, masked_dataset, masked):
    """Against tskit's own diversity, of the simulations themselves and the accessible bases."""
    directory = masked_dataset if masked else dataset
    mask = np.random.default_rng(1).random(50_000) < 0.3  # as that of `masked_dataset`
    arrays, _ = read_shard(directory / SHARD)
    offsets = dict(zip(arrays["index"].tolist(), arrays["mask_offset"].tolist(), strict=True)) if masked else {}
    expected: dict[str, list[float]] = {"diversity": [], "mutation_rate": [], "recombination_rate": [], "missingness": []}
    for index in range(20):
        ts = read_simulation(directory / "batch", index)
        about = ts.metadata["cxt"]
        assert about["index"] == index
        if index % 10 == 0:  # held out
            continue
        hidden = np.zeros(20_000, dtype=bool)
        if masked:
            hidden = mask[offsets[index] : offsets[index] + 20_000]
        unusable = [
            variant.site.id
            for variant in ts.variants()
            if hidden[int(variant.site.position)] or len(set(variant.genotypes)) != 2
        ]
        differences = ts.delete_sites(unusable).diversity(span_normalise=False)
        expected["diversity"].append(float(differences) / int((~hidden).sum()))
        expected["mutation_rate"].append(about["mutation_rate"])
        expected["recombination_rate"].append(about["recombination_rate"])
        expected["missingness"].append(float(hidden.mean()))
    ranges = read_manifest(directory)["ranges"]
    assert ranges.keys() == expected.keys()
    for name, values in expected.items():
        assert len(values) == 18
        np.testing.assert_allclose(ranges[name], [min(values), max(values)], rtol=1e-12)
    assert expected["diversity"][0] > 0
    assert ranges["missingness"] == [0, 0] if not masked else ranges["missingness"][0] > 0.2
