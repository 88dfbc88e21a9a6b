"""Estimates of what a configuration will simulate, train and cost, as an object and as tables."""

from cxt.config.ensembles import list_members
from cxt.config.learning import choose_reading, list_readings
from cxt.config.models import (
    build_adapter_config,
    build_lora_config,
    build_network_config,
    build_region_plan,
    build_training_config,
    get_max_steps,
    get_parent_file,
    get_teacher_network,
    get_teacher_objective,
    list_files,
)
from cxt.config.on_the_fly import is_on_the_fly, list_stored_datasets
from cxt.config.training import steps_per_epoch
from cxt.config.variants import Variant, list_variants
from cxt.errors import BadRequest
from cxt.io import format_columns
from cxt.model.flops import forward_flops, reading_flops, training_flops
from cxt.model.memory import training_memory
from cxt.scenarios.indices import SPLITS, count_in_split
from cxt.scenarios.stdpopsim_catalogue import describe_other_recombination
from cxt.workflow import jobs, lineages
from cxt.workflow.costs import Costs


def use_devices(config: dict, devices: int) -> dict:
    """*config* with *devices* GPUs for every model (0 = CPU)."""
    models = {
        name: model | {"training": model.get("training", {}) | {"devices": devices}} for name, model in config["models"].items()
    }
    return config | {"models": models, "training": config["training"] | {"devices": devices}}


class Estimate:
    """A sum of measured costs that remembers which costs are unknown."""

    def __init__(self):
        self.total = 0.0
        self.unknown: list[str] = []

    def add(self, name: str, count: int, cost: float | None) -> None:
        """Add *count* times *cost*, or remember *name* if its cost is None (not measured)."""
        if cost is None:
            self.unknown.append(name)
        else:
            self.total += count * cost


def _simulation_part(variants: list[tuple[Variant, int]], costs: Costs) -> dict:
    """Simulations, variants, core-hours and bytes of a list of (variant, number of simulations)."""
    seconds, size, extrapolated = Estimate(), Estimate(), []
    for variant, count in variants:
        cost = costs.simulation(variant.spec) or {"seconds": None, "bytes": None}
        seconds.add(variant.name, count, cost["seconds"])
        size.add(variant.name, count, cost["bytes"])
        if cost.get("extrapolated"):
            extrapolated.append(variant.name)
    return {
        "simulations": sum(count for _, count in variants),
        "variants": len(variants),
        "core_hours": seconds.total / 3600,
        "bytes": round(size.total),
        "not_measured": seconds.unknown,
        "extrapolated": extrapolated,
    }


def _dataset_part(config: dict, name: str, costs: Costs) -> dict:
    dataset = config["datasets"][name]
    variants = jobs.collect_variants(config, dataset["scenarios"])
    split = {s: sum(count_in_split(0, variant.simulations, s) for variant in variants) for s in ("train", "test")}
    shard_costs = {
        variant.name: costs.shard(variant.spec, jobs.dataset_spec(config, name), "mask" in dataset) for variant in variants
    }
    known = [cost for cost in shard_costs.values() if cost is not None]
    # A variant that could not be measured at full length counts as the mean of the others, and is listed.
    typical = {key: sum(cost[key] for cost in known) / len(known) if known else None for key in ("seconds", "bytes")}
    seconds, size = Estimate(), Estimate()
    for variant in variants:
        cost = shard_costs[variant.name] or typical
        seconds.add(variant.name, variant.simulations, cost["seconds"])
        size.add(variant.name, variant.simulations, cost["bytes"])
    examples = jobs.count_examples_per_simulation(config, name)
    return {
        "variants": len(variants),
        "train_simulations": split["train"],
        "test_simulations": split["test"],
        "train_items": split["train"] * examples,
        "test_items": split["test"] * examples,
        "bytes": round(size.total) if known else None,
        "core_hours": seconds.total / 3600 if known else None,
        "not_measured": [variant for variant, cost in shard_costs.items() if cost is None],
    }


def _model_part(config: dict, name: str, costs: Costs) -> dict:
    training, network = build_training_config(config, name), build_network_config(config, name)
    adapter, lora = build_adapter_config(config, name), build_lora_config(config, name)
    plan = build_region_plan(config, name)
    devices = jobs.get_device_count(config, name)
    world, machines = jobs.get_world_size(config, name), jobs.get_machine_count(config, name)
    examples = jobs.count_model_examples(config, name, "train")
    try:
        steps = steps_per_epoch(
            examples=examples, batch_size=training.batch_size, grad_accum=training.grad_accum, world=world, plan=plan
        )
    except BadRequest as error:
        raise BadRequest(f"models.{name}: {error}") from None
    batches = plan.count_batches(examples=examples, batch_size=training.batch_size, world=world) * world
    held_out = jobs.count_model_examples(config, name, "test")
    checked = min(training.validation_items or held_out, held_out)  # at each validation, forward only
    simulates = is_on_the_fly(config["datasets"][config["models"][name]["dataset"]])
    total = get_max_steps(config, name) or training.epochs * steps
    every = training.validate_every or (-(-total // 10) if simulates else steps)
    validations = -(-total // every)  # the last step is always validated
    trained = total * batches * training.batch_size * plan.per_row // steps
    checking = sum(forward_flops(network, objective=training.objective).values())
    read = plan.resize(network, plan.mean_windows)
    flops = trained * training_flops(read, adapter, lora, objective=training.objective) + validations * checked * checking
    seconds = flops / costs.flops_per_second("training", gpu=devices > 0, adapter=adapter is not None)
    in_all = seconds + _teaching_flops(config, name) / costs.flops_per_second("decoding", gpu=devices > 0)
    hours, core_hours = seconds / 3600 / machines / (devices or training.threads), 0.0 if devices else in_all / 3600
    more: dict = {}
    if simulates:
        # Validation simulates its examples anew each time; those to decode are simulated once, and once more for their names.
        examples = trained + validations * checked + 2 * min(training.decode_items, held_out)
        more["simulate"] = _on_the_fly_part(config, name, examples, costs)
        simulating = more["simulate"]["core_hours"]
        core_hours += simulating
        # Without workers, a device waits for its simulations; workers make them while it trains.
        each = simulating / world / max(1, training.workers)
        hours = max(hours, each) if training.workers else hours + each
    if (file := get_parent_file(config, name)) is not None:
        more["parent_file"] = {"path": file.path, "sha256": file.sha256}
    return more | {
        "devices": devices,
        "nodes": machines,
        "steps": total,
        "effective_batch": training.batch_size * plan.per_row * training.grad_accum * world,
        "flops": flops,
        "memory_bytes": training_memory(
            plan.resize(network, plan.row_windows),
            training,
            adapter,
            lora,
            precision=training.precision if devices else "32-true",
            on_gpu=devices > 0,
        ),
        "gpu_hours": in_all / 3600 if devices else 0.0,
        "core_hours": core_hours,
        "hours": hours,
    }


def _on_the_fly_part(config: dict, name: str, examples: int, costs: Costs) -> dict:
    """The simulations that a model makes while it trains, one for each example, of its variants in turn; none is stored."""
    scenarios = config["datasets"][config["models"][name]["dataset"]]["scenarios"]
    variants = [variant for scenario in scenarios for variant in list_variants(scenario, config["scenarios"][scenario])]
    counts = [(examples + len(variants) - 1 - place) // len(variants) for place in range(len(variants))]
    part = _simulation_part(list(zip(variants, counts, strict=True)), costs)
    del part["bytes"]
    return part


def _teaching_flops(config: dict, name: str) -> float:
    """FLOPs with which the teacher of a model reads all examples of the model's dataset; 0 without a teacher."""
    model = config["models"][name]
    if "teacher" not in model:
        return 0.0
    examples = sum(jobs.count_examples(config, model["dataset"], split) for split in SPLITS)
    network, reading = get_teacher_network(config, name), choose_reading(get_teacher_objective(config, name), None)
    replicates = build_training_config(config, name).distill.replicates
    return examples * reading_flops(network, reading=reading, replicates=replicates)


def _evaluation_part(config: dict, costs: Costs) -> dict:
    """Evaluation simulations (counted once, even if several models use them) and decoding."""
    batches = {}
    flops, pairs = {"gpu": 0.0, "cpu": 0.0}, 0
    # The members of an ensemble are read once more for it.
    for name in [member for one in jobs.list_evaluations(config) for member in list_members(config, one)]:
        model_batches = lineages.evaluation_batches(config, name)
        batches |= {(batch["scenario"], batch["start"]): batch["count"] for batch in model_batches}
        count = sum(batch["count"] for batch in model_batches) * config["evaluation"]["pairs"]
        network = build_network_config(config, name)
        device = "gpu" if jobs.get_device_count(config, name) else "cpu"
        objective, evaluation = build_training_config(config, name).objective, config["evaluation"]
        ways = list_readings(objective, evaluation["reading"])
        for way in (*ways, *ways[:1]) if network.reads_rates else ways:  # once more without rates
            flops[device] += count * reading_flops(network, reading=way, replicates=evaluation["replicates"])
        pairs += count
    counts: dict[str, int] = {}
    for (variant, _), count in batches.items():
        counts[variant] = counts.get(variant, 0) + count
    part = _simulation_part([(jobs.find_variant(config, variant), count) for variant, count in counts.items()], costs)
    decoding = {
        kind: total / costs.flops_per_second("decoding", gpu=kind == "gpu") / 3600 if total else 0.0
        for kind, total in flops.items()
    }
    return part | {"pairs": pairs, "gpu_hours": decoding["gpu"], "core_hours": part["core_hours"] + decoding["cpu"]}


def estimate_costs(config: dict, costs: Costs) -> dict:
    """Estimate simulations, datasets, models and evaluation of a checked *config*.

    Returns
    -------
    dict
        ``simulations`` is the number that datasets use; ``simulate`` and ``evaluation`` hold core-hours and bytes;
        ``datasets[name]`` has train and test simulations and examples, bytes and core-hours (None if not measured);
        ``models[name]`` has steps, effective batch, FLOPs of training, bytes of memory on each device by part, and GPU-hours or
        core-hours, those in which its teacher reads the examples included; of a model that simulates while it trains also
        ``simulate``, and its core-hours include these.

    Raises
    ------
    BadRequest
        If a model has less than one batch on its devices.
    """
    stored = list_stored_datasets(config)
    names = [s for s in config["scenarios"] if any(s in config["datasets"][name]["scenarios"] for name in stored)]
    used = [(variant, variant.simulations) for variant in jobs.collect_variants(config, names)]
    simulate = _simulation_part(used, costs)
    return {
        "simulations": simulate["simulations"],
        "simulate": simulate,
        "datasets": {name: _dataset_part(config, name, costs) for name in stored},
        "models": {name: _model_part(config, name, costs) for name in config["models"]},
        "evaluation": _evaluation_part(config, costs),
        "measured_on": costs.machines,
    }


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _hours(hours: float) -> str:
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:.1f} h"


def _longest_batch(config: dict, variant: Variant) -> int:
    """Simulations in the largest batch of a variant, including those for evaluation."""
    evaluation = max(count for _, count in jobs.list_evaluation_batches(config, variant))
    return max(min(variant.batch, variant.simulations), evaluation)


def _describe_devices(model: dict) -> str:
    """GPUs of a planned model, on how many machines."""
    devices = str(model["devices"] or "CPU")
    return devices if model["nodes"] == 1 else f"{model['nodes']} x {devices}"


def format_estimate(config: dict, planned: dict, costs: Costs, *, all_variants: bool = False) -> str:
    """The plan as tables for a terminal; with *all_variants*, one row per variant instead of per scenario."""
    rows = []
    for name in config["scenarios"]:
        variants = jobs.collect_variants(config, [name])
        for group in [[variant] for variant in variants] if all_variants else [variants]:
            costed = [(variant, costs.simulation(variant.spec)) for variant in group]
            known = [(variant, cost["seconds"]) for variant, cost in costed if cost]
            about = "≈" if any(cost and cost["extrapolated"] for _, cost in costed) else ""
            number = sum(variant.simulations for variant in group)
            row = [group[0].name if all_variants else name, len(group), number, group[0].batch]
            if len(known) < len(group):
                rows.append([*row, "not measured", ""])
                continue
            hours = sum(variant.simulations * seconds for variant, seconds in known) / 3600
            longest = max(_longest_batch(config, variant) * seconds for variant, seconds in known) / 60
            rows.append([*row, f"{about}{longest:.1f} min", f"{about}{_hours(hours)}"])
    out = format_columns([["scenario", "variants", "simulations", "simulations/file", "longest job", "core time"], *rows])
    simulate, evaluation = planned["simulate"], planned["evaluation"]
    out += [
        "",
        f"{simulate['simulations']} simulations of {simulate['variants']} variants for datasets: "
        f"{_hours(simulate['core_hours'])} on one core, {_size(simulate['bytes'])}",
        f"{evaluation['simulations']} simulations of {evaluation['variants']} variants for evaluation, "
        f"{evaluation['pairs']} pairs decoded: {_hours(evaluation['core_hours'])} on one core"
        + (f", {_hours(evaluation['gpu_hours'])} on one GPU" if evaluation["gpu_hours"] else ""),
        "",
    ]
    rows = [
        [name, p["variants"], p["train_simulations"], p["test_simulations"],
         f"{p['train_items']:,}", f"{p['test_items']:,}",
         *(("not measured", "") if p["bytes"] is None else (_size(p["bytes"]), _hours(p["core_hours"])))]
        for name, p in planned["datasets"].items()
    ]  # fmt: skip
    out += format_columns(
        [["dataset", "variants", "train sims", "test sims", "train examples", "test examples", "disk", "core time"], *rows]
    )
    out.append("")
    rows = [
        [name, _describe_devices(p), p["steps"], p["effective_batch"], f"{p['flops']:.3g}",
         _size(sum(p["memory_bytes"].values())), _hours(p["hours"]),
         _hours(p["gpu_hours"]) if p["devices"] else "", _hours(p["core_hours"]) if p["core_hours"] else ""]
        for name, p in planned["models"].items()
    ]  # fmt: skip
    out += format_columns(
        [["model", "GPUs", "steps", "effective batch", "FLOPs", "memory", "time", "GPU time", "core time"], *rows]
    )
    on_the_fly = {name: p["simulate"] for name, p in planned["models"].items() if "simulate" in p}
    lines = [
        f"{name} makes {part['simulations']:,} simulations of {part['variants']} variants while it trains: "
        f"{_hours(part['core_hours'])} on one core"
        for name, part in on_the_fly.items()
    ]
    out += ["", *lines] if lines else []
    files = [
        f"{name} {'learns' if key == 'teacher' else 'starts'} from {file.describe()}"
        for name in config["models"]
        for key, file in list_files(config, name).items()
    ]
    out += ["", *files] if files else []
    gpu = sum(p["gpu_hours"] for p in planned["models"].values()) + evaluation["gpu_hours"]
    core = sum(p["core_hours"] or 0 for p in [*planned["models"].values(), *planned["datasets"].values(), simulate, evaluation])
    disk = simulate["bytes"] + evaluation["bytes"] + sum(p["bytes"] or 0 for p in planned["datasets"].values())
    out += ["", f"Total: {_hours(core)} of one core, {_hours(gpu)} of one GPU, {_size(disk)}.", ""]
    parts = [simulate, evaluation, *on_the_fly.values()]
    missing = [variant for part in parts for variant in part["not_measured"]]
    missing += [f"shards of {name}" for name, p in planned["datasets"].items() if p["bytes"] is None]
    partly = [p for p in planned["datasets"].values() if p["bytes"] is not None]
    shards = sorted({variant for p in partly for variant in p["not_measured"]} - set(missing))
    extrapolated = sorted({variant for part in parts for variant in part["extrapolated"]})
    if missing:
        out.append(f"Not counted, because not measured: {', '.join(dict.fromkeys(missing))}. Run `cxt plan --calibrate`.")
    if shards:
        out.append(f"Shards not measured, counted at the mean of the other variants: {', '.join(shards)}.")
    if extrapolated:
        out.append(
            "≈ extrapolated from other sequence lengths, or from average rates instead of a genetic map: "
            f"{', '.join(extrapolated)}."
        )
    every = [
        variant.spec
        for variant in jobs.collect_variants(config, list(config["scenarios"]))
        if variant.spec["kind"] == "stdpopsim"
    ]
    out += [f"Note: {difference}." for spec in every if (difference := describe_other_recombination(spec))]
    out.append(f"Measured on: {'; '.join(dict.fromkeys(planned['measured_on']))}.")
    return "\n".join(out)
