"""Show, verify, compare, import, export, merge and quantise checkpoints."""

import argparse
from pathlib import Path

from cxt.config.bounds import NonNegative
from cxt.config.flags import check_flags
from cxt.console import exit_on_bad_request
from cxt.errors import Failed
from cxt.io import check_writable


def main(argv: list[str] | None = None) -> None:
    """Run `cxt checkpoint`: show, verify, compare, import, export, merge or quantise checkpoints.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="cxt checkpoint",
        description="Show, verify, compare, import, export, merge and quantise checkpoints.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    accepted = "name, file, run directory or exported directory"
    command = commands.add_parser("show", help="describe a checkpoint: network, training, dataset, parent, lineage")
    command.add_argument("checkpoint", help=accepted)
    command = commands.add_parser("verify", help="check that it is intact and matches the configuration; exit 1 if not")
    command.add_argument("checkpoint", help=accepted)
    command.add_argument("--configfile", nargs="+", default=[], help="overlays on the default configuration")
    command = commands.add_parser("diff", help="compare two checkpoints; exit 1 if their weights are not close")
    command.add_argument("checkpoint", help=accepted)
    command.add_argument("other", help=accepted)
    command.add_argument("--rtol", type=float, default=1e-5, help="relative tolerance (default 1e-5)")
    command.add_argument("--atol", type=float, default=1e-6, help="absolute tolerance (default 1e-6)")
    command = commands.add_parser("import", help="convert a Lightning file of the original package to a checkpoint")
    command.add_argument("file", help="the Lightning file; no code in it is executed")
    command.add_argument("--out", required=True, help="checkpoint to write")
    command.add_argument("--name", help="name of the model in it (default: the file name up to _epoch=)")
    command.add_argument(
        "--as-parent",
        metavar="SHA256",
        help="make the workflow's copy of a file that a model starts from, and check its digest; a checkpoint of cxt is copied",
    )
    command = commands.add_parser(
        "export", help="write weights as safetensors and the rest as JSON, for other programs and cxt.load_model"
    )
    command.add_argument("checkpoint", help=accepted)
    command.add_argument("--out", required=True, help="directory to write them to")
    command = commands.add_parser("merge", help="merge a LoRA into its base: a plain checkpoint, which works without the base")
    command.add_argument("checkpoint", help="the LoRA, by its name, file or run directory")
    command.add_argument("out", help="checkpoint to write")
    command = commands.add_parser(
        "quantize", help="write a copy of a quarter of the size, its matrices rounded to int8, which can be used as any other"
    )
    command.add_argument("checkpoint", help=accepted)
    command.add_argument("out", help="checkpoint to write")
    args = parser.parse_args(argv)
    check_flags(args, rtol=NonNegative, atol=NonNegative)
    run(args)


def run(args: argparse.Namespace) -> None:
    """Run the subcommand."""
    from cxt.checkpoints.file import import_published
    from cxt.checkpoints.inspection import compare_checkpoints, describe_checkpoint, read_verified_checkpoint
    from cxt.checkpoints.load import checkpoint_directories, find_checkpoint
    from cxt.checkpoints.lora import write_merged
    from cxt.checkpoints.parents import import_parent
    from cxt.checkpoints.quantized import quantize_checkpoint
    from cxt.checkpoints.safetensors import CONFIG, WEIGHTS, write_export
    from cxt.workflow.verification import verify

    if args.command == "import" and args.as_parent is not None:
        import_parent(args.file, args.out, sha256=args.as_parent)
        print(describe_checkpoint(args.out))
        return
    if args.command == "import":
        import_published(args.file, args.out, name=args.name)
        print(describe_checkpoint(args.out))
        return
    path = find_checkpoint(args.checkpoint)
    if args.command == "show":
        print(describe_checkpoint(path))
    elif args.command == "verify":
        print(verify(path, configfiles=args.configfile))
    elif args.command == "export":
        checkpoint = read_verified_checkpoint(path)
        check_writable(Path(args.out) / CONFIG)
        write_export(args.out, checkpoint.state_dict, checkpoint.record)
        print(f"{path}: exported to {Path(args.out) / WEIGHTS} and {CONFIG}")
    elif args.command == "merge":
        base = write_merged(path, args.out, checkpoint_directories())
        print(f"{path}: merged into {base}, as {args.out}")
    elif args.command == "quantize":
        quantize_checkpoint(path, args.out)
        print(describe_checkpoint(args.out))
    else:
        close, text = compare_checkpoints(path, find_checkpoint(args.other), rtol=args.rtol, atol=args.atol)
        print(text)
        if not close:
            raise Failed("")


if __name__ == "__main__":
    exit_on_bad_request(main)
