"""Stage 4: evaluate the accuracy of a checkpoint on held-out simulations.

    cxt evaluate broad --scenarios constant island --simulations 4 --pairs 10 --out DIRECTORY
    cxt evaluate broad.r0 broad.r1 broad.r2 --ensemble broad --scenarios constant
    python -m cxt.evaluate --checkpoint results/broad.ckpt --config FILE.yaml --out FILE.json --figures PREFIX
    python -m cxt.evaluate --table results/evaluation/*.json

The first simulates scenarios by their names, for any checkpoint; the second averages the distributions of several. The third is
what the workflow does: --config names its simulations.

Every estimate is predicted from the features, and the rates if the checkpoint reads them, and compared with the true ln
TMRCA of the same pairs and windows. Baselines use the same data: heterozygosity in the best fixed window, a hidden Markov
model, and the best constant.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Literal

from cxt.config.bounds import PositiveInteger, Seed, Threads
from cxt.config.flags import add_config_flag, check_flags, find_problems, insert_config
from cxt.config.problems import NAME, NAME_ADVICE, refuse
from cxt.console import ON_STDERR, add_verbosity_flags, exit_on_bad_request, get_logger, progress_only, set_verbosity
from cxt.data.masks import add_mask_flags, identify_mask_from_flags, read_mask_from_flags
from cxt.errors import BadRequest, Failed, try_drawing
from cxt.io import atomic_write, check_writable, json_text
from cxt.lineage import check_lineage, check_planned, derive_evaluation_lineage

logger = get_logger(__name__)

SCENARIO_FLAGS = {
    "pairs": "pairs of haplotypes of each simulation",
    "replicates": "decoded sequences of each pair",
    "batch_size": "pairs that are decoded together",
    "seed": "seed of simulations, pairs and sampling",
}
"""Numbers for an evaluation on scenarios, by the names of their flags."""

SPEC_FLAGS = {
    "pairs": PositiveInteger, "replicates": PositiveInteger, "batch_size": PositiveInteger, "seed": Seed,
    "reading": Literal["auto", "marginal", "sampled"],
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run `cxt evaluate`: evaluate a checkpoint on held-out simulations, or print the accuracy table of earlier results.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cxt.evaluate", description="Evaluate a checkpoint on held-out simulations."
    )
    parser.add_argument("names", nargs="*", metavar="CHECKPOINT", help="the same as --checkpoint")
    parser.add_argument("--scenarios", nargs="+", help="simulate these scenarios of the configuration, and evaluate on them")
    parser.add_argument("--configfile", nargs="+", help="overlays on the default configuration, for --scenarios")
    for flag, text in SCENARIO_FLAGS.items():
        parser.add_argument(
            f"--{flag.replace('_', '-')}", type=int, help=f"for --scenarios: {text} (default: the configuration's)"
        )
    parser.add_argument("--reading", help="for --scenarios: auto, marginal or sampled (default auto)")
    parser.add_argument("--table", nargs="+", type=Path, help="print the accuracy table of these JSON files instead")
    add_config_flag(parser)
    parser.add_argument("--lineage", help="planned lineage of the result, stored in it; with --table, that of all evaluations")
    parser.add_argument("--checkpoint", nargs="+", help="name, file, run directory or exported directory of a checkpoint")
    parser.add_argument("--checkpoint-lineage", nargs="+", help="expected lineage of each checkpoint")
    parser.add_argument(
        "--ensemble", metavar="NAME", help="evaluate the mean of the distributions of several checkpoints, under this name"
    )
    parser.add_argument("--spec", help="settings as JSON: the dataset's shape, pairs, replicates, batch_size, seed")
    parser.add_argument("--batches", help="evaluation batches as JSON: [{path, scenario, start, count, lineage}, …]")
    parser.add_argument(
        "--simulations", help="with --batches: directory of its paths; with --scenarios: simulations of each (default: the "
        "configuration's)",
    )  # fmt: skip
    add_mask_flags(parser)
    parser.add_argument("--devices", type=int, default=0, choices=(0, 1), help="1 = decode on the first GPU (default 0, CPU)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON file to write; with --table, the table; with --scenarios, a directory")
    parser.add_argument(
        "--figures", help="prefix of the figures: PREFIX-tracks.png, PREFIX-scatter.png and PREFIX-calibration.png"
    )
    parser.add_argument(
        "--finished",
        type=Path,
        help="directory of finished evaluations; one of this --lineage and the same checkpoint is published again",
    )
    add_verbosity_flags(parser)
    args = parser.parse_args(insert_config(sys.argv[1:] if argv is None else argv, parser))
    set_verbosity(args)
    check_flags(args, threads=Threads)
    if args.names and args.checkpoint is not None:
        given = f"{' '.join(args.names)} and --checkpoint {' '.join(args.checkpoint)}"
        raise BadRequest(f"checkpoints were given twice, {given}; list them in one place")
    args.checkpoint = args.names or args.checkpoint
    if args.ensemble is not None and not re.fullmatch(NAME, args.ensemble):
        raise BadRequest(f"--ensemble {args.ensemble!r}: {NAME_ADVICE}")
    if args.scenarios is not None:
        _evaluate_on_scenarios(args)
        return
    scenario_flags = ("configfile", "reading", *SCENARIO_FLAGS)
    if given := [f"--{flag.replace('_', '-')}" for flag in scenario_flags if getattr(args, flag) is not None]:
        raise BadRequest(f"{', '.join(given)} cannot be used without --scenarios")

    # Imported late so that --help is quick.
    from cxt.evaluation.finished import finished_directory, keep_finished, publish_finished
    from cxt.evaluation.members import read_members
    from cxt.evaluation.protocol import SPEC_KEYS, SPEC_RANGES, draw_figures, evaluate
    from cxt.evaluation.table import combine_evaluation_lineages, format_accuracy_table, read_result

    if args.table:
        results = [read_result(path) for path in args.table]
        lineage = combine_evaluation_lineages([result.get("lineage") for result in results])
        check_lineage("an evaluation of this table", actual=lineage, planned=args.lineage, target=args.out or args.table[0])
        text = format_accuracy_table(results)
        print(text, end="")
        if args.out:
            atomic_write(args.out, text.encode())
        return
    missing = [f"--{name}" for name in ("checkpoint", "spec", "batches", "out", "figures") if getattr(args, name) is None]
    if missing:
        raise BadRequest(
            f"{', '.join(missing)} must be given, unless --table or --scenarios is; `cxt evaluate CHECKPOINT --scenarios "
            "constant` evaluates a checkpoint on new simulations"
        )
    try:
        spec, batches = json.loads(args.spec), json.loads(args.batches)
    except json.JSONDecodeError as error:
        raise BadRequest(f"--spec or --batches is not valid JSON: {error}") from None
    missing_keys = sorted(SPEC_KEYS - spec.keys()) if isinstance(spec, dict) else ["a mapping"]
    if missing_keys:
        raise BadRequest(f"--spec lacks {', '.join(missing_keys)}")
    if out_of_range := find_problems(spec, SPEC_RANGES):
        raise BadRequest(f"--spec: {'; '.join(out_of_range)}")
    if args.lineage is not None:
        lineages = [batch.get("lineage") for batch in batches]
        mask = identify_mask_from_flags(args)
        checkpoint = args.checkpoint_lineage
        if args.ensemble is None and checkpoint is not None:
            checkpoint = checkpoint[0]
        computed = derive_evaluation_lineage(spec, batches=lineages, mask=mask, checkpoint=checkpoint)
        check_planned(computed, args.lineage, target=args.out)
    elif args.finished is not None:
        raise BadRequest("--finished needs --lineage, which tells evaluations apart")
    _check_gpu(args)
    finished = None
    if args.finished is not None:
        paths = [member.path for member in read_members(args.checkpoint, ensemble=args.ensemble)]
        finished = finished_directory(
            args.finished,
            lineage=args.lineage,
            checkpoints=paths,
            device="cuda" if args.devices else "cpu",
            ensemble=args.ensemble,
        )
        if publish_finished(finished, out=args.out, figures=args.figures):
            with progress_only():
                logger.info(f"{args.ensemble or paths[0]}: evaluated before ({finished}); published again")
            return
    mask = read_mask_from_flags(args)
    with progress_only():
        result, tracks = evaluate(
            args.checkpoint,
            spec,
            [batch | {"path": Path(args.simulations or "") / batch["path"]} for batch in batches],
            ensemble=args.ensemble,
            mask=mask,
            device="cuda:0" if args.devices else "cpu",
            threads=args.threads,
            checkpoint_lineage=args.checkpoint_lineage,
            lineage=args.lineage,
            progress=logger.info,
        )
        atomic_write(args.out, json_text(result).encode())
    problem = try_drawing(lambda: draw_figures(tracks, args.figures, result, window_size=spec["window_size"]))
    if problem:
        raise Failed(f"the accuracy was written to {args.out}, but the figures could not be drawn ({problem})")
    if finished is not None:
        keep_finished(finished, out=args.out, figures=args.figures)


def _check_gpu(args: argparse.Namespace) -> None:
    if args.devices:
        import torch

        if not torch.cuda.is_available():
            raise BadRequest("--devices 1, but torch sees no GPU; use --devices 0")


def _evaluate_on_scenarios(args: argparse.Namespace) -> None:
    """Evaluate on simulations that are made for it; the table goes to standard output, everything else to a directory."""
    if args.checkpoint is None:
        raise BadRequest("--scenarios needs a checkpoint: cxt evaluate CHECKPOINT --scenarios NAME …")
    others = ("table", "spec", "batches", "lineage", "checkpoint_lineage", "figures", "finished")
    if given := [f"--{flag.replace('_', '-')}" for flag in others if getattr(args, flag) is not None]:
        raise BadRequest(f"{', '.join(given)} cannot be used with --scenarios")
    values = {flag: getattr(args, flag) for flag in SCENARIO_FLAGS} | {"reading": args.reading}
    values["simulations"] = int(text) if (text := args.simulations or "").lstrip("+-").isdigit() else args.simulations
    accepted = {"simulations": PositiveInteger, **SPEC_FLAGS}
    refuse(find_problems({f"--{name.replace('_', '-')}": value for name, value in values.items()},
                         {f"--{name.replace('_', '-')}": kind for name, kind in accepted.items()}))  # fmt: skip
    _check_gpu(args)
    if args.out is not None:
        check_writable(args.out / "evaluation.json")

    from cxt.checkpoints.parents import read_parent_file
    from cxt.config.file import load
    from cxt.evaluation.protocol import draw_figures
    from cxt.evaluation.scenario_list import evaluate_on_scenarios
    from cxt.evaluation.table import format_accuracy_table

    given = {name: value for name, value in values.items() if value is not None}
    result, tracks = evaluate_on_scenarios(
        args.checkpoint, load(args.configfile or (), read_parent=read_parent_file), args.scenarios, **given,
        ensemble=args.ensemble, mask=read_mask_from_flags(args), threads=args.threads,
        device="cuda:0" if args.devices else "cpu", progress=lambda line: logger.info(line, extra=ON_STDERR),
    )  # fmt: skip
    print(format_accuracy_table([result]), end="", flush=True)
    if args.out is not None:
        atomic_write(args.out / "evaluation.json", json_text(result).encode())
        window_size = result["settings"]["window_size"]
        problem = try_drawing(lambda: draw_figures(tracks, str(args.out / "evaluation"), result, window_size=window_size))
        if problem:
            raise Failed(f"the accuracy was written to {args.out}, but the figures could not be drawn ({problem})")


if __name__ == "__main__":
    exit_on_bad_request(main)
