"""How good, robust and fast `cxt translate` is, on simulations that no checkpoint was trained on.

    python benchmarks/translation.py accuracy   --model small --out DIR    five scenarios, 200 kb and 1 Mb, with baselines
    python benchmarks/translation.py robustness --model small --out DIR    the same with errors in the genotypes
    python benchmarks/translation.py edges      --model small --out DIR    blocks against one long region; the ends of regions
    python benchmarks/translation.py cost       --model small --out DIR    100 Mb of 100 haplotypes: time and memory
    python benchmarks/translation.py tables     --out DIR                  print the results as Markdown, and draw the figure

Each writes DIR/<model>-<name>.json.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msprime
import numpy as np

import cxt
from cxt.config.file import load
from cxt.config.variants import list_variants
from cxt.data.shards import PreprocessedSimulation
from cxt.evaluation.metrics import clustered_standard_error, pearson_per_pair, score_heterozygosity, score_hmm
from cxt.io import atomic_write, json_text
from cxt.scenarios.indices import EVALUATION_START
from cxt.scenarios.registry import simulate_tree_sequence

SCENARIOS = ("constant", "sawtooth", "island", "out_of_africa")
SMALL_POPULATION = "breed"
"""A scenario in which a fifth of the pairs share hundreds of kilobases without a difference; for `accuracy`."""

RECENT = np.log(100)
"""ln generations below which windows are counted as recent."""

LENGTHS = {200_000: 20, 1_000_000: 10}
"""Base pairs of a region, and simulations of each scenario."""

FIRST = EVALUATION_START + 500_000
"""First index of these simulations: beyond those of any evaluation."""

PAIRS = 20
SIZE = 2000
SEED = 1

READINGS = (("both", "none"), ("mutation", "none"), ("mutation", "diversity"), ("none", "none"))
"""Rates that a translation is given, and its calibration."""

ERRORS = {
    "none": {},
    "genotype errors 1%": {"flip": 0.01},
    "genotype errors 5%": {"flip": 0.05},
    "flipped ancestral alleles 5%": {"polarise": 0.05},
    "missing genotypes 10%": {"missing": 0.1},
    "phase switches every 100 kb": {"switch": 100_000},
    "phase switches every 20 kb": {"switch": 20_000},
}


def simulate(scenario: str, length: int, index: int):
    """One simulation of a scenario of config/small.yaml, of another length."""
    config = load(["config/small.yaml"])
    [variant] = list_variants(scenario, config["scenarios"][scenario])
    return simulate_tree_sequence(variant.spec | {"sequence_length": length}, index=FIRST + index, seed=SEED)


def biallelic(ts):
    """Positions in whole base pairs and genotypes (sites, haplotypes) of the sites that a VCF would have, one at a position."""
    positions, genotypes = np.floor(ts.sites_position).astype(np.int64), ts.genotype_matrix()
    keep = (genotypes.max(axis=1) == 1) & np.concatenate([[True], np.diff(positions) > 0])
    return positions[keep], genotypes[keep].astype(np.int8)


def add_errors(genotypes, positions, *, rng, flip=0.0, polarise=0.0, missing=0.0, switch=0):
    """Errors in genotypes, (sites, haplotypes); *switch* is the mean distance of phase switches of an individual in bp."""
    genotypes = genotypes.copy()
    genotypes[rng.random(genotypes.shape) < flip] ^= 1
    genotypes[rng.random(len(genotypes)) < polarise] ^= 1
    if switch:
        for first in range(0, genotypes.shape[1], 2):
            steps = np.diff(positions, prepend=positions[0])
            switched = np.cumsum(rng.random(len(positions)) < 1 - np.exp(-steps / switch)) % 2 == 1
            genotypes[switched, first : first + 2] = genotypes[switched, first : first + 2][:, ::-1]
    genotypes[rng.random(genotypes.shape) < missing] = -1
    return genotypes


def translate(model, ts, directory, *, errors=None, index=0, **settings):
    """Tracks of random pairs of a simulation, read from a .npz file; arrays (pairs, windows), and the pairs."""
    positions, genotypes = biallelic(ts)
    if errors:
        genotypes = add_errors(genotypes, positions, rng=np.random.default_rng([SEED, index]), **errors)
    path = Path(directory) / "genotypes.npz"
    np.savez(path, genotypes=genotypes, positions=positions, sequence_length=int(ts.sequence_length))
    out = Path(directory) / "tracks"
    shutil.rmtree(out, ignore_errors=True)
    tracks = cxt.translate(path, model=model, out=out, **({"pairs": PAIRS, "seed": SEED} | settings))
    names = [int(name.removeprefix("tsk_")) for name, _ in tracks.attributes["haplotypes"]]
    pairs = np.array([[names[i], names[j]] for i, j in tracks.attributes["pairs"]])
    return tracks.read(tracks.contigs[0].name), pairs


def truth_of(ts, pairs):
    """True ln TMRCA (pairs, windows)."""
    return cxt.pair_log_tmrca(ts, pairs, window_size=SIZE, sequence_length=int(ts.sequence_length))


def as_simulation(ts, pairs, truth) -> PreprocessedSimulation:
    """What the baselines read."""
    about = ts.metadata["cxt"]
    positions, genotypes = biallelic(ts)
    packed = np.packbits(genotypes.astype(np.uint8), axis=1, bitorder="little")
    return PreprocessedSimulation(
        scenario=about["scenario"], index=about["index"], mutation_rate=about["mutation_rate"],
        recombination_rate=about["recombination_rate"], genotypes=packed, positions=positions.astype(float), pairs=pairs,
        log_tmrca=truth,
    )  # fmt: skip


def score(truth, tracks) -> dict:
    """Accuracy of tracks (simulations, pairs, windows), of the windows that are not missing."""
    mean, quantiles = (np.stack([getattr(track, key) for track in tracks]) for key in ("mean", "quantiles"))
    truth = np.stack(truth)
    known = ~np.isnan(mean)
    squared = np.stack([((m - t) ** 2)[k].mean(keepdims=True) for m, t, k in zip(mean, truth, known, strict=True)])
    pairs = [(t[k], m[k]) for m, t, k in zip(*(a.reshape(-1, a.shape[-1]) for a in (mean, truth, known)), strict=True)]
    inside = (truth >= quantiles[..., 0]) & (truth <= quantiles[..., -1])
    recent = known & (truth < RECENT)
    return {
        "mse": float(((mean - truth)[known] ** 2).mean()), "mse_se": clustered_standard_error(squared),
        # Of pairs that vary: identical haplotypes have the same estimate everywhere.
        "r": float(np.nanmean([pearson_per_pair(t[None], m[None]) for t, m in pairs])),
        "bias": float((mean - truth)[known].mean()), "coverage95": float(inside[known].mean()),
        "missing": float(1 - known.mean()),
        "recent": {
            "share": float(recent.sum() / known.sum()), "mse": float(((mean - truth)[recent] ** 2).mean()),
            "bias": float((mean - truth)[recent].mean()), "coverage95": float(inside[recent].mean()),
            "upper": float(np.exp(np.median(quantiles[..., -1][recent]))),
        } if recent.any() else None,
    }  # fmt: skip


def rates_of(ts, known: str) -> dict:
    """The rates that a translation is given: `both`, only `mutation`, or `none`."""
    about = ts.metadata["cxt"]
    rates = {"mutation_rate": about["mutation_rate"], "recombination_rate": about["recombination_rate"]}
    return {"both": rates, "mutation": {"mutation_rate": rates["mutation_rate"]}, "none": {}}[known]


def accuracy(args) -> dict:
    """Five scenarios, 200 kb and 1 Mb, with the rates; 1 Mb also with the mutation rate, its calibration, and no rates."""
    rows = []
    for length, simulations in LENGTHS.items():
        for scenario in args.scenarios:
            simulated = [simulate(scenario, length, i) for i in range(simulations)]
            for known, calibration in READINGS if length == max(LENGTHS) else READINGS[:1]:
                with tempfile.TemporaryDirectory() as directory:
                    found = [
                        translate(args.model, ts, directory, calibration=calibration, **rates_of(ts, known)) for ts in simulated
                    ]
                truth = [truth_of(ts, pairs) for ts, (_, pairs) in zip(simulated, found, strict=True)]
                row = {"length": length, "scenario": scenario, "simulations": simulations, "rates": known}
                row |= {"calibration": calibration} | score(truth, [tracks for tracks, _ in found])
                if known == "both" and not args.without_baselines:
                    preprocessed = [as_simulation(ts, p, t) for ts, (_, p), t in zip(simulated, found, truth, strict=True)]
                    shape = {"window_size": SIZE, "windows": length // SIZE}
                    samples = simulated[0].num_samples
                    row["heterozygosity"] = score_heterozygosity(preprocessed, **shape)
                    row["hmm"] = score_hmm(np.stack(truth), preprocessed, samples=samples, **shape)
                rows.append(row)
                print(json.dumps(row), flush=True)
    return {"rows": rows}


def robustness(args) -> dict:
    """Errors in the genotypes, 1 Mb, with both rates: pairs of different individuals, whose phase matters."""
    length, rows = 1_000_000, []
    for scenario in SCENARIOS:
        simulated = [simulate(scenario, length, i) for i in range(5)]
        for name, errors in ERRORS.items():
            with tempfile.TemporaryDirectory() as directory:
                found = [
                    translate(args.model, ts, directory, errors=errors, index=i, **rates_of(ts, "both"))
                    for i, ts in enumerate(simulated)
                ]
            truth = [truth_of(ts, pairs) for ts, (_, pairs) in zip(simulated, found, strict=True)]
            rows.append({"scenario": scenario, "errors": name} | score(truth, [tracks for tracks, _ in found]))
            print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def edges(args) -> dict:
    """Constant size, 2 Mb: error by position in the region, without and with flanks; halves against the whole; a mask."""
    simulated = [simulate("constant", 2_000_000, i) for i in range(10)]
    result: dict = {"by_position": {}}
    for flank in (0, 25, None):
        with tempfile.TemporaryDirectory() as directory:
            found = [translate(args.model, ts, directory, flank=flank, **rates_of(ts, "both")) for ts in simulated]
        squared = np.stack(
            [(tracks.mean - truth_of(ts, pairs)) ** 2 for ts, (tracks, pairs) in zip(simulated, found, strict=True)]
        )
        windows = squared.mean(axis=(0, 1))
        ends = len(windows) // 20
        result["by_position"]["default" if flank is None else str(flank)] = {
            "first 5%": float(windows[:ends].mean()), "last 5%": float(windows[-ends:].mean()),
            "middle": float(windows[ends:-ends].mean()), "all": float(windows.mean()),
        }  # fmt: skip
        print(json.dumps(result["by_position"]), flush=True)
    ts = simulated[0]
    with tempfile.TemporaryDirectory() as directory:
        settings = {"pairs": PAIRS, **rates_of(ts, "both")}
        whole, _ = translate(args.model, ts, directory, **settings)
        halves = [
            translate(args.model, ts, directory, regions=[region], **settings)[0].mean
            for region in ("1:1-1000000", "1:1000001-2000000")
        ]
        result["halves"] = float(np.abs(np.concatenate(halves, axis=1) - whole.mean).max())
        mask = Path(directory) / "mask.bed"
        mask.write_text("1\t950000\t1050000\n")
        masked, _ = translate(args.model, ts, directory, mask=mask, mask_marks="inaccessible", **settings)
        inside = slice(475, 525)
        difference = np.abs(masked.mean - whole.mean)
        distance = np.maximum(475 - np.arange(1000), np.arange(1000) - 524)
        result["mask"] = {
            "missing": bool(np.isnan(masked.mean[:, inside]).all() and np.isnan(masked.mean).sum() == PAIRS * 50),
            **{
                f"mean change, {low}-{high} kb away": float(difference[:, (distance * 2 > low) & (distance * 2 <= high)].mean())
                for low, high in ((0, 20), (20, 100), (100, 300), (300, 900))
            },
        }
    return result


def write_long_vcf(path: Path, *, pieces: int = 20, length: int = 5_000_000) -> int:
    """A VCF of independent pieces of a chromosome of constant size, 50 diploids; the number of its sites."""
    names = "\t".join(f"s{i}" for i in range(50))
    sites = 0
    with open(path, "w") as file:
        file.write(f"##fileformat=VCFv4.2\n##contig=<ID=1,length={pieces * length}>\n")
        file.write('##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">\n')
        file.write(f"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t{names}\n")
        for piece in range(pieces):
            ts = msprime.sim_ancestry(
                50, population_size=2e4, sequence_length=length, recombination_rate=1e-8, random_seed=piece + 1
            )
            positions, genotypes = biallelic(msprime.sim_mutations(ts, rate=1.25e-8, random_seed=piece + 1))
            for position, row in zip(positions, genotypes, strict=True):
                calls = "\t".join(f"{a}|{b}" for a, b in row.reshape(-1, 2))
                file.write(f"1\t{piece * length + position + 1}\t.\tA\tC\t.\tPASS\t.\tGT\t{calls}\n")
            sites += len(positions)
    return sites


def cost(args) -> dict:
    """100 Mb of 100 haplotypes as a VCF: time and peak memory of 50 pairs, in a process of its own."""
    import pysam

    with tempfile.TemporaryDirectory(dir=args.out) as directory:
        path = Path(directory) / "genotypes.vcf.gz"
        sites = write_long_vcf(Path(directory) / "genotypes.vcf")
        pysam.tabix_compress(str(Path(directory) / "genotypes.vcf"), str(path), force=True)
        began = time.monotonic()
        command = [
            sys.executable, "-m", "cxt.commands.translate", str(path), "--model", args.model, "--out", f"{directory}/tracks",
            "--pairs", "50", "--mutation-rate", "1.25e-8", "--recombination-rate", "1e-8", "--threads", "1",
            "--ancestral", "ref",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = sum(file.stat().st_size for file in (Path(directory) / "tracks").rglob("*") if file.is_file())
        return {
            "sites": sites, "seconds": time.monotonic() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mb": usage.ru_maxrss / 1000, "vcf_mb": path.stat().st_size / 1e6, "output_mb": size / 1e6,
        }  # fmt: skip


def tables(args) -> None:
    """Print everything in DIR as Markdown tables, and draw what errors do."""
    for path in sorted(args.out.glob("*-accuracy.json")):
        print(f"\n{path.stem}\n\n| region | scenario | MSE | r | bias | cover 95% | hidden Markov model | best fixed window |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in json.loads(path.read_text())["rows"]:
            kind = {"both": "rates given", "mutation": "µ given", "none": "no rates"}[row["rates"]]
            kind += ", calibrated" if row["calibration"] != "none" else ""
            baselines = [f"{row[key]['mse']:.3f}" if key in row else "" for key in ("hmm", "heterozygosity")]
            print(
                f"| {row['length'] // 1000} kb, {kind} | {row['scenario']} | {row['mse']:.3f} ± {row['mse_se']:.3f} | "
                f"{row['r']:.3f} | {row['bias']:+.3f} | {row['coverage95']:.1%} | {' | '.join(baselines)} |"
            )
    results = sorted(args.out.glob("*-robustness.json"))
    for path in results:
        rows = json.loads(path.read_text())["rows"]
        print(f"\n{path.stem}\n\n| errors | {' | '.join(SCENARIOS)} | cover 95% |\n| --- | {'--- | ' * (len(SCENARIOS) + 1)}")
        for name in ERRORS:
            own = {row["scenario"]: row for row in rows if row["errors"] == name}
            cover = np.mean([row["coverage95"] for row in own.values()])
            errors = [f"{own[scenario]['mse']:.3f}" for scenario in SCENARIOS]
            print(f"| {name} | {' | '.join(errors)} | {cover:.1%} |")
    if results:
        draw(results, args.out / "robustness.png")
    for name in ("edges", "cost"):
        for path in sorted(args.out.glob(f"*-{name}.json")):
            print(f"\n{path.stem}\n\n{path.read_text()}")


def draw(paths, out) -> None:
    """Bars of the MSE with each kind of error."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(paths), figsize=(5.2 * len(paths), 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for ax, path in zip(axes[0], paths, strict=True):
        rows = json.loads(path.read_text())["rows"]
        for i, scenario in enumerate(SCENARIOS):
            values = [next(r["mse"] for r in rows if (r["scenario"], r["errors"]) == (scenario, name)) for name in ERRORS]
            ax.barh(np.arange(len(ERRORS)) + 0.2 * i, values, height=0.18, label=scenario.replace("_", " "))
        ax.set_yticks(np.arange(len(ERRORS)) + 0.3, list(ERRORS))
        ax.invert_yaxis()
        ax.set_xlabel("mean squared error of ln TMRCA")
        ax.set_title(path.stem.removesuffix("-robustness"), loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Run a measurement, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("accuracy", "robustness", "edges", "cost", "tables"))
    parser.add_argument("--model", default="small")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/translation"))
    parser.add_argument("--without-baselines", action="store_true")
    parser.add_argument("--scenarios", nargs="+", default=[*SCENARIOS, SMALL_POPULATION], help="of `accuracy`")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.name == "tables":
        tables(args)
        return
    result = globals()[args.name](args)
    atomic_write(args.out / f"{Path(args.model).stem}-{args.name}.json", json_text(result).encode())


if __name__ == "__main__":
    main()
