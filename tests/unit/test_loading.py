"""How items reach training: one copy of the data for all, whatever reads it; batches made ahead are the same batches."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.repository import run_python
from helpers.simulations import build_dataset, constant_scenario
from torch.utils.data import DataLoader

from cxt import PairDataset
from cxt.data import shared_memory as arena
from cxt.data.examples import compute_model_input
from cxt.data.grid import Grid
from cxt.data.kernels import find_lowest_bit, pack_bins, unpack_bins
from cxt.data.loaders import EpochBatchSampler, PrefetchLoader, SequentialBatchSampler
from cxt.data.pair_dataset import open_dataset
from cxt.data.shards import read_shard
from cxt.data.shared_memory import Arena, free_memory
from cxt.errors import BadRequest

on_linux = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks into /proc")


def sampler_of(items: PairDataset, **arguments) -> EpochBatchSampler:
    return EpochBatchSampler(**({"examples": len(items), "batch_size": 7, "seed": 3} | arguments))


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_threads_make_the_same_batches(masked_dataset, threads):
    items = PairDataset(masked_dataset, "train")
    expected = [items.batch(batch) for batch in sampler_of(items)]
    loader = PrefetchLoader(items, sampler_of(items), batch_size=7, threads=threads, pin=False)
    assert len(loader) == len(expected) == 15
    count = 0
    for batch, wanted in zip(loader, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[:4], wanted[:4], strict=True))
        count += 1
    assert count == 15


@pytest.mark.parametrize("threads", [0, 2])
def test_the_last_two_batches_stay_as_they_are(dataset, threads):
    """Buffers are used again, but not while the trainer may still look at them."""
    items = PairDataset(dataset, "train")
    given = []
    places = set()
    for batch, wanted in zip(
        PrefetchLoader(items, sampler_of(items), batch_size=7, threads=threads, pin=False), sampler_of(items), strict=True
    ):
        given.append((batch, wanted))
        places.add(batch.counts.data_ptr())
        for earlier, of_earlier in given[-2:]:
            assert torch.equal(earlier.counts, items.batch(of_earlier).counts)
    assert len(places) < len(given)


def test_a_short_last_batch(dataset):
    items = PairDataset(dataset, "test")
    loader = PrefetchLoader(items, [[0, 1, 2], [3, 4]], batch_size=3, threads=1, pin=False)
    assert [len(batch.tokens) for batch in loader] == [3, 2]


def test_an_error_in_a_thread_reaches_the_trainer(dataset):
    loader = PrefetchLoader(PairDataset(dataset, "test"), [[0], [999], [1]], batch_size=1, threads=2, pin=False)
    with pytest.raises(IndexError, match="example 999 of 12"):
        list(loader)


def test_order_is_a_function_of_seed_epoch_and_rank(dataset):
    items = PairDataset(dataset, "train")

    def order(epoch=0, **arguments):
        sampler = sampler_of(items, **arguments)
        sampler.set_epoch(epoch)
        return [item for batch in sampler for item in batch]

    assert order() == order()
    assert order(epoch=1) != order() != order(seed=4)
    ranks = [order(rank=rank, world=2) for rank in (0, 1)]
    assert not set(ranks[0]) & set(ranks[1])
    assert list(SequentialBatchSampler(examples=9, batch_size=2, seed=1, rank=1, world=2)) == [[1, 3], [5, 7]]


@pytest.mark.parametrize("i", [1.5, "a", slice(2), None])
def test_items_are_whole_numbers(dataset, i):
    with pytest.raises(TypeError, match="must be a whole number from 0 to 107, got"):
        PairDataset(dataset, "train")[i]


def _sums(dataset, queue=None):
    sums = [dataset.batch([i, 50]).counts.sum().item() for i in range(5)]
    if queue is None:
        return sums
    return queue.put((sums, dataset._words.flags.writeable))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_other_processes_read_the_same_memory(dataset, method, storage):
    items = PairDataset(dataset, "train", storage=storage)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_sums, args=(items, queue))
    process.start()
    sums, writeable = queue.get(timeout=120)
    process.join()
    assert sums == _sums(items)
    assert writeable == (method == "fork")


def _item_after_fork(items, queue):
    x, y = items[1]
    queue.put((x.numpy(), y.numpy()))


def test_a_forked_process_reads_after_torch_has_used_threads(tmp_path):
    """Items of the published size, which torch computes with several threads; those do not survive a fork."""
    entry = constant_scenario(sequence_length=1_000_000, simulations=10, individuals=25)
    shape = {"window_size": 2000, "sequence_length": 1_000_000, "samples": 50, "pairs": 2, "scales": [2, 8, 32, 64]}
    items = PairDataset(build_dataset(tmp_path, entry=entry, **shape), "test")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        items[0]
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_item_after_fork, args=(items, queue))
        process.start()
        try:
            x, y = queue.get(timeout=60)
        finally:
            process.kill()
            process.join()
        assert torch.equal(torch.from_numpy(x), items[1][0])
        assert torch.equal(torch.from_numpy(y), items[1][1])
    finally:
        torch.set_num_threads(threads)


def test_pickles_hold_no_data(dataset):
    items = PairDataset(dataset, "train")
    data = pickle.dumps(items)
    assert len(data) < 2000
    assert torch.equal(pickle.loads(data)[3][0], items[3][0])


def test_a_manifest_rewritten_after_loading_is_noticed(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    items = PairDataset(copy, "train")
    manifest = json.loads((copy / "dataset.json").read_text())
    part = manifest["splits"]["train"]
    for counts in (part, part["shards"][0]):
        counts["sites"] -= 640
    (copy / "dataset.json").write_text(json.dumps(manifest))
    data = pickle.dumps(items)
    with pytest.raises(BadRequest, match=r"dataset\.json has changed while it was in use"):
        pickle.loads(data)


def test_a_batch_that_is_too_small(dataset):
    items = PairDataset(dataset, "train")
    with pytest.raises(ValueError, match="8 examples do not fit into a batch of 2"):
        items.batch(range(8), out=items.empty_batch(2))


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (1, "spawn")])
def test_torchs_own_loader(masked_dataset, workers, method):
    items = PairDataset(masked_dataset, "train")
    x, y = next(iter(DataLoader(items, batch_size=4, num_workers=workers, multiprocessing_context=method)))
    assert x.dtype == torch.float32
    for i in range(4):
        torch.testing.assert_close(x[i], items[i][0])  # log1p of several may differ in the last digit
        assert torch.equal(y[i], items[i][1])


@on_linux
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_nothing_is_left_behind(dataset, tmp_path, storage):
    code = (
        "import cxt, os, signal, sys; "
        f"items = cxt.PairDataset({str(dataset)!r}, 'train', storage={storage!r}, progress=print); "
        "print(os.listdir(os.environ['TMPDIR'])); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = run_python("-c", code, env={"TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == -9
    assert done.stdout.endswith("[]\n")
    assert {"memory": "MB in memory", "disk": "MB in a temporary file"}[storage] in done.stdout
    assert not list(tmp_path.iterdir())


def test_storage_is_chosen_by_what_is_free(dataset, monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr("cxt.data.pair_dataset.free_memory", lambda: 1000)
    few = PairDataset(dataset, "test", progress=lines.append)
    assert re.search(r"in a temporary file in /\S+ \(0.0 GB of memory free\)", lines[0])
    monkeypatch.undo()
    assert torch.equal(few[3][0], PairDataset(dataset, "test", progress=lines.append)[3][0])
    assert "MB in memory" in lines[1]
    with pytest.raises(BadRequest, match="storage must be one of auto, memory, disk, got 'ram'"):
        PairDataset(dataset, "test", storage="ram")
    monkeypatch.setattr(arena.shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(BadRequest, match=r"do not fit into .* \(0.0 MB left\); set `scratch` or TMPDIR"):
        Arena(1000, on_disk=True)


def test_free_memory_in_a_control_group(tmp_path, monkeypatch):
    assert free_memory() > 0
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("5000\n")
    (tmp_path / "job" / "memory.current").write_text("3000\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 100\ninactive_file 400\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("3000\n")
    old = tmp_path / "memory" / "slurm"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("4000\n")
    (old / "memory.usage_in_bytes").write_text("3000\n")
    (old / "memory.stat").write_text("cache 3\ninactive_file 1\ntotal_inactive_file 7\n")
    monkeypatch.setattr(arena, "CGROUP", tmp_path)
    read_text = arena.Path.read_text
    for text, expected in (("0::/job/step\n", 2400), ("9:cpuset:/x\n8:cpu,memory:/slurm\n0::/\n", 1007)):
        monkeypatch.setattr(arena.Path, "read_text", _reading(read_text, "/proc/self/cgroup", text))
        assert free_memory() == expected


def _reading(original, path, content):
    return lambda self, **options: content if str(self) == path else original(self, **options)


def test_ranks_share_what_the_first_has_read(dataset, monkeypatch):
    arguments = {"grid": Grid(), "storage": "auto", "progress": None}
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("CXT_SHARED_TRAIN", raising=False)
    first = open_dataset(dataset, "train", **arguments)
    handle = json.loads(os.environ["CXT_SHARED_TRAIN"])
    assert handle == json.loads(json.dumps(first.handle()))
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = open_dataset(dataset, "train", **arguments)
    assert not second._words.flags.writeable
    assert torch.equal(second[7][0], first[7][0])
    monkeypatch.setenv("CXT_SHARED_TRAIN", json.dumps(handle | {"manifest": "0"}))
    with pytest.raises(BadRequest, match=r"dataset\.json has changed while it was in use"):
        open_dataset(dataset, "train", **arguments)
    monkeypatch.delenv("CXT_SHARED_TRAIN")


@pytest.mark.parametrize(("rate", "fits"), [(6e-6, False), (6e-8, True)])
def test_many_sites_and_many_samples(tmp_path, rate, fits):
    """More than 64 samples; totals of a window that fit into a byte and that do not; counts against the definition."""
    entry = constant_scenario(individuals=40, mutation_rate=rate, sequence_length=10_000, simulations=10, batch=10)
    directory = build_dataset(tmp_path, entry=entry, samples=80, sequence_length=10_000)
    items = PairDataset(directory, "train")
    assert (items._total_fits == fits).all()
    arrays, _ = read_shard(directory / "train/constant-0.zarr.zip")
    for i in (0, 8, 53):
        row, pair = divmod(i, 6)
        sites = slice(arrays["site_offsets"][row], arrays["site_offsets"][row + 1])
        genotypes = np.unpackbits(arrays["genotypes"][sites], axis=1, count=80, bitorder="little")
        a, b = arrays["pairs"][row, pair]
        derived, differ = genotypes.sum(axis=1), genotypes[:, a] != genotypes[:, b]
        counts = items.batch([i]).counts[0].numpy()
        for m, scale in enumerate((2, 4)):
            for k in range(10):
                inside = (arrays["positions"][sites] >= 1000 * k) & (arrays["positions"][sites] < 1000 * (k + scale))
                for channel, chosen in enumerate((differ, ~differ)):
                    expected = np.bincount(derived[inside & chosen], minlength=80)
                    assert np.array_equal(counts[channel, m, k], expected)


@pytest.mark.slow
def test_counts_beyond_16_bits(tmp_path):
    """One haplotype of two in many sites: one bin holds more than an int16 can."""
    entry = constant_scenario(
        individuals=2, mutation_rate=2e-4, sequence_length=10_000, simulations=2, batch=10, recombination_rate=0.0
    )
    directory = build_dataset(tmp_path, entry=entry, samples=3, pairs=1, sequence_length=10_000, scales=[10])
    items = PairDataset(directory, "train")
    batch = items.batch([0])
    assert batch.counts.dtype == torch.int32
    arrays, _ = read_shard(directory / "train/constant-0.zarr.zip")
    assert batch.counts[0, :, 0, 0].sum().item() == len(arrays["positions"])
    assert batch.counts.max() > 32767
    assert (compute_model_input(batch.counts, None) >= 0).all()


def test_bits():
    for place in (0, 1, 17, 62, 63):
        assert find_lowest_bit(np.uint64(1 << place)) == place
        assert find_lowest_bit(np.uint64((1 << 63) | (1 << place))) == place
    rng = np.random.default_rng(1)
    for width, windows in ((1, 70), (9, 500), (9, 7), (13, 64), (16, 5)):
        bins = rng.integers(0, 2**width, (3, windows))
        packed = np.empty((3, -(-windows * width // 64)), dtype=np.uint64)
        pack_bins(bins, width, packed)
        out = np.empty(windows, dtype=np.int64)
        for p in range(3):
            unpack_bins(packed[p], width, 0, out)
            assert np.array_equal(out, bins[p])


def test_bins_are_numpys():
    for grid in (Grid(), Grid(0.0, 1.0, 2), Grid(3.0, 17.0, 1), Grid(-5.0, 90.0, 4097)):
        edges = np.linspace(grid.low, grid.high, grid.bins)
        values = np.concatenate(
            [edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf), [-1e30, 1e30, np.inf, -np.inf],
             np.random.default_rng(1).uniform(grid.low - 1, grid.high + 1, 5000)]
        )  # fmt: skip
        for dtype in (np.float64, np.float32):
            expected = np.clip(np.searchsorted(edges, values.astype(dtype), side="right") - 1, 0, grid.bins - 1)
            assert np.array_equal(grid.find_bins(values.astype(dtype)), expected)


@on_linux
def test_scratch_holds_the_data_that_is_on_disk(dataset, monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    lines = []
    items = PairDataset(dataset, "train", storage="disk", scratch="$SCRATCH", progress=lines.append)
    assert f"in a temporary file in {tmp_path} (" in lines[-1]
    assert not os.listdir(tmp_path)  # it has no name, so that nothing is left behind
    assert any(str(tmp_path) in os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink())
    for (x, y), (x_in_memory, y_in_memory) in zip(items, PairDataset(dataset, "train", storage="memory"), strict=True):
        assert torch.equal(x, x_in_memory)
        assert torch.equal(y, y_in_memory)
    PairDataset(dataset, "test", storage="memory", scratch="/no/such/directory")


@pytest.mark.parametrize(
    ("scratch", "problem"),
    [
        ("/no/such/directory", "scratch: there is no directory /no/such/directory on "),
        ("$NO_SUCH_VARIABLE/x", r"scratch: \$NO_SUCH_VARIABLE in '\$NO_SUCH_VARIABLE/x' is not set on "),
        ("/proc", "do not fit into /proc"),
    ],
)
def test_scratch_that_cannot_be(dataset, scratch, problem):
    with pytest.raises(BadRequest, match=problem):
        PairDataset(dataset, "test", storage="disk", scratch=scratch)
