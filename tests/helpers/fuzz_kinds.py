"""What the fuzzer damages, how it is used afterwards, and what must hold if it is used at all.

A kind has `make`, which makes whole files once; `mutate`, which writes damaged ones into a directory and says what was done;
and `use`, which does with them what a user would. Whatever is refused must be refused by a message that names the file.
"""

import copy
import gzip
import hashlib
import io
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
import zarr
from zarr.storage import MemoryStore

import cxt.checkpoints.published
import cxt.data.pair_dataset
from cxt import PairDataset, load_model
from cxt.checkpoints.file import import_published, read_checkpoint
from cxt.checkpoints.inspection import compare_checkpoints, describe_checkpoint, read_verified_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.safetensors import write_export
from cxt.config.file import load, resolve
from cxt.data.export import describe_dataset, export_dataset, verify_dataset
from cxt.data.features import compute_missing_fraction
from cxt.data.grid import Grid
from cxt.data.manifest import write_manifest
from cxt.data.masks import read_mask
from cxt.data.shards import read_shard
from cxt.errors import BadRequest, Failed
from cxt.scenarios.indices import SPLITS
from cxt.trainer.fit import build_starting_model
from cxt.trainer.options import build_options, build_parser
from cxt.trainer.request import build_request
from cxt.trainer.train_model import train_model
from cxt.trainer.training_state import find_state_to_continue
from cxt.workflow import jobs, lineages
from cxt.workflow.costs import Costs
from cxt.workflow.estimates import estimate_costs, format_estimate
from cxt.workflow.verification import verify as verify_checkpoint
from helpers.mutators import archive_of, changed_archive, changed_array, changed_bytes, changed_text, changed_value
from helpers.repository import REPOSITORY
from helpers.simulations import build_dataset, constant_scenario

SHARD = "constant-0.zarr.zip"
LONGEST_MESSAGE = 6000


class Refusals:
    """What was refused while something was used, by messages that are fit to be read."""

    def __init__(self, *names: str):
        self.names, self.messages = names, []

    def attempt(self, function, *args, **kwargs):
        """What *function* returns, or None if it refuses."""
        try:
            return function(*args, **kwargs)
        except (BadRequest, Failed) as error:
            message = str(error)
            assert message.strip(), f"{function.__name__} refuses without a word"
            assert len(message) < LONGEST_MESSAGE, f"{function.__name__} refuses by {len(message)} letters"
            assert not self.names or any(name in message for name in self.names), f"no file is named: {message}"
            self.messages.append(message)
            return None


def same_tree(a, b) -> bool:
    """Whether two trees of values and tensors are equal, to the bit and the type."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b or (a != a and b != b)


class Shards:
    """A dataset in which a shard is damaged."""

    name = "shard"

    def make(self, directory: Path) -> None:
        self.whole = {}
        entry = constant_scenario(simulations=12, batch=12)
        mask = np.random.default_rng(1).random(50_000) < 0.3
        for name, settings in (("plain", {}), ("masked", {"mask": mask})):
            self.whole[name] = build_dataset(directory / name, entry=entry, sequence_length=10_000, pairs=4, **settings)
            (self.whole[name] / "batch").unlink()
        self.items = {name: self._items(path) for name, path in self.whole.items()}
        # Compiled here, which takes seconds; processes that are forked have it, and their time is that of the damage alone.
        for dtype in ("float32", "float16"):
            export_dataset(self.whole["masked"], directory / f"dense-{dtype}", limit=1, dtype=dtype)

    @staticmethod
    def _items(path) -> list:
        """All items of a dataset, as batches of both splits."""
        batches = []
        for split in SPLITS:
            items = PairDataset(path, split)
            batches.append([None if part is None else part.clone() for part in items.batch(range(len(items)))])
        return batches

    def mutate(self, rng: random.Random, directory: Path) -> dict:
        which = rng.choice(("plain", "plain", "masked"))
        shutil.copytree(self.whole[which], directory / "data")
        split = rng.choice(SPLITS)
        shard = directory / "data" / split / SHARD
        before = shard.read_bytes()
        way = rng.choice(("bytes", "archive", "archive", "arrays", "arrays", "arrays", "attributes"))
        if way == "bytes":
            shard.write_bytes(changed_bytes(before, rng))
        elif way == "archive":
            shard.write_bytes(changed_archive(before, rng))
        else:
            arrays, attributes = read_shard(shard)
            if way == "attributes":
                attributes = changed_value(attributes, rng)
            else:
                way += " " + self._change_arrays(arrays, attributes, rng)
            write_arrays(shard, arrays, attributes)
        changed = shard.read_bytes() != before
        listed = rng.choice(("row", "row", "row", "manifest", "not"))
        if listed == "row":
            list_shard(directory / "data", split)
        return {"what": f"{which} {split}, {way}, {listed}", "whole": which, "changed": changed, "listed": listed, "way": way}

    @staticmethod
    def _change_arrays(arrays: dict, attributes: dict, rng: random.Random) -> str:
        name = rng.choice(sorted(arrays))
        way = rng.choice(("array", "array", "array", "array", "array", "lose", "add", "two", "padding", "pairs", "none", "all"))
        if way == "lose":
            del arrays[name]
        elif way == "add":
            arrays["unknown"] = arrays[name]
        elif way == "padding":
            arrays["genotypes"][..., -1] |= 0xF0
        elif way == "pairs":
            pair = rng.choice(((3, 3), (0, attributes["samples"]), (65535, 0), (1, 0)))
            arrays["pairs"][rng.randrange(len(arrays["pairs"])), rng.randrange(arrays["pairs"].shape[1])] = pair
        elif way in ("none", "all"):  # of the haplotypes carry the derived allele
            arrays["genotypes"][rng.randrange(len(arrays["genotypes"]))] = (0, 0, 0) if way == "none" else (255, 255, 15)
        else:
            for each in [name] if way == "array" else rng.sample(sorted(arrays), 2):
                arrays[each] = changed_array(arrays[each], rng)
        return f"{way} {name}"

    def use(self, directory: Path, did: dict) -> list[str]:
        data = directory / "data"
        refusals = Refusals(str(data))
        if did.get("listed") == "manifest":
            refusals.attempt(write_manifest, data, {split: [f"{split}/{SHARD}"] for split in SPLITS})
        use_dataset(data, refusals)
        if did.get("listed") == "not" and did["changed"]:
            assert refusals.messages, "a shard was read whose checksum is not the manifest's"
        elif did["way"] == "bytes" and not refusals.messages:
            assert same_tree(self._items(data), self.items[did["whole"]]), "a damaged shard was read, and gave other items"
        return refusals.messages


def write_arrays(path, arrays: dict, attributes: dict) -> None:
    """Any arrays and attributes as a shard is written."""
    content: dict = {}
    group = zarr.open_group(MemoryStore(content), mode="w", zarr_format=3)
    for name, array in arrays.items():
        stored = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=tuple(max(1, n) for n in array.shape))
        if array.size:
            stored[...] = array
    entries = {key: buffer.to_bytes() for key, buffer in content.items()}
    meta = json.loads(entries["zarr.json"])
    meta["attributes"] = attributes if isinstance(attributes, dict) else {"schema_version": attributes}
    entries["zarr.json"] = json.dumps(meta).encode()
    Path(path).write_bytes(archive_of(entries.items()))


def list_shard(data: Path, split: str) -> None:
    """Let dataset.json say that the shard is as it now is."""
    shard = (data / split / SHARD).read_bytes()
    manifest = json.loads((data / "dataset.json").read_text())
    part = manifest["splits"][split]
    row = part["shards"][0]
    row["sha256"], row["bytes"] = hashlib.sha256(shard).hexdigest(), len(shard)
    part["bytes"] = len(shard)
    (data / "dataset.json").write_text(json.dumps(manifest))


def use_dataset(data: Path, refusals: Refusals) -> None:
    """Read a dataset, compare items with what its shards hold, and do what `cxt dataset` does."""
    for split in SPLITS:
        items = refusals.attempt(PairDataset, data, split)
        if items is not None:
            for i in {0, len(items) // 2, len(items) - 1} if len(items) else ():
                compare_item(items, i)
            items.batch(range(len(items)))
    refusals.attempt(describe_dataset, data)
    before = len(refusals.messages)
    refusals.attempt(verify_dataset, data)
    if before == len(refusals.messages):
        assert not refusals.messages, f"verified, but refused elsewhere: {refusals.messages}"
    for limit, dtype in ((None, "float32"), (1, "float16")):
        refusals.attempt(export_dataset, data, data.parent / f"dense-{dtype}", limit=limit, dtype=dtype)


def compare_item(items: PairDataset, i: int) -> None:
    """One item against a plain count of what its shard holds."""
    at = i // items.pairs_per_simulation
    for row in items.manifest["splits"][items.split]["shards"]:
        rows_in_shard = row["items"] // items.pairs_per_simulation
        if at < rows_in_shard:
            break
        at -= rows_in_shard
    arrays, attributes = read_shard(items.path / row["path"])
    size, length, n = attributes["window_size"], attributes["sequence_length"], attributes["samples"]
    sites = slice(*arrays["site_offsets"][at : at + 2])
    positions = arrays["positions"][sites]
    genotypes = np.unpackbits(arrays["genotypes"][sites], axis=1, bitorder="little")
    assert not genotypes[:, n:].any(), "padding bits are set"
    genotypes = genotypes[:, :n]
    derived = genotypes.sum(axis=1)
    assert np.all((derived > 0) & (derived < n)), "a site is not segregating"
    a, b = map(int, arrays["pairs"][at, i % items.pairs_per_simulation])
    assert a != b, "a pair of one haplotype"
    differs = genotypes[:, a] != genotypes[:, b]
    scales, windows = attributes["scales"], length // size
    expected = np.zeros((2, len(scales), windows, n))
    for s, scale in enumerate(scales):
        for k in range(windows):
            inside = (positions >= k * size) & (positions < min((k + scale) * size, length))
            for channel, which in enumerate((differs, ~differs)):
                expected[channel, s, k] = np.bincount(derived[inside & which], minlength=n)
    expected = np.log1p(expected)
    if attributes["missing"]:
        mask = np.unpackbits(arrays["mask"][at], count=length, bitorder="little")
        for s, scale in enumerate(scales):
            for k in range(windows):
                f = mask[k * size : min((k + scale) * size, length)].mean()
                expected[:, s, k, 0] = np.log1p(np.exp((f, 1 - f)))
    x, y = items[i]
    assert np.allclose(x.numpy(), expected, atol=1e-5), f"item {i} is not what its shard holds"
    target = arrays["log_tmrca"][at, i % items.pairs_per_simulation]
    assert np.array_equal(y.numpy()[1:], Grid().tokens(target[None])[0][1:]), f"targets of item {i}"
    assert items.describe(i).pair == (a, b)


class Manifests(Shards):
    """A dataset whose dataset.json is damaged."""

    name = "manifest"

    def mutate(self, rng: random.Random, directory: Path) -> dict:
        which = rng.choice(("plain", "masked"))
        shutil.copytree(self.whole[which], directory / "data")
        file = directory / "data" / "dataset.json"
        before = file.read_bytes()
        way = rng.choice(("bytes", "text", "values", "values", "values", "rows", "deep"))
        if way == "bytes":
            file.write_bytes(changed_bytes(before, rng))
        elif way == "text":
            file.write_text(changed_text(before.decode(), rng))
        elif way == "deep":
            file.write_text(rng.choice(("[" * 100_000, '{"a":' * 100_000, "9" * 10_000, json.dumps(None), '"x"')))
        else:
            manifest = json.loads(before)
            if way == "rows":  # the totals follow
                part = manifest["splits"][rng.choice(SPLITS)]
                part["shards"] = changed_value(part["shards"], rng)
                for key in ("simulations", "items", "sites", "bytes"):
                    try:
                        part[key] = sum(row[key] for row in part["shards"])
                    except (TypeError, KeyError):
                        break
            else:
                manifest = changed_value(manifest, rng)
            file.write_text(json.dumps(manifest))
        # A list without shards, and numbers that agree with it, is a dataset of fewer items.
        is_another = way == "rows" and any(part["shards"] == [] for part in manifest["splits"].values())
        return {"what": f"{which}, {way}", "whole": None if is_another else which}

    def use(self, directory: Path, did: dict) -> list[str]:
        data = directory / "data"
        refusals = Refusals(str(data))
        use_dataset(data, refusals)
        if not refusals.messages and did["whole"] is not None:
            assert same_tree(self._items(data), self.items[did["whole"]]), "a damaged manifest was read, and gave other items"
        return refusals.messages


ODD_TENSORS = (
    None, "text", 1.0, [1.0], {}, torch.zeros(()), torch.zeros(0), torch.zeros(3, 3), torch.full((2, 2), float("nan")),
    torch.zeros(1).expand(10**6, 10**6), torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(2, 2, dtype=torch.bool),
    torch.eye(2).to_sparse(), torch.zeros(2, 2, dtype=torch.float64),
)  # fmt: skip


class Checkpoints:
    """Checkpoints, published, exported and in a run directory; and the saves that a run is continued from."""

    name = "checkpoint"
    settings = {
        "layers": 2, "heads": 2, "width": 16, "dropout": 0.1, "threads": 1, "devices": 0, "batch_size": 4, "grad_accum": 1,
    }  # fmt: skip
    files = ("broad.ckpt", "adapter.ckpt", "exported", "published_style.ckpt", "published_style_adapter.ckpt", "save")

    def make(self, directory: Path) -> None:
        self.home = directory
        entry = constant_scenario(simulations=12, batch=12)
        for samples in (20, 10):
            build_dataset(directory / f"n{samples}", entry=entry, sequence_length=10_000, pairs=4, samples=samples)
        settings = self.settings | {"epochs": 1, "save_every": 3, "save_minutes": 0, "keep_saves": 9, "decode_items": 0}
        run = directory / "run"
        train_model(dataset_path=directory / "n20", run_dir=run, out=directory / "broad.ckpt", model="broad", **settings)
        train_model(
            dataset_path=directory / "n10", run_dir=directory / "run10", out=directory / "adapter.ckpt", model="broad",
            checkpoint=directory / "broad.ckpt", adapter=True, adapter_bottleneck=4, **settings,
        )  # fmt: skip
        whole = read_checkpoint(directory / "broad.ckpt")
        write_export(directory / "exported", whole.state_dict, whole.record)
        for name in ("published_style.ckpt", "published_style_adapter.ckpt"):
            shutil.copy(REPOSITORY / "tests" / "golden" / name, directory / name)
        # The run as if it had been killed after its second save.
        state = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(state | {"finished": None}))
        saves = sorted((run / "checkpoints").glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
        for path in (run / "checkpoints").iterdir():
            if path not in saves[:2]:
                path.unlink()
        (run / "checkpoints" / "last.ckpt").symlink_to(saves[1].name)
        self.saves = [path.name for path in saves[:2]]
        self.content = {path.name: torch.load(path, weights_only=True) for path in saves[:2]}
        self.models = {name: load_model(self._path(directory, name)).state_dict() for name in self.files}

    def _path(self, directory: Path, name: str) -> Path:
        return directory / "run" / "checkpoints" / self.saves[1] if name == "save" else directory / name

    def mutate(self, rng: random.Random, directory: Path) -> dict:
        name = rng.choice(("broad.ckpt", "save", *self.files))
        if name == "save":
            shutil.copytree(self.home / "run", directory / "run", symlinks=True)
        elif name == "exported":
            shutil.copytree(self.home / "exported", directory / "exported")
        file = source = self._path(directory, name)
        if name == "exported":
            file = file / rng.choice(("config.json", "model.safetensors"))
            source = self.home / "exported" / file.name
        elif name != "save":
            source = self.home / name
        before = source.read_bytes()
        way = rng.choice(("bytes", "bytes", "bytes", "archive", "content", "content", "content"))
        if file.name == "config.json" and way != "bytes":
            way = "values"
            file.write_text(json.dumps(changed_value(json.loads(before), rng)))
        elif way == "bytes" or name == "exported":
            way = "bytes"
            file.write_bytes(changed_bytes(before, rng))
            if name == "exported" and file.suffix == ".safetensors" and rng.random() < 0.7:
                way = "bytes, digest"
                config = json.loads((file.parent / "config.json").read_text())
                config["weights"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
                (file.parent / "config.json").write_text(json.dumps(config))
        elif way == "archive":
            file.write_bytes(changed_archive(before, rng))
        else:
            way += " " + self._change_content(source, file, rng)
        return {"what": f"{name}, {way}", "name": name, "way": way}

    @staticmethod
    def _change_content(source: Path, file: Path, rng: random.Random) -> str:
        """Read a torch file, change what is in it, and write it again."""
        with cxt.checkpoints.published.allow_published_classes():
            content = torch.load(source, weights_only=True)
        if "cxt" not in content:
            hyper = content["hyper_parameters"]
            hyper["gpt_config"] = dict(hyper["gpt_config"].fields)
        way = rng.choice(("record", "record", "tensor", "tensor", "names", "top", "all"))
        weights = content["state_dict"]
        key = rng.choice(list(weights))
        if way == "record":
            part = "cxt" if "cxt" in content else "hyper_parameters"
            content[part] = changed_value(content[part], rng)
        elif way == "tensor":
            weights[key] = rng.choice(
                (
                    *ODD_TENSORS,
                    weights[key].double(),
                    weights[key].T,
                    weights[key][None],
                    torch.full_like(weights[key], math.nan),
                )
            )
        elif way == "names":
            weights[rng.choice((key + "x", "", 3, None))] = weights[key]
            if rng.random() < 0.5:
                del weights[key]
        elif way == "top":
            key = rng.choice(list(content))
            if rng.random() < 0.5:
                del content[key]
            else:
                content[key] = copy.deepcopy(rng.choice((None, "text", 3, [], {}, torch.zeros(2), -1, 10**30)))
        else:
            content = changed_value(content, rng)
        torch.save(content, file)
        return way

    def use(self, directory: Path, did: dict) -> list[str]:
        name = did["name"]
        path = self._path(directory, name)
        refusals = Refusals(str(directory))
        attempt = refusals.attempt
        # Whole ones are refused, too: by the configuration, as no file of the original package, or as no adapter.
        for_other_reasons = Refusals(str(directory)).attempt
        model = attempt(load_model, path)
        if model is not None:
            self._use_model(model)
            if did["way"] == "bytes":
                assert same_tree(dict(model.state_dict()), dict(self.models[name])), "damaged weights were loaded"
        file = path / "config.json" if name == "exported" else path
        attempt(describe_checkpoint, file)
        whole = attempt(read_verified_checkpoint, file)
        for_other_reasons(verify_checkpoint, file, configfiles=[REPOSITORY / "tests" / "tiny.yaml"])
        other = self.home / "broad.ckpt"
        for pair in ((file, other), (other, file)):
            attempt(compare_checkpoints, *pair, rtol=1e-5, atol=1e-6)
        if whole is not None:
            write_export(directory / "again", whole.state_dict, whole.record)
            again = load_model(directory / "again").state_dict()
            assert all(torch.equal(again[key], value) for key, value in whole.state_dict.items())
            assert model is not None, "called whole, but not loaded"
        for_other_reasons(import_published, path, directory / "imported.ckpt")
        self._use_as_parent(path, for_other_reasons)
        if name == "save":
            self._continue(directory, did, refusals)
        return refusals.messages

    @staticmethod
    def _use_model(model) -> None:
        """Decode something; the distributions must be distributions."""
        config = model.config
        assert config.windows * config.layers * config.width < 10**6, "an absurd network was built"
        counts = torch.randint(0, 3, (1, 2, config.scales, config.windows, model.samples)).cumsum(2).float()
        # Bin 0 is empty, or says that nothing is missing.
        bin0 = torch.tensor([0.0, 0.0] if config.mask_singletons else [1.0, math.e])
        counts[..., 0] = bin0[None, :, None, None]
        x = torch.log1p(counts)
        tokens, probabilities = model.generate(x, window_size=config.window_size, replicates=2)
        assert tokens.shape == (1, 2, config.windows)
        if all(torch.isfinite(value).all() and value.abs().max() < 1e3 for value in model.state_dict().values()):
            assert torch.allclose(probabilities.sum(-1), torch.ones(()), atol=1e-4), "no distributions"
        else:
            assert all(torch.isfinite(value).all() for value in model.state_dict().values()), "weights that are not finite"

    def _use_as_parent(self, path: Path, attempt) -> None:
        """Plan training that starts from it."""
        for verb, samples, more in (
            ("--checkpoint", 20, []),
            ("--checkpoint", 10, ["--adapter"]),
            ("--resume-adapter", 10, ["--adapter-bottleneck", "4"]),
        ):
            words = [f"--{key.replace('_', '-')}={value}" for key, value in self.settings.items()]
            args = build_parser().parse_args([*words, verb, str(path), "--dataset-path", str(self.home / f"n{samples}"), *more])
            request = attempt(build_request, build_options(vars(args)))
            if request is not None:
                attempt(build_starting_model, request)

    def _continue(self, directory: Path, did: dict, refusals: Refusals) -> None:
        """Continue the run whose newest save is damaged: from it, if it is what it was, or from the one before."""
        run = RunDirectory(directory / "run")
        for wanted in (None, run.checkpoints / self.saves[1]):
            state = refusals.attempt(find_state_to_continue, run, "broad", wanted=wanted)
            if state is not None and did["way"] == "bytes":
                content = torch.load(state, weights_only=True)
                assert same_tree(content, self.content[state.name]), "a damaged save would be continued"
        out, refusals.names = directory / "out.ckpt", ()  # training names what it was doing
        if refusals.attempt(train_model, run.path / "config.yaml", run_dir=run.path, out=out) is not None:
            if did["way"] == "bytes":
                assert out.read_bytes() == (self.home / "broad.ckpt").read_bytes(), "continued to other weights"
            refusals.attempt(read_verified_checkpoint, out)


class Configurations:
    """An overlay of all kinds of entries over the default configuration."""

    name = "configuration"

    def make(self, directory: Path) -> None:
        with open(REPOSITORY / "tests" / "tiny.yaml") as file:
            self.config = yaml.safe_load(file)
        demes = yaml.safe_load((REPOSITORY / "config" / "examples" / "two_islands.demes.yaml").read_text())
        self.demes = directory / "two_islands.demes.yaml"
        self.demes.write_text(yaml.safe_dump(demes))
        np.savez(directory / "mask.npz", accessible=np.ones(30_000, dtype=bool))
        self.config["seed"] = 3
        self.config["scenarios"] |= {
            "bottleneck": {
                "kind": "msprime", "simulations": 20, "batch": 10, "sequence_length": 20_000, "mutation_rate": [1e-8, 2e-8],
                "recombination_rate": 1e-8,
                "history": [{"time": 0, "population_size": 20_000}, {"time": 1000, "population_size": 2000}],
            },
            "islands": {
                "kind": "demes", "demography": str(self.demes), "samples": {"mainland": 15, "island": 10}, "simulations": 20,
                "mutation_rate": 1.5e-8, "recombination_rate": 1e-8, "sequence_length": 20_000,
            },
        }  # fmt: skip
        self.config["scenario_sets"] = {"own": ["bottleneck", "islands"]}
        self.config["datasets"] |= {
            "own": {
                "scenarios": "own", "sequence_length": 20_000, "pairs": 4, "window_size": 2000, "samples": 20,
                "scales": [2, 4], "mask": {"path": str(directory / "mask.npz"), "key": "accessible"},
            }
        }  # fmt: skip
        self.config["models"] |= {
            "own": {
                "preset": "w200_wmissing", "dataset": "own", "architecture": {"layers": 1, "heads": 2, "width": 16},
                "training": {"lr": 3e-4, "min_lr": 1e-5, "batch_size": 4}, "evaluation": ["bottleneck"],
            }
        }  # fmt: skip
        self.whole = self._plan(load([self._write(directory / "whole.yaml", self.config)]))

    @staticmethod
    def _write(path: Path, config) -> Path:
        path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return path

    @staticmethod
    def _plan(config: dict) -> dict:
        costs = Costs([])
        plan = estimate_costs(config, costs)
        format_estimate(config, plan, costs, all_variants=True)
        lineages.table_lineage(config)
        return plan

    def mutate(self, rng: random.Random, directory: Path) -> dict:
        file = directory / "overlay.yaml"
        way = rng.choice(("bytes", "text", "text", "values", "values", "values", "part", "part", "demes", "knot"))
        if way == "values":
            self._write(file, changed_value(self.config, rng))
        elif way == "part":
            part = rng.choice(("scenarios", "datasets", "models", "training", "evaluation"))
            self._write(file, self.config | {part: changed_value(self.config[part], rng)})
        elif way == "demes":
            config = copy.deepcopy(self.config)
            self._write(directory / "changed.demes.yaml", changed_value(yaml.safe_load(self.demes.read_text()), rng))
            config["scenarios"]["islands"]["demography"] = str(directory / "changed.demes.yaml")
            self._write(file, config)
        elif way == "knot":
            depth = rng.choice((25, 60))
            knots = [f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(depth)]
            if rng.random() < 0.5:
                knots = [f"a{i + 1}: &a{i + 1} {{x: *a{i}, y: *a{i}}}" for i in range(depth)]
            where = rng.choice(("training", "models", "unknown"))
            file.write_text("\n".join([f"{where}:", "  a0: &a0 [1]", *("  " + line for line in knots)]) + "\n")
        else:
            text = self._write(file, self.config).read_text()
            if way == "bytes":
                file.write_bytes(changed_bytes(text.encode(), rng))
            else:
                file.write_text(changed_text(text, rng), encoding="utf-8")
        return {"what": way}

    def use(self, directory: Path, did: dict) -> list[str]:
        refusals = Refusals()
        config = refusals.attempt(load, [directory / "overlay.yaml"])
        if config is None:
            return refusals.messages
        config["scenario_sets"] = {}  # sets may name scenarios that were removed
        assert resolve(copy.deepcopy(config)) == config, "what was resolved is not resolved"
        refusals.attempt(jobs.check_plan, config)
        if refusals.messages:
            return refusals.messages
        plan = self._plan(config)
        bad = [number for number in re.findall(r"[^\s:,{\[]+", json.dumps(plan)) if number in ("NaN", "Infinity", "-Infinity")]
        assert not bad, "the plan holds numbers that are none"
        return []


ODD_LINES = (
    "chr1\t-5\t7", "chr1\t9\t3", f"chr1\t0\t{10**14}", "chr1\t1.5\t3", "chr1 5", "track name=x", "browser x", "# x",
    "chr1\t5\t9\tsample", "chrom\tstart\tend", "chr1\t5\tnan", "chr1\t٣\t٩", "chr1\t1_0\t2_0", "\ufeffchr1\t1\t2",
)  # fmt: skip


class Masks:
    """Accessibility masks: BED, plain and compressed, and .npz."""

    name = "mask"

    def make(self, directory: Path) -> None:
        rng = np.random.default_rng(5)
        edges = np.sort(rng.choice(20_000, 40, replace=False)).reshape(-1, 2)
        self.bed = "".join(f"chr1\t{left}\t{right}\n" for left, right in edges)
        self.two = self.bed + "".join(f"chr2\t{left}\t{right}\n" for left, right in edges)
        self.accessible = np.zeros(int(edges.max()), dtype=bool)
        for left, right in edges:
            self.accessible[left:right] = True

    def mutate(self, rng: random.Random, directory: Path) -> dict:
        way = rng.choice(
            ("bed", "bed", "bed", "bytes", "gz", "gz inside", "npz", "npz array", "npz array", "npz archive", "lines")
        )
        contig = None
        if way in ("bed", "lines", "bytes"):
            file = directory / "mask.bed"
            contig = rng.choice((None, "chr1"))
            text = self.bed if contig is None else self.two
            if way == "bytes":
                file.write_bytes(changed_bytes(text.encode(), rng))
            elif way == "lines":
                lines = text.splitlines()
                lines.insert(rng.choice((0, rng.randrange(len(lines)))), rng.choice(ODD_LINES))
                file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            else:
                file.write_text(changed_text(text, rng), encoding="utf-8")
        elif way.startswith("gz"):
            file = directory / "mask.bed.gz"
            data = self.bed.encode()
            file.write_bytes(
                changed_bytes(gzip.compress(data), rng) if way == "gz" else gzip.compress(changed_bytes(data, rng))
            )
        else:
            file = directory / "mask.npz"
            out = io.BytesIO()
            array = self.accessible
            if way == "npz array":
                array = changed_array(rng.choice((array, array.astype("float32"), array.astype("int64"))), rng)
                if rng.random() < 0.2:
                    array = rng.choice((np.array(["yes", "no"]), np.array([None, 1]), np.zeros(3, "M8[s]"), np.array(1.0)))
            rng.choice((np.savez, np.savez_compressed))(out, **{rng.choice(("accessible",) * 9 + ("other",)): array})
            data = out.getvalue()
            if way != "npz array":
                data = (changed_bytes if way == "npz" else changed_archive)(data, rng)
            file.write_bytes(data)
        return {"what": f"{file.name}, {way}", "file": file.name, "contig": contig, "way": way}

    def use(self, directory: Path, did: dict) -> list[str]:
        file = directory / did["file"]
        refusals = Refusals(str(file))
        mask = refusals.attempt(read_mask, file, contig=did["contig"])
        if mask is None:
            return refusals.messages
        assert mask.dtype == bool, f"a mask of {mask.dtype}"
        assert mask.ndim == 1, f"a mask of shape {mask.shape}"
        assert len(mask) < 10**8, f"a mask of {len(mask)} bases"
        if did["way"] in ("npz", "gz"):
            assert np.array_equal(~mask, self.accessible), "a damaged mask was read, and is another one"
        elif file.suffix == ".npz":
            array = np.load(file)["accessible"]
            assert np.isin(array, (0, 1)).all(), "a mask of other values than 0 and 1"
            assert np.array_equal(mask, array == 0)
        else:
            expected = bed_by_hand(file, did["contig"], len(mask))
            assert np.array_equal(~mask, expected), "not the intervals of the file"
        if len(mask) >= 1000:
            length = len(mask) // 1000 * 1000
            fractions = compute_missing_fraction(mask, window_size=1000, sequence_length=length)
            assert ((fractions >= 0) & (fractions <= 1)).all()
            assert np.allclose(fractions[0][0], mask[: min(2000, length)].mean())
        return []


def bed_by_hand(file: Path, contig: str | None, length: int) -> np.ndarray:
    """The accessible bases of a BED file, line by line."""
    text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8-sig")
    accessible = np.zeros(length, dtype=bool)
    for line in text.splitlines():
        fields = line.split()
        if (
            len(fields) >= 3
            and not fields[0].startswith("#")
            and fields[1].isdigit()
            and fields[2].isdigit()
            and contig in (None, fields[0])
        ):
            assert int(fields[1]) <= int(fields[2]) <= length
            accessible[int(fields[1]) : int(fields[2])] = True
    return accessible


KINDS = {kind.name: kind for kind in (Shards, Manifests, Checkpoints, Configurations, Masks)}
