"""What the data path costs, beside the definition of spec as a competent person would first write it in numpy.

    python benchmarks/data.py [--quick] [--memory]

Prints tables with medians and, in the same run, ratios: features of a pair, targets and whole preprocessing of a
simulation, its bytes on disk, items per second of the loader for 0, 1 and 2 threads and for loader processes, and
resident memory. For a human-like, a dense and a high-Ne simulation of 1 Mb, with windows of 2 kb (all of it) and of 200 bp
(its first 100 kb), with 50 and with 10 haplotypes. One thread of computation each, unless the table says otherwise.

--quick repeats everything less often; --memory measures only the memory of a training run on a dataset of 2 GB.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msprime
import numpy as np
import tskit

from cxt.data.features import SCALES, compute_pair_counts, select_usable_sites
from cxt.data.loaders import EpochBatchSampler, PrefetchLoader, ProcessLoader
from cxt.data.manifest import write_manifest
from cxt.data.pair_dataset import PairDataset
from cxt.data.preprocessing import choose_pairs, preprocess_simulation
from cxt.data.shards import write_shard
from cxt.data.targets import pair_log_tmrca
from cxt.scenarios.registry import METADATA

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests/golden/constant.trees"
PUBLISHED_SECONDS = 18.0
"""What the published code takes for features and targets of 200 pairs of a human-like simulation, on one core."""

CASES = {
    "human-like": {"population_size": 2e4, "recombination_rate": 1.28e-8, "mutation_rate": 1.29e-8},
    "dense": {"population_size": 4e4, "recombination_rate": 1e-8, "mutation_rate": 5e-8},
    "high-Ne": {"population_size": 1e6, "recombination_rate": 1.4e-8, "mutation_rate": 3.5e-9},
}
SHAPES = {"w2000": (2000, 1_000_000), "w200": (200, 100_000)}


# The definitions in plain numpy


def plain_features(genotypes, positions, pair, *, window_size, sequence_length):
    """Counts of one pair (2, scales, windows, samples): a two-dimensional histogram for each channel, scales by sums."""
    derived = genotypes.sum(axis=1)
    keep = (genotypes.max(axis=1) <= 1) & (derived > 0) & (derived < genotypes.shape[1]) & (positions < sequence_length)
    genotypes, positions, derived = genotypes[keep], positions[keep], derived[keep]
    windows, samples = sequence_length // window_size, genotypes.shape[1]
    differ = genotypes[:, pair[0]] != genotypes[:, pair[1]]
    out = np.empty((2, len(SCALES), windows, samples), dtype=np.float32)
    for channel, chosen in enumerate((differ, ~differ)):
        base, _, _ = np.histogram2d(
            positions[chosen], derived[chosen], bins=(windows, samples), range=((0, sequence_length), (0, samples))
        )
        cumulative = np.concatenate([np.zeros((1, samples)), np.cumsum(base, axis=0)])
        for m, scale in enumerate(SCALES):
            right = np.minimum(np.arange(windows) + scale, windows)
            out[channel, m] = cumulative[right] - cumulative[:-1]
    return out


def plain_targets(ts, pairs, *, window_size, sequence_length):
    """ln TMRCA (pairs, windows): one walk over the trees, all pairs of a tree at once into the windows it overlaps."""
    windows, samples = sequence_length // window_size, ts.samples()
    total = np.zeros((windows, len(pairs)))
    for tree in ts.trees():
        left, right = tree.interval.left, min(tree.interval.right, sequence_length)
        if left >= sequence_length:
            break
        times = np.array([tree.tmrca(samples[a], samples[b]) for a, b in pairs])
        for k in range(int(left // window_size), min(windows, int(np.ceil(right / window_size)))):
            total[k] += times * (min(right, (k + 1) * window_size) - max(left, k * window_size))
    return np.log(total.T / window_size)


# Measuring


def median(function, *, repeats: int) -> float:
    """Median of the wall times of *repeats* calls, in seconds, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def simulated(name: str, seed: int | None = None) -> tskit.TreeSequence:
    """A simulation of a case, with the identity that preprocessing asks for; the golden one without a seed."""
    if seed is None and name == "human-like":
        ts = tskit.load(GOLDEN)
    else:
        rates = dict(CASES[name])
        mutation_rate = rates.pop("mutation_rate")
        # SMC(k) for high Ne: Hudson's takes minutes, and its trees are as many.
        model = msprime.SMCK(k=1) if name == "high-Ne" else None
        ts = msprime.sim_ancestry(25, sequence_length=1e6, random_seed=seed or 1, model=model, **rates)
        ts = msprime.sim_mutations(
            ts, rate=mutation_rate, random_seed=seed or 1, discrete_genome=False, model=msprime.BinaryMutationModel()
        )
    tables = ts.dump_tables()
    tables.metadata_schema = METADATA
    rates = {"mutation_rate": 1e-8, "recombination_rate": 1e-8}
    identity = {"scenario": "bench", "index": 1, "seed": 1, "spec": {"name": name}, **rates}
    tables.metadata = {"cxt": identity}
    return tables.tree_sequence()


def spec_of(shape: str, samples: int) -> dict:
    window_size, length = SHAPES[shape]
    return {
        "window_size": window_size, "sequence_length": length, "samples": samples, "pairs": 200 if samples == 50 else 20,
        "scales": list(SCALES),
    }  # fmt: skip


def attributes_of(spec: dict) -> dict:
    return spec | {"missing": False, "regions_per_simulation": 1, "scenario": "bench", "split": "train", "seed": 1}


def table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def preprocessing(simulations: dict, *, repeats: int, scratch: Path) -> None:
    """The table of features, targets, preprocessing and bytes."""
    rows = []
    for (name, ts), shape, samples in itertools.product(simulations.items(), SHAPES, (50, 10)):
        spec = spec_of(shape, samples)
        window = {"window_size": spec["window_size"], "sequence_length": spec["sequence_length"]}
        few = ts if samples == 50 else ts.simplify(ts.samples()[:samples])
        pairs = choose_pairs(np.random.default_rng(1), samples=samples, pairs=spec["pairs"])
        genotypes, positions = select_usable_sites(
            few.genotype_matrix(), few.sites_position, sequence_length=spec["sequence_length"]
        )
        packed = np.packbits(genotypes, axis=1, bitorder="little")
        windows = spec["sequence_length"] // spec["window_size"]
        out = np.empty((len(pairs), 2, len(SCALES), windows, samples), dtype=np.int16)

        def features(packed=packed, positions=positions, pairs=pairs, window=window, windows=windows, out=out):
            compute_pair_counts(
                packed, positions, pairs, window_size=window["window_size"], windows=windows, samples=out.shape[-1], out=out
            )

        feature = median(features, repeats=repeats) / len(pairs)
        slow_feature = median(lambda: plain_features(genotypes, positions, pairs[0], **window), repeats=repeats)  # noqa: B023
        assert np.array_equal(plain_features(genotypes, positions, pairs[0], **window), out[0])
        target = median(lambda: pair_log_tmrca(few, pairs, **window), repeats=repeats)  # noqa: B023
        slow = {}

        def plain(few=few, pairs=pairs, window=window, slow=slow):
            slow["y"] = plain_targets(few, pairs, **window)

        began = time.perf_counter()
        plain()
        slow_target = time.perf_counter() - began
        np.testing.assert_allclose(slow["y"], pair_log_tmrca(few, pairs, **window), rtol=1e-9)
        path = scratch / "one.zarr.zip"

        def whole(ts=ts, spec=spec, path=path):
            write_shard(path, [preprocess_simulation(ts, spec)], attributes_of(spec))

        preprocess = median(whole, repeats=repeats)
        plain_whole = slow_target + len(pairs) * slow_feature
        rows.append(
            [
                f"{name} {shape} n{samples}", f"{few.num_trees:,}", f"{len(positions):,}",
                f"{1e3 * feature:.3f}", f"{slow_feature / feature:.0f}×",
                f"{1e3 * target:.1f}", f"{slow_target / target:.0f}×",
                f"{1e3 * preprocess:.0f}", f"{plain_whole / preprocess:.0f}×", f"{path.stat().st_size / 1000:.0f}",
            ]
        )  # fmt: skip
        if name == "human-like" and shape == "w2000" and samples == 50:
            print(
                f"human-like, 200 pairs, genotypes and targets to a finished shard entry: {1e3 * preprocess:.1f} ms; the "
                f"published code's {PUBLISHED_SECONDS:g} s are {PUBLISHED_SECONDS / preprocess:.0f} times that\n"
            )
    table(
        ["case", "trees", "sites", "features ms/pair", "plain", "targets ms", "plain", "preprocessing ms", "plain", "kB"], rows
    )


def dataset_of(directory: Path, simulations: list[tskit.TreeSequence], spec: dict) -> Path:
    """A dataset of one training shard and none for testing."""
    preprocessed = []
    for number, ts in enumerate(simulations):
        index = number + number // 9 + 1  # 10, 20, … are held out
        tables = ts.dump_tables()
        tables.metadata = {"cxt": ts.metadata["cxt"] | {"index": index}}
        preprocessed.append(preprocess_simulation(tables.tree_sequence(), spec))
    write_shard(directory / "train/bench-0.zarr.zip", preprocessed, attributes_of(spec))
    (directory / "test").mkdir()
    write_manifest(directory, {"train": ["train/bench-0.zarr.zip"], "test": []})
    return directory


def loading(simulations: dict, *, seconds: float, scratch: Path) -> None:
    """The table of items per second."""
    rows = []
    for (name, ts), shape, samples in itertools.product(simulations.items(), SHAPES, (50, 10)):
        spec = spec_of(shape, samples)
        dataset = PairDataset(dataset_of(scratch / f"{name}-{shape}-{samples}", [ts] * 20, spec), "train")
        batch = 128 if samples == 50 else 20 * 6

        def order(epoch, dataset=dataset, batch=batch):
            sampler = EpochBatchSampler(examples=len(dataset), batch_size=batch, seed=1)
            sampler.set_epoch(epoch)
            return sampler

        def rate(make, order=order, batch=batch) -> float:
            """Items per second of whole epochs, for some seconds; the first epoch, with all that starts, does not count."""
            loader, done, began = make(order(0)), 0, 0.0
            for epoch in itertools.count():
                loader.sampler.set_epoch(epoch)
                for _ in loader:
                    done += batch
                if epoch == 0:
                    done, began = 0, time.perf_counter()
                elif (spent := time.perf_counter() - began) > seconds:
                    break
            return done / spent

        def threads(count, dataset=dataset, batch=batch):
            return lambda sampler: PrefetchLoader(dataset, sampler, batch_size=batch, threads=count, pin=False)

        def processes(sampler, dataset=dataset):
            return ProcessLoader(dataset, sampler, processes=2, pin=False)

        # Side by side, five times, so that a slow minute of the machine hits them all.
        loaders = {"0": threads(0), "1": threads(1), "2": threads(2), "processes": processes}
        measured = {key: [] for key in loaders}
        for _ in range(5):
            for key, make in loaders.items():
                measured[key].append(rate(make))
        rates = {key: float(np.median(values)) for key, values in measured.items()}
        rows.append(
            [
                f"{name} {shape} n{samples}", str(dataset._dtype), f"{rates['0']:,.0f}", f"{rates['1']:,.0f}",
                f"{rates['2']:,.0f}", f"{rates['2'] / rates['0']:.2f}×", f"{rates['processes']:,.0f}",
            ]
        )  # fmt: skip
    table(["case", "counts", "items/s", "1 thread", "2 threads", "2 threads / none", "2 processes"], rows)


# Memory


def proportional_memory(pid: int) -> int:
    """Proportional set size of a process and all below it, in bytes: shared pages counted once among them."""
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        try:
            text = Path(f"/proc/{current}/smaps_rollup").read_text(encoding="utf-8")
            waiting += map(int, Path(f"/proc/{current}/task/{current}/children").read_text(encoding="utf-8").split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024
    return total


def peak_memory(command: list) -> int:
    """Largest proportional memory of a command while it runs, in bytes."""
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, proportional_memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {command}")
    return peak


def memory(*, gigabytes: float, scratch: Path) -> None:
    """The table of memory: training of a small network on a large dataset, with workers and with ranks.

    The dataset is one shard of 100 human-like simulations, many times over.
    """
    spec = spec_of("w2000", 50)
    directory = dataset_of(scratch / "large", [simulated("human-like", seed=seed) for seed in range(1, 101)], spec)
    shard = directory / "train/bench-0.zarr.zip"
    copies = int(gigabytes * 1e9 / shard.stat().st_size)
    for copy in range(1, copies):
        os.link(shard, directory / f"train/bench-{100 * copy}.zarr.zip")
    held_out = [preprocess_simulation(simulated("human-like", seed=seed), spec) for seed in range(101, 104)]
    write_shard(directory / "test/bench-0.zarr.zip", held_out, attributes_of(spec) | {"split": "test"})
    names = [f"train/bench-{100 * copy}.zarr.zip" for copy in range(copies)]
    manifest = write_manifest(directory, {"train": names, "test": ["test/bench-0.zarr.zip"]})
    size = sum(manifest["splits"][split]["bytes"] for split in manifest["splits"])
    torch_alone = peak_memory([sys.executable, "-c", "import torch"])
    words = "--model broad --layers 1 --heads 2 --width 32 --batch-size 8 --grad-accum 1 --threads 1 --validation-items 64"
    rows = []
    for what, more in {
        "0 workers": ["--devices", 0],
        "4 workers": ["--devices", 0, "--workers", 4],
        "2 ranks, 4 workers each": ["--accelerator", "cpu", "--devices", 2, "--workers", 4],
    }.items():
        command = [sys.executable, "-m", "cxt.train", "--dataset-path", directory, *words.split(), "--max-steps", 60, *more]
        began = time.monotonic()
        peak = peak_memory([*command, "--run-dir", scratch / f"run {what}"])
        rows.append(
            [what, f"{size / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{torch_alone / 1e9:.2f}",
             f"{(peak - torch_alone - size) / 1e9:+.2f}", f"{time.monotonic() - began:.0f}"]
        )  # fmt: skip
    table(["training with", "dataset GB", "peak GB", "import torch GB", "peak - torch - dataset GB", "seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="repeat everything less often")
    parser.add_argument("--memory", action="store_true", help="only the memory of training on a dataset of 2 GB")
    args = parser.parse_args()
    versions = {package.__name__: package.__version__ for package in (np, tskit, msprime)}
    print(f"{os.cpu_count()} cores; {json.dumps(versions)}\n")
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        if args.memory:
            memory(gigabytes=2.0, scratch=scratch)
            return
        simulations = {name: simulated(name) for name in CASES}
        preprocessing(simulations, repeats=3 if args.quick else 15, scratch=scratch)
        loading(simulations, seconds=0.3 if args.quick else 1.0, scratch=scratch)
        memory(gigabytes=0.3 if args.quick else 2.0, scratch=scratch)


if __name__ == "__main__":
    main()
