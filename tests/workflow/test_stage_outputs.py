"""The output of every stage on an input of seconds, held against what is recorded in stage_outputs.json.

A change of code that changes a stage's output must raise the stage's version in `cxt.lineage`, or files made before and after
it would pass for the same. These tests fail after such a change, and after no other. When one fails and the change is meant:

1. raise `STAGE_VERSION[stage]` in `src/cxt/lineage.py`, or, where the message names no stage, make sure that no file on disk
   is concerned;
2. record anew: `make record`, and look at the difference of stage_outputs.json.

Only commands and public names are used, so that moving code needs no change here. Whole numbers, text and digests must be
equal. Other numbers may differ as far as another processor rounds: of every array its norm and a weighted sum are kept.
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import tskit
import yaml
from filelock import FileLock
from helpers.repository import REPOSITORY, TINY, run_python

RECORD = REPOSITORY / "tests" / "stage_outputs.json"
STAGES = ("simulate", "preprocess", "train", "teach", "evaluate", "translate")
TOLERANCE = 1e-4
"""Relative. Without AVX, FMA and MKL's fast paths, the largest difference is 2e-6, but for correlations about 0."""

SMALLEST = 3e-5
"""Absolute, for numbers about 1: what the correlation of a network that has learnt nothing may differ by."""

SEED = 7
PARAMETRIC = {"individuals": 5, "sequence_length": 20_000}
SCENARIOS = {
    "one": {"kind": "constant", **PARAMETRIC},
    "saw": {"kind": "sawtooth", **PARAMETRIC},
    "isles": {"kind": "island", **PARAMETRIC},
    "sweep": {
        "kind": "hard_sweep", **PARAMETRIC, "population_size": 1000, "mutation_rate": 1e-7, "recombination_rate": 1e-8,
        "selection_coefficient": 0.1, "position": 5000,
    },
    "baboons": {"kind": "stdpopsim", "species": "PapAnu", "individuals": 5, "sequence_length": 20_000},
    "two": {
        "kind": "demes", "demography": str(REPOSITORY / "config" / "examples" / "two_islands.demes.yaml"),
        "samples": {"mainland": 3, "island": 2}, "mutation_rate": 1.5e-8, "recombination_rate": 1e-8, "sequence_length": 20_000,
    },
    "bottleneck": {
        "kind": "msprime", **PARAMETRIC, "mutation_rate": 1e-8, "recombination_rate": 1e-8,
        "history": [{"time": 0, "population_size": 20_000}, {"time": 1000, "population_size": 2000}],
    },
}  # fmt: skip
"""One of each kind, and small."""

SHAPE = {"window_size": 1000, "sequence_length": 20_000, "samples": 10, "pairs": 4, "scales": [2, 4]}
TRAINING = {
    "model": "broad", "layers": 2, "heads": 2, "width": 16, "batch_size": 4, "grad_accum": 2, "epochs": 3, "devices": 0,
    "threads": 1, "lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 3, "decay_steps": 0, "log_every": 1, "dropout": 0.1,
    "grad_clip": 1.0,
}  # fmt: skip


def run(module: str, *words, **flags) -> str:
    """What a command prints: its `main` in this process."""
    words = [str(word) for word in words]
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(module).main(words)
    return out.getvalue()


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def summary(values) -> dict:
    """The shape, the norm and a weighted sum of an array of numbers; where it has NaN, their number."""
    values = np.asarray(values, dtype=float)
    known = np.nan_to_num(values.ravel())
    weights = np.cos(np.arange(len(known)))
    return {
        "shape": list(values.shape),
        "norm": float(np.linalg.norm(known)),
        "sum": float(known @ weights),
        "nan": int(np.isnan(values).sum()),
    }


# What each stage makes. Every function returns plain values, and leaves in *directory* what the next ones read.


def simulate(directory: Path) -> dict:
    """Digests of the tables of every kind of scenario, and what is said of each simulation, without tskit's provenance."""
    overlay = directory / "scenarios.yaml"
    overlay.write_text(yaml.safe_dump({"scenarios": {name: entry | {"simulations": 10} for name, entry in SCENARIOS.items()}}))
    result = {}
    for name in SCENARIOS:
        out = directory / f"{name}.trees.batch"
        count = 10 if name in ("one", "baboons") else 2
        run("cxt.simulate", scenario=name, configfile=overlay, count=count, seed=SEED, out=out)
        with out.open("rb") as file:
            for _ in range(2):
                tables = tskit.load(file).dump_tables()
                tables.provenances.clear()
                metadata = json.loads(json.dumps(tables.metadata["cxt"]))
                columns = []
                for table in ("individuals", "nodes", "edges", "migrations", "sites", "mutations", "populations"):
                    for column, values in sorted(getattr(tables, table).asdict().items()):
                        if isinstance(values, np.ndarray):
                            columns += [f"{table}.{column}".encode(), values.tobytes()]
                metadata_text = json.dumps(metadata, sort_keys=True).replace(str(REPOSITORY), "")
                result.setdefault(name, []).append(
                    {
                        "tables": digest(*columns),
                        "metadata": digest(metadata_text.encode()),
                        "trees": tables.edges.num_rows,
                        "sites": tables.sites.num_rows,
                    }
                )
    return result


def make_dataset(directory: Path, name: str, *, mask=(), **changes) -> dict:
    """Shards and manifest of a dataset of one batch; their digests."""
    scenario = "baboons" if mask else "one"
    data = directory / name
    result = {}
    shards = {split: data / split / f"{scenario}-0.zarr.zip" for split in ("train", "test")}
    run(
        "cxt.preprocess", "shard", *mask, batch=directory / f"{scenario}.trees.batch", scenario=scenario, seed=SEED,
        start=0, count=10, spec=json.dumps(SHAPE | changes), **shards,
    )  # fmt: skip
    for split, shard in shards.items():
        result[split] = digest(shard.read_bytes())
    run("cxt.preprocess", "manifest", dataset=data)
    return result | {"manifest": json.loads((data / "dataset.json").read_text())}


def preprocess(directory: Path) -> dict:
    """Digests of shards and of a mask, manifests, and what training reads of them."""
    import cxt

    mask = directory / "mask.npz"
    settings = {"length": 50_000, "accessible_run": 3000, "inaccessible_run": 1500}
    run("cxt.preprocess", "mask", spec=json.dumps(settings), seed=SEED, out=mask)
    result = {
        "mask": digest(*(np.load(mask)[name].tobytes() for name in sorted(np.load(mask).files) if name != "lineage")),
        "plain": make_dataset(directory, "plain"),
        "few": make_dataset(directory, "few", samples=6),
        "masked": make_dataset(directory, "masked", mask=["--mask", mask]),
    }
    for name in ("plain", "masked"):
        dataset = cxt.PairDataset(directory / name, "train")
        items = [dataset[number] for number in range(0, len(dataset), 5)]
        x, tokens = (np.stack([np.asarray(item[part]) for item in items]) for part in range(2))
        result[name]["tokens"] = digest(tokens.astype("<i8").tobytes())
        # Whole numbers but for the missing fraction in bin 0.
        result[name]["counts"] = digest(np.rint(np.expm1(x[..., 1:])).astype("<i4").tobytes())
        result[name]["x"] = summary(x)
    return result


def read_log(path: Path) -> dict:
    """The columns of a run's log that are no measurements of time."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    keep = ("step", "epoch", "train_loss", "val_loss", "val_mse", "val_r", "lr", "grad_norm")
    columns = {name: [float(row[name]) if row[name] else None for row in rows] for name in keep}
    return columns | {"lr": [rate / TRAINING["lr"] for rate in columns["lr"]]}


def train_one(directory: Path, name: str, dataset: str, *words, **changes) -> dict:
    """Weights and log of a run, and what its checkpoint says of the network."""
    with drawn_figures() as figures:
        run(
            "cxt.train", *words, **(TRAINING | changes), name=name, dataset_path=directory / dataset,
            run_dir=directory / f"{name}-run", out=directory / f"{name}.ckpt",
        )  # fmt: skip
    content = torch.load(directory / f"{name}.ckpt", weights_only=True)
    record = content["cxt"]
    return {
        "weights": {key: summary(value.double().numpy()) for key, value in content["state_dict"].items()},
        "log": read_log(directory / f"{name}-run" / "training_log.csv"),
        "record": {key: record.get(key) for key in ("model", "adapter", "training", "step", "epoch", "val_loss")},
        "figures": figures,
    }


def train(directory: Path) -> dict:
    """A network from scratch, one that reads missing data, an adapter, and a fine-tuned one."""
    adapter = {"checkpoint": directory / "plain.ckpt", "adapter_samples": 6, "adapter_bottleneck": 4, "last_n": 1, "epochs": 1}
    result = {
        "plain": train_one(directory, "plain", "plain"),
        "masked": train_one(directory, "masked", "masked", epochs=1, mask_singletons="false"),
        "adapter": train_one(directory, "adapter", "few", "--adapter", **adapter),
        "tuned": train_one(directory, "tuned", "plain", checkpoint=directory / "plain.ckpt", epochs=1, loss_path="full"),
    }
    for schedule in ("linear", "constant", "wsd"):
        changes = {"schedule": schedule, "layers": 1, "decode_items": 0}
        result[schedule] = {"lr": train_one(directory, schedule, "plain", **changes)["log"]["lr"]}
    return result


def teach(directory: Path) -> dict:
    """Soft targets for six haplotypes, by a teacher that reads ten of the same simulations."""
    out, batch = directory / "soft.npz", directory / "one.trees.batch"
    spec = json.dumps({"replicates": 3, "seed": SEED})
    run(
        "cxt.teach", checkpoint=directory / "plain.ckpt", shards=directory / "few" / "train" / "one-0.zarr.zip", batch=batch,
        start=0, count=10, spec=spec, threads=1, out=out,
    )  # fmt: skip
    with np.load(out) as arrays:
        return {"quantiles": summary(arrays["quantiles"] / 1000)}


@contextlib.contextmanager
def drawn_figures():
    """A list of what matplotlib's axes are given to draw, while the `with` block runs; no picture is made."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cxt.checkpoints.training_log import read_log

    calls = []

    def recording(name):
        method = getattr(Axes, name)

        def draw(axes, *arguments, **settings):
            arrays = [*arguments, *(value for value in settings.values() if isinstance(value, np.ndarray))]
            calls.append([name, *(summary(value) for value in arrays if not isinstance(value, str))])
            return method(axes, *arguments, **settings)

        return draw

    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot", "step", "stairs", "fill_between", "hexbin", "scatter", "hist", "bar"):
            patch.setattr(Axes, name, recording(name))
        # Speed is drawn, too, and is another one every time.
        patch.setattr("cxt.trainer.fit.read_log", lambda path: [row | {"items_per_s": None} for row in read_log(path)])
        patch.setattr(Figure, "savefig", lambda figure, out, **settings: out.write(b"picture"))
        yield calls


def evaluate(directory: Path) -> dict:
    """Metrics and baselines of three checkpoints, and what their figures are drawn from."""
    result = {}
    for name, scenario, changes, words in (
        ("plain", "one", {}, ()),
        ("masked", "baboons", {}, ("--mask", directory / "mask.npz")),
        ("adapter", "one", {"samples": 6}, ()),
    ):
        out = directory / f"{name}.json"
        batches = [{"path": str(directory / f"{scenario}.trees.batch"), "scenario": scenario, "start": 0, "count": 10}]
        spec = SHAPE | {"pairs": 2, "replicates": 3, "batch_size": 4, "seed": SEED} | changes
        with drawn_figures() as figures:
            run(
                "cxt.evaluate", *words, checkpoint=directory / f"{name}.ckpt", spec=json.dumps(spec),
                batches=json.dumps(batches), threads=1, out=out, figures=directory / name,
            )  # fmt: skip
        result[name] = {"result": json.loads(out.read_text()), "figures": figures}
    return result


TRANSLATIONS = {
    "plain": {"input": "one.trees.batch", "model": "plain.ckpt", "pairs": 4, "mutation_rate": 1.29e-8, "generation_time": 25},
    "masked": {
        "input": "baboons.trees.batch", "model": "masked.ckpt", "mask": "mask-start.npz", "mask_marks": "accessible",
        "regions": "1:3001-15000", "mutation_rate": 5.7e-9, "calibration": "gamma", "seed": SEED,
    },
    "panels": {"input": "one.trees.batch", "model": "adapter.ckpt", "panels": 2, "pairs": 3, "max_gap": 0},
    "populations": {"input": "two.trees.batch", "model": "plain.ckpt", "pairs": "between"},
}  # fmt: skip
FILES_OF_TRANSLATIONS = ("input", "model", "mask")


def translate(directory: Path) -> dict:
    """Tracks of the simulations by these networks: in one piece, masked and calibrated, by subsets, and of two populations."""
    import cxt

    with np.load(directory / "mask.npz") as mask:  # a mask has as many values as the contig
        np.savez(directory / "mask-start.npz", **{key: mask[key][:20_000] if mask[key].ndim else mask[key] for key in mask})
    result = {}
    for name, settings in TRANSLATIONS.items():
        out = directory / f"{name}-tracks"
        flags = {key: directory / value if key in FILES_OF_TRANSLATIONS else value for key, value in settings.items()}
        run("cxt.commands.translate", **flags, threads=1, out=out)
        tracks = cxt.Tracks(out)
        about = json.loads((out / "summary.json").read_text())
        with gzip.open(out / "tracks.tsv.gz", "rt") as file:
            table = [line for line in file if line.startswith("#") and "sha256" not in line]
        with (out / "ne.csv").open() as file:
            curve = list(csv.DictReader(file))
        result[name] = {
            "attributes": {key: value for key, value in tracks.attributes.items() if key != "checkpoint_sha256"},
            "tracks": {
                key: summary(tracks.array("1", key)[:])
                for key in ("start", "end", "mean", "sd", "quantiles", "accessible", "called")
            },
            "summary": {key: about[key] for key in ("pairs", "read", "contigs", "warnings")},
            "table": table,
            "ne": {key: summary([float(row[key]) for row in curve]) for key in ("time_from", "coalescence_rate", "share")},
        }
    return result


def plan(directory: Path) -> dict:
    """What `cxt plan` says of the two configurations at the two scales."""
    paper = REPOSITORY / "config" / "paper.yaml"
    return {
        "config.yaml": json.loads(run("cxt.plan", "--json")),
        "paper.yaml": json.loads(run("cxt.plan", "--json", configfile=paper)),
    }


def configuration(directory: Path) -> dict:
    """Resolved configurations, and the lineages that decide what is current."""
    from cxt.config.file import load
    from cxt.workflow.jobs import collect_variants
    from cxt.workflow.lineages import dataset_lineage, model_lineage

    files = {name: REPOSITORY / "config" / f"{name}.yaml" for name in ("paper", "paper_script")}
    result = {}
    for name, overlays in {
        "config": [],
        "paper": [files["paper"]],
        "paper_script": [files["paper"], files["paper_script"]],
        "tiny": [TINY],
    }.items():
        config = load(overlays)
        result[name] = {
            "sections": {key: digest(json.dumps(value, sort_keys=True).encode()) for key, value in config.items()},
            "variants": digest(json.dumps([v.name for v in collect_variants(config, list(config["scenarios"]))]).encode()),
            "datasets": {dataset: dataset_lineage(config, dataset) for dataset in config["datasets"]},
            "models": {model: model_lineage(config, model) for model in config["models"]},
        }
    return result


PARTS = (simulate, preprocess, train, teach, evaluate, translate, plan, configuration)


def compute(directory: Path) -> dict:
    """All outputs."""
    packages = ("msprime", "numpy", "stdpopsim", "torch", "tskit", "zarr")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"versions": versions} | {part.__name__: part(directory) for part in PARTS}


def differences(actual, recorded, at: str = "", *, smallest: float = 0.0) -> list[str]:
    """Where what was *actual* is not what is *recorded*, in words.

    Numbers with a fraction are equal within TOLERANCE of the recorded one, or within *smallest*.
    """
    if isinstance(recorded, dict) and isinstance(actual, dict):
        if recorded.keys() != actual.keys():
            return [f"{at}: has {sorted(actual)}, recorded are {sorted(recorded)}"]
        if recorded.keys() == {"shape", "norm", "sum", "nan"}:
            equal = TOLERANCE * recorded["norm"] + smallest
            wrong = [key for key in ("shape", "nan") if actual[key] != recorded[key]]
            wrong += [key for key in ("norm", "sum") if abs(actual[key] - recorded[key]) > equal]
            return [f"{at}.{key}: {actual[key]}, recorded is {recorded[key]}" for key in wrong]
        pairs = [(actual[key], recorded[key], f"{at}.{key}") for key in recorded]
    elif isinstance(recorded, list) and isinstance(actual, list) and len(recorded) == len(actual):
        pairs = [(*pair, f"{at}[{n}]") for n, pair in enumerate(zip(actual, recorded, strict=True))]
    else:
        if isinstance(recorded, float) and isinstance(actual, float):
            same = abs(actual - recorded) <= TOLERANCE * abs(recorded) + smallest
        else:
            same = actual == recorded and type(actual) is type(recorded)
        return [] if same else [f"{at}: {actual}, recorded is {recorded}"]
    return [text for pair in pairs for text in differences(*pair, smallest=smallest)]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict:
    """What the stages make now: computed in one process of its own, once for all that test."""
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "stage_outputs.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            run_python(__file__, "--out", file, env=ONE_THREAD)
    return json.loads(file.read_text())


ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.mark.parametrize("part", [part.__name__ for part in PARTS])
def test_output_is_as_recorded(outputs, part):
    recorded = json.loads(RECORD.read_text())
    smallest = 0.0 if part in ("simulate", "preprocess", "plan", "configuration") else SMALLEST
    wrong = differences(outputs[part], recorded[part], part, smallest=smallest)
    if not wrong:
        return
    if part in STAGES:
        advice = (
            f"the output of stage '{part}' has changed. Find out why; if it is meant to, raise STAGE_VERSION['{part}'] in "
            "src/cxt/lineage.py, or results made before would pass for current"
        )
    else:
        advice = f"what the {part} comes to has changed; if it is meant to, consider whether results on disk are concerned"
    versions = [
        f"{package} is {outputs['versions'][package]}, recorded with {version}"
        for package, version in recorded["versions"].items()
        if outputs["versions"][package] != version
    ]
    pytest.fail("\n".join([f"{advice}. Then run `make record`.", *versions, *wrong[:12]]), pytrace=False)


def test_differences():
    recorded = {"a": 1.0, "b": [1, None], "c": summary([1.0, 2.0])}
    assert not differences({"a": 1.00001, "b": [1, None], "c": summary([1.00001, 2.0])}, recorded)
    assert len(differences({"a": 1.001, "b": [2, None], "c": summary([1.001, 2.0])}, recorded, "x")) == 4
    assert differences({"a": 1.0}, recorded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} anew")
    parser.add_argument("--out", type=Path, help="write the outputs here instead")
    args = parser.parse_args()
    if args.record:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / RECORD.name
            run_python(__file__, "--out", file, env=ONE_THREAD)
            shutil.copyfile(file, RECORD)
    elif args.out:
        with tempfile.TemporaryDirectory() as directory:
            args.out.write_text(json.dumps(compute(Path(directory)), indent=1) + "\n")
    else:
        parser.error("give --record or --out")


if __name__ == "__main__":
    sys.exit(main())
