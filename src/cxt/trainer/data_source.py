"""The source of a run's examples: a dataset on disk, or scenarios that are simulated on the fly."""

import json

from cxt.checkpoints.parents import read_parent_file
from cxt.config.file import load
from cxt.config.network import PRESETS, ModelConfig
from cxt.config.training import TrainingConfig
from cxt.config.variants import get_scenario_name, list_variants
from cxt.data.features import SCALES
from cxt.data.soft_targets import read_about, soft_targets_path
from cxt.errors import BadRequest, suggest_nearest
from cxt.io import digest
from cxt.lineage import check_lineage, combine_soft_target_lineages
from cxt.trainer.options import TrainingOptions


def check_source(options: TrainingOptions) -> None:
    """BadRequest unless the flags name exactly one source of examples, and only flags that apply to it."""
    if (options.dataset_path is None) == (options.simulate is None):
        raise BadRequest("either --dataset-path DIRECTORY or --simulate SCENARIO must be given, but not both")
    if options.simulate is None:
        for_simulation = ("simulate_specs", "configfile", "window_size", "samples", "eval_samples", "eval_max_batches")
        if given := [f"--{name.replace('_', '-')}" for name in for_simulation if getattr(options, name) not in (None, ())]:
            raise BadRequest(f"{', '.join(given)} cannot be used without --simulate")
        return
    if options.windows is not None or not options.training.regions.is_off:
        given = "--regions" if options.windows is None else "--windows"
        raise BadRequest(f"{given} cannot be used with --simulate, which simulates no longer sequences than it reads")
    if options.training.storage != TrainingConfig().storage:
        raise BadRequest("--storage cannot be used with --simulate, which has no dataset to store")
    if options.training.scratch is not None:
        raise BadRequest("--scratch cannot be used with --simulate, which has no dataset to store")
    if options.max_steps is None:
        raise BadRequest("--simulate needs --max-steps, since simulated examples never run out")
    if options.training.epochs != TrainingConfig().epochs:
        raise BadRequest("--epochs cannot be used with --simulate, where every example is new; use --max-steps")
    if (options.eval_samples is None) == (options.eval_max_batches is None):
        raise BadRequest("--simulate needs held-out examples for validation: set either --eval-samples or --eval-max-batches")
    if (held_out := options.eval_max_batches if options.eval_samples is None else options.eval_samples) < 1:
        raise BadRequest(f"--eval-samples and --eval-max-batches must be positive, got {held_out}")


def identify_soft_targets(options: TrainingOptions, manifest: dict, network: ModelConfig) -> dict | None:
    """What identifies the soft targets of a run: their directory, teacher, and a digest; None without a teacher.

    Raises
    ------
    BadRequest
        If there are soft targets without the objective `distill` or the reverse, or they belong to another dataset, another
        grid or several teachers, or are not the planned ones.
    """
    directory, distills = options.soft_targets, options.training.objective == "distill"
    if distills != (directory is not None):
        raise BadRequest(
            "the objective distill needs a teacher: pass the directory of its soft targets, which cxt.teach makes, with "
            "--soft-targets"
            if distills
            else f"--soft-targets is for the objective distill, not for {options.training.objective}; add --objective distill"
        )
    if directory is None:
        return None
    if options.simulate is not None:
        raise BadRequest("--soft-targets cannot be used with --simulate, because a teacher reads the examples of a dataset")
    found = []
    for part in manifest["splits"].values():
        for shard in part["shards"]:
            path = soft_targets_path(directory, shard["path"])
            about = read_about(path, shard=shard["sha256"])
            grid = [network.grid_low, network.grid_high, network.bins]
            if about["grid"] != grid:
                raise BadRequest(f"{path}: the teacher has the grid {about['grid']}, but this network has {grid}; use the same")
            if found and about["teacher"] != found[0]["teacher"]:
                raise BadRequest(f"{directory} holds soft targets of several teachers; make all of them with one")
            found.append(about)
    planned, lineage = options.soft_targets_lineage, combine_soft_target_lineages([about["lineage"] for about in found])
    check_lineage(f"the soft targets {directory}", actual=lineage, planned=planned, target=directory)
    return {"directory": directory, "digest": digest(found), "teacher": found[0]["teacher"]}


def _look_up_specs(options: TrainingOptions) -> list[dict]:
    """The variants of the scenarios of --simulate, in the configuration."""
    config = load(list(options.configfile), read_parent=read_parent_file)
    specs: list[dict] = []
    for name in options.simulate or ():
        if name not in config["scenarios"]:
            raise BadRequest(f"--simulate: unknown scenario '{name}'{suggest_nearest(name, config['scenarios'])}")
        specs += [variant.spec for variant in list_variants(name, config["scenarios"][name])]
    return specs


def _read_specs(options: TrainingOptions) -> list[dict]:
    """The variants in --simulate-specs, each of which belongs to one of the scenarios of --simulate."""
    try:
        specs = json.loads(options.simulate_specs or "")
        found = {get_scenario_name(spec["name"]) for spec in specs}
    except (ValueError, TypeError, KeyError) as error:
        raise BadRequest(f"--simulate-specs must be a list of variants in JSON: {error}") from None
    if found != set(options.simulate or ()):
        raise BadRequest(f"--simulate-specs has variants of {', '.join(sorted(found))}, but --simulate names others")
    return specs


def plan_simulations(options: TrainingOptions, training: TrainingConfig, *, world: int) -> tuple[list[dict], dict]:
    """The variants and the manifest for --simulate.

    Parameters
    ----------
    options : TrainingOptions
        Names of scenarios, overlays, and the shape of an example.
    training : TrainingConfig
        Its batch sizes determine how many examples are simulated.
    world : int
        Number of devices on all machines.

    Returns
    -------
    tuple of list and dict
        The parameters of each variant, and the manifest of the simulated examples.

    Raises
    ------
    BadRequest
        If a scenario is unknown or cannot be simulated.
    """
    from cxt.data.simulated import build_simulated_manifest
    from cxt.scenarios.genetic_maps import fetch_genetic_map
    from cxt.scenarios.registry import check_variant

    specs = _read_specs(options) if options.simulate_specs is not None else _look_up_specs(options)
    for spec in specs:
        if spec["kind"] == "trees":
            raise BadRequest(
                f"--simulate: '{spec['name']}' is cut from files, which have only so many pieces; make a dataset of it, and "
                "train with --dataset-path"
            )
        check_variant(spec)
        if "genetic_map" in spec:
            fetch_genetic_map(spec)
    manifest = build_simulated_manifest(
        specs,
        window_size=PRESETS[options.model].window_size if options.window_size is None else options.window_size,
        samples=options.samples,
        scales=SCALES,
        held_out=options.eval_max_batches * training.batch_size if options.eval_samples is None else options.eval_samples,
        examples=options.max_steps * training.batch_size * training.grad_accum * world,
    )
    return specs, manifest
