"""Estimate what a configuration will simulate, train and cost, before anything runs.

    cxt plan                                              the default configuration, at laptop scale
    cxt plan --configfile config/paper.yaml --devices 3   the published one, on three GPUs
    cxt plan --configfile mine.yaml --calibrate           measure the costs of its scenarios on this machine first

Estimates are based on measured costs, shipped with the package or from `--calibrate`; the plan names those that are missing.
"""

import argparse
import platform
import signal
import sys
from pathlib import Path

from cxt.config.bounds import Devices, Positive
from cxt.config.flags import check_flags
from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest
from cxt.io import atomic_write, check_writable, json_text


def main(argv: list[str] | None = None) -> None:
    """Run `cxt plan`: print what a configuration will simulate and train, and what that will cost.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt plan", description="Estimate the cost of a configuration.")
    parser.add_argument("--configfile", nargs="+", default=[], help="overlays on the default configuration")
    parser.add_argument("--devices", type=int, help="GPUs for every model (0 = CPU); default: the configuration's")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--variants", action="store_true", help="list every variant instead of every scenario")
    parser.add_argument(
        "--calibrate", action="store_true", help="first measure the costs on this machine and save them in results/costs.json"
    )
    parser.add_argument(
        "--costs", type=Path, help="costs to use, or to write with --calibrate (default: results/costs.json if there)"
    )
    parser.add_argument("--seconds", type=float, help="with --calibrate: seconds per measurement (default 5)")
    parser.add_argument("--machine", help="with --calibrate: description of this machine (default: its processor)")
    parser.add_argument("--table", type=Path, help="also write a Markdown table of the cost of one simulation of each variant")
    args = parser.parse_args(argv)
    check_flags(args, devices=Devices, seconds=Positive)
    for flag in ("seconds", "machine"):
        if getattr(args, flag) is not None and not args.calibrate:
            raise BadRequest(f"--{flag} cannot be used without --calibrate")

    from cxt.checkpoints.parents import read_parent_file
    from cxt.config.file import load  # imported late so that --help is quick
    from cxt.workflow.costs import LOCAL_COSTS, Costs, format_scenario_table, measure_costs, merge_costs, read_costs
    from cxt.workflow.estimates import estimate_costs, format_estimate, use_devices
    from cxt.workflow.jobs import check_plan

    config = load(args.configfile, read_parent=read_parent_file)
    if args.devices is not None:
        config = use_devices(config, args.devices)
    check_plan(config)
    path = args.costs or LOCAL_COSTS
    if args.costs is not None and not args.calibrate and not path.exists():
        raise BadRequest(f"--costs: there is no file {path}; create it with --calibrate")
    for written in (*([path] if args.calibrate else []), *([args.table] if args.table else [])):
        check_writable(written)
    if args.calibrate:
        machine = args.machine or f"one core of {platform.processor() or platform.machine()}"

        def progress(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        def save(measured: dict) -> None:
            merged = merge_costs(read_costs(path), measured) if path.exists() else measured
            atomic_write(path, json_text(merged, sort_keys=True).encode())

        measure_costs(config, machine=machine, seconds=args.seconds or 5.0, save=save, progress=progress)
        progress(f"measured costs: {path}")
    costs = Costs([path] if path.exists() else [])
    planned = estimate_costs(config, costs)
    if args.table is not None:
        atomic_write(args.table, format_scenario_table(config, costs).encode())
    print(json_text(planned).rstrip() if args.json else format_estimate(config, planned, costs, all_variants=args.variants))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `cxt plan | head` ends quietly
    exit_on_bad_request(main)
