"""Where a run's items come from, by its flags: a dataset on disk, or scenarios that are simulated on the fly."""

from cxt.config.file import load
from cxt.config.settings import PRESETS, TrainingConfig
from cxt.config.variants import variants
from cxt.data.features import SCALES
from cxt.errors import BadRequest, suggest_nearest


def source_of(args) -> str:
    """The dataset or the scenarios that a run trains on, in words."""
    return args.dataset_path or f"--simulate {' '.join(args.simulate)}"


def check_source(args) -> None:
    """BadRequest unless the flags name one source of items, and nothing that means nothing for it."""
    if (args.dataset_path is None) == (args.simulate is None):
        raise BadRequest("expected --dataset-path DIRECTORY or --simulate SCENARIO, and not both")
    if args.simulate is None:
        for_simulation = ("configfile", "window_size", "samples", "eval_samples", "eval_max_batches")
        if given := [f"--{name.replace('_', '-')}" for name in for_simulation if getattr(args, name) not in (None, [])]:
            raise BadRequest(f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no meaning without --simulate")
        return
    if args.storage != TrainingConfig().storage:
        raise BadRequest("--storage has no meaning with --simulate, which holds no dataset")
    if args.max_steps is None:
        raise BadRequest("--simulate has no end of its own: say with --max-steps how long to train")
    if args.epochs != TrainingConfig().epochs:
        raise BadRequest("--epochs has no meaning with --simulate, where every item is new; --max-steps says how long")
    if (args.eval_samples is None) == (args.eval_max_batches is None):
        raise BadRequest("--simulate needs items held out for validation: set --eval-samples N, or --eval-max-batches N")
    if (args.eval_max_batches if args.eval_samples is None else args.eval_samples) < 1:
        raise BadRequest("--eval-samples and --eval-max-batches: expected at least 1")


def live_source(args, training: TrainingConfig, *, world: int) -> tuple[list[dict], dict]:
    """Variants of --simulate, and the manifest of what is simulated of them."""
    from cxt.data.simulated import build_simulated_manifest
    from cxt.scenarios.genetic_maps import fetch_genetic_map
    from cxt.scenarios.registry import check_variant

    config = load(args.configfile)
    chosen = []
    for name in args.simulate:
        if name not in config["scenarios"]:
            raise BadRequest(f"--simulate: unknown scenario '{name}'{suggest_nearest(name, config['scenarios'])}")
        chosen += [variant.spec for variant in variants(name, config["scenarios"][name])]
    for variant in chosen:
        check_variant(variant)
        if "genetic_map" in variant:
            fetch_genetic_map(variant)
    manifest = build_simulated_manifest(
        chosen,
        window_size=PRESETS[args.model].window_size if args.window_size is None else args.window_size,
        samples=args.samples,
        scales=SCALES,
        held_out=args.eval_max_batches * training.batch_size if args.eval_samples is None else args.eval_samples,
        items=args.max_steps * training.batch_size * training.grad_accum * world,
    )
    return chosen, manifest
