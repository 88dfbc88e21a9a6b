"""Measured costs of simulations, shards and arithmetic, shipped with the package or measured on this machine.

`measure_costs` measures them; `Costs` looks them up. The shipped costs are `cxt/workflow/costs.json`.
"""

import json
import math
import signal
import tempfile
import time
from pathlib import Path

from cxt.config.models import build_adapter_config, build_network_config, build_training_config
from cxt.config.on_the_fly import list_stored_datasets
from cxt.config.tree_files import count_pieces
from cxt.config.variants import Variant
from cxt.data.masks import draw_synthetic_mask, read_mask
from cxt.errors import BadRequest
from cxt.io import digest
from cxt.scenarios.registry import simulate_tree_sequence
from cxt.workflow.jobs import collect_variants, dataset_spec, evaluation_scenarios, get_device_count
from cxt.workflow.resources import training_threads

SHIPPED_COSTS = Path(__file__).with_name("costs.json")
LOCAL_COSTS = Path("results/costs.json")
"""File to which `--calibrate` writes its costs, and in which the plan looks for them."""

MAX_SIMULATION_SECONDS = 120
"""Seconds that one simulation may take; if it takes longer, `EXTRAPOLATION_LENGTHS` base pairs are measured instead."""

EXTRAPOLATION_LENGTHS = (50_000, 100_000)
"""Lengths in base pairs from which the cost of a slow simulation is extrapolated, as a power of the length."""


def variant_key(spec: dict) -> str:
    """Key of a variant's cost: the digest of its parameters without name and length."""
    return digest({key: value for key, value in spec.items() if key not in ("name", "sequence_length")})


def shard_key(spec: dict, dataset: dict, masked: bool) -> str:
    """Key of the cost of preprocessing a variant for a dataset."""
    return digest([variant_key(spec), spec["sequence_length"], dataset, masked])


def _unmapped(spec: dict) -> dict:
    return {key: value for key, value in spec.items() if key != "genetic_map"}


def read_costs(path) -> dict:
    """The content of a costs file: machines, simulations, shards and rates; BadRequest if it is not one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        parts = [content[key] for key in ("machines", "simulations", "shards", "rates")]
        if not all(isinstance(part, dict) for part in [*parts, *parts[1].values(), *parts[2].values(), *parts[3].values()]):
            raise TypeError("a part is not a mapping")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} is not a file of costs ({error}); delete it, or create it with --calibrate") from None
    return content


class Costs:
    """Measured costs: the shipped ones, overridden by those in *files*, in order.

    Raises
    ------
    BadRequest
        If a file is not a file of costs.
    """

    def __init__(self, files=()):
        self.simulations: dict = {}
        self.shards: dict = {}
        self.rates: dict = {}
        self.machines: list[str] = []
        for path in (SHIPPED_COSTS, *files):
            content = read_costs(path)
            for key, lengths in content["simulations"].items():
                self.simulations[key] = self.simulations.get(key, {}) | lengths
            self.shards |= content["shards"]
            self.rates |= content["rates"]
            self.machines += [f"{kind}: {machine}" for kind, machine in content["machines"].items()]

    def simulation(self, spec: dict) -> dict | None:
        """{seconds, bytes, …} of one simulation of a variant; None if unknown.

        `extrapolated` tells whether it is derived from another length, or from average rates instead of a genetic map.
        """
        lengths = self.simulations.get(variant_key(spec), {})
        if not lengths and "genetic_map" in spec:
            cost = self.simulation(_unmapped(spec))
            return cost and cost | {"extrapolated": True}
        asked = spec["sequence_length"]
        if str(asked) in lengths:
            return lengths[str(asked)] | {"extrapolated": False}
        if not lengths:
            return None
        nearest = sorted(map(int, lengths), key=lambda length: (abs(math.log(length / asked)), length))
        measured, scale = lengths[str(nearest[0])], asked / nearest[0]
        power = 1.0
        if len(nearest) > 1 and all(length < asked for length in nearest):
            other = lengths[str(nearest[1])]
            power = math.log(measured["seconds"] / other["seconds"]) / math.log(nearest[0] / nearest[1])
        linear = {key: measured[key] * scale for key in ("trees", "sites", "bytes")}
        return {**linear, "seconds": measured["seconds"] * scale ** max(1.0, power), "extrapolated": True}

    def shard(self, spec: dict, dataset: dict, masked: bool) -> dict | None:
        """{seconds, bytes} of one simulation in a dataset; None if unknown."""
        cost = self.shards.get(shard_key(spec, dataset, masked))
        if cost is None and "genetic_map" in spec:
            return self.shards.get(shard_key(_unmapped(spec), dataset, masked))
        return cost

    def flops_per_second(self, what: str, *, gpu: bool, adapter: bool = False) -> float:
        """Measured FLOP/s of *what* (training or decoding) on one GPU, or in one CPU thread."""
        device = "gpu" if gpu else "cpu"
        try:
            rates = self.rates[device]
            rows = list(rates[what].values())
            alike = [row for row in rows if row["adapter"] == adapter] or rows
            mean = sum(row["flops_per_second"] for row in alike) / len(alike)
            return mean if gpu else mean / rates["threads"]
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            raise BadRequest(
                f"the measured costs have no usable rate of {what} on a {device}; run --calibrate on a machine with one"
            ) from None


class TooLong(Exception):
    """A simulation took longer than it may."""


def _simulate(spec: dict, index: int, seconds: float):
    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0 if math.isinf(seconds) else seconds)  # 0 = never
    try:
        return simulate_tree_sequence(spec, index=index, seed=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure_simulation(spec: dict, *, budget: float, longest: float, most: int = 20) -> tuple[dict, list]:
    """Mean cost of a variant's first simulations, and these simulations, as many as take *budget* seconds (at least one).

    The first one also includes one-time costs; its time counts only if there is no other.

    Raises
    ------
    TooLong
        If one takes more than *longest* seconds.
    """
    made, spent, size = [], [], []
    while not made or (len(made) < most and sum(spent) < budget):
        began = time.process_time()
        made.append(_simulate(spec, len(made), longest))
        spent.append(time.process_time() - began)
    with tempfile.TemporaryFile() as file:
        for ts in made:
            before = file.tell()
            ts.dump(file)
            size.append(file.tell() - before)
    counted = spent[1:] or spent

    def mean(values):
        return sum(values) / len(made)

    cost = {
        "name": spec["name"],
        "seconds": sum(counted) / len(counted),
        "trees": mean(ts.num_trees for ts in made),
        "sites": mean(ts.num_sites for ts in made),
        "bytes": mean(size),
        "replicates": len(made),
    }
    return cost, made


def shorten_spec(spec: dict, length: int) -> dict:
    """A variant's parameters for a shorter sequence; a position is scaled with the length."""
    scale = length / spec["sequence_length"]
    moved = {"position": spec["position"] * scale} if "position" in spec else {}
    return spec | {"sequence_length": length} | moved


def measure_shard(simulations, dataset: dict, mask, *, most: int = 3) -> dict:
    """Mean seconds and bytes of the first *most* simulations in a shard of a dataset."""
    # Imported late, because every job of the workflow reads costs, and numba takes half a second.
    from cxt.data.preprocessing import preprocess_simulation
    from cxt.data.shards import write_shard

    regions = range(dataset["regions_per_simulation"])
    chosen = simulations[:most]
    preprocess_simulation(chosen[0], dataset, mask=mask)  # compiles
    began = time.process_time()
    preprocessed = [preprocess_simulation(ts, dataset, mask=mask, region=region) for ts in chosen for region in regions]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard"
        shape = {key: dataset[key] for key in ("window_size", "sequence_length", "samples", "pairs", "scales")}
        write_shard(path, preprocessed, shape | {"missing": mask is not None, "scenario": "x", "split": "train", "seed": 1})
        size = path.stat().st_size
    return {"seconds": (time.process_time() - began) / len(chosen), "bytes": size / len(chosen)}


def list_used_variants(config: dict) -> list[Variant]:
    """Every variant that a dataset or an evaluation of *config* uses."""
    names = {name for dataset in config["datasets"].values() for name in dataset["scenarios"]}
    names |= {name for model in config["models"] for name in evaluation_scenarios(config, model)}
    return collect_variants(config, [name for name in config["scenarios"] if name in names])


def measure_costs(
    config: dict, *, machine: str, save, seconds: float = 5.0, longest: float = MAX_SIMULATION_SECONDS, progress=print
) -> None:
    """Measure the costs of everything in *config* on this machine, and pass them to *save* after each variant.

    Each measurement is repeated until it has taken *seconds*. A variant whose simulation takes more than *longest* seconds is
    measured at shorter lengths. One that cannot be simulated here because its genetic map is not cached is skipped, and
    *progress* reports it. *save* is called with the content of a costs file.
    """
    from cxt.benchmark.speed import describe_device, detect_device, measure

    masks = {}
    for name, dataset in config["datasets"].items():
        if "mask" in dataset:
            m = dataset["mask"]
            masks[name] = (
                read_mask(m["path"], key=m["key"], contig=m.get("contig"), marks=m["marks"])
                if "path" in m
                else draw_synthetic_mask(m, seed=1)
            )
    used = {
        name: {variant.name for variant in collect_variants(config, config["datasets"][name]["scenarios"])}
        for name in list_stored_datasets(config)
    }
    for variant in list_used_variants(config):
        costs: dict = {"machines": {"simulations": machine}, "simulations": {}, "shards": {}, "rates": {}}
        lengths = costs["simulations"].setdefault(variant_key(variant.spec), {})
        asked, made = variant.spec["sequence_length"], []
        try:
            most = min(20, count_pieces(variant.spec)) if variant.spec["kind"] == "trees" else 20
            lengths[str(asked)], made = measure_simulation(variant.spec, budget=seconds, longest=longest, most=most)
        except BadRequest as error:
            progress(f"skipped: {error}")
            continue
        except TooLong:
            for length in (length for length in EXTRAPOLATION_LENGTHS if length < asked):
                short, _ = measure_simulation(shorten_spec(variant.spec, length), budget=seconds, longest=math.inf)
                lengths[str(length)] = short
        for length, cost in lengths.items():
            progress(
                f"{variant.name} {int(length):,} bp: {cost['seconds']:.3g} s, {cost['trees']:.0f} trees, "
                f"{cost['sites']:.0f} sites, {cost['bytes'] / 1e6:.2f} MB (mean of {cost['replicates']})"
            )
        for name, names in used.items():
            if made and variant.name in names:
                key = shard_key(variant.spec, dataset_spec(config, name), name in masks)
                costs["shards"][key] = measure_shard(made, dataset_spec(config, name), masks.get(name))
        save(costs)
    device = detect_device()
    kind = "gpu" if device == "cuda" else "cpu"
    networks = {}
    for name in config["models"]:  # one model of each size, among those that train on this kind of device
        if (get_device_count(config, name) > 0) != (kind == "gpu"):
            continue
        network, adapter = build_network_config(config, name), build_adapter_config(config, name)
        size = (network.layers, network.width, network.windows, adapter is not None)
        networks.setdefault(size, (name, (network, adapter, build_training_config(config, name))))
    if networks:
        if device == "cpu":
            import torch

            torch.set_num_threads(max(training_threads(config, name) for name, _ in networks.values()))
        rates = measure(dict(networks.values()), seconds=seconds, progress=progress)
        save({"machines": {kind: describe_device(device)}, "simulations": {}, "shards": {}, "rates": {kind: rates}})


def merge_costs(old: dict, new: dict) -> dict:
    """Merge two contents of costs files; *new* takes precedence."""
    simulations = {key: old["simulations"].get(key, {}) | lengths for key, lengths in new["simulations"].items()}
    machines = dict(old["machines"])
    for kind, machine in new["machines"].items():
        known = machines.get(kind, machine) if kind == "simulations" else machine
        machines[kind] = known if machine in known else f"{known}, {machine}"
    return {
        "machines": machines,
        "simulations": old["simulations"] | simulations,
        "shards": old["shards"] | new["shards"],
        "rates": old["rates"] | new["rates"],
    }


def format_scenario_table(config: dict, costs: Costs) -> str:
    """A Markdown page with the cost of one simulation of each variant."""
    rows = [
        "# Cost of one simulation",
        "",
        f"Means over the first simulations of each variant. Measured on: {'; '.join(dict.fromkeys(costs.machines))}.",
        f"Variants that take more than {MAX_SIMULATION_SECONDS} s are measured at {EXTRAPOLATION_LENGTHS[-1]:,} bp. "
        "Those with a genetic map need the map.",
        "Written by `cxt plan --calibrate --table FILE.md`.",
        "",
        "| variant | length | seconds | trees | sites | MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant in list_used_variants(config):
        lengths = costs.simulations.get(variant_key(variant.spec), {})
        asked = str(variant.spec["sequence_length"])
        shown = [asked] if asked in lengths else sorted(lengths, key=int)[-1:]
        if not shown:
            rows.append(
                f"| {variant.name} | {int(asked):,} | {'needs its map' if 'genetic_map' in variant.spec else ''} | | | |"
            )
        for length in shown:
            cost = lengths[length]
            cells = f"{cost['seconds']:.3g} | {cost['trees']:,.0f} | {cost['sites']:,.0f} | {cost['bytes'] / 1e6:.2f}"
            rows.append(f"| {variant.name} | {int(length):,} | {cells} |")
    return "\n".join(rows) + "\n"
