"""Show, verify, compare, import, export, merge and quantise checkpoints."""

import argparse
from pathlib import Path

from cxt.config.bounds import NonNegative
from cxt.config.flags import check_flags
from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest, Failed
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
    command.add_argument("checkpoint", nargs="?", help=accepted)
    _add_folder_flags(command, what="verify")
    command.add_argument("--configfile", nargs="+", default=[], help="overlays on the default configuration")
    command = commands.add_parser("diff", help="compare two checkpoints; exit 1 if their weights are not close")
    command.add_argument("checkpoint", help=accepted)
    command.add_argument("other", help=accepted)
    command.add_argument("--rtol", type=float, default=1e-5, help="relative tolerance (default 1e-5)")
    command.add_argument("--atol", type=float, default=1e-6, help="absolute tolerance (default 1e-6)")
    command = commands.add_parser("import", help="convert a Lightning file of the original package to a checkpoint")
    command.add_argument("file", nargs="?", help="the Lightning file; no code in it is executed")
    _add_folder_flags(command, what="import")
    command.add_argument("--out", required=True, help="checkpoint to write; with --dir, the folder to write them to")
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
    if args.command in ("import", "verify"):
        check_folder_flags(args)
    run(args)


def _add_folder_flags(command: argparse.ArgumentParser, *, what: str) -> None:
    command.add_argument("--dir", help=f"{what} every .ckpt file of this folder: a line for each, exit 1 if one fails")
    command.add_argument("-r", "--recursive", action="store_true", help="with --dir: those of the folders in it, too")


def check_folder_flags(args: argparse.Namespace) -> None:
    """BadRequest unless there is either a file or a folder, without flags that are for the other."""
    file = args.file if args.command == "import" else args.checkpoint
    if (file is None) == (args.dir is None):
        found = "neither" if file is None else f"both {file} and --dir {args.dir}"
        raise BadRequest(f"cxt checkpoint {args.command} needs one file, or a folder (--dir DIR), got {found}")
    if file is not None and args.command == "import" and Path(file).is_dir():
        raise BadRequest(f"{file} is a directory; to import every .ckpt file in it, use --dir {file}")
    if args.recursive and args.dir is None:
        raise BadRequest("-r is for folders; add --dir DIR")
    if args.dir is not None and args.command == "import" and (args.name or args.as_parent):
        raise BadRequest(f"{'--name' if args.name else '--as-parent'} is for one file, and cannot be used with --dir")


def run(args: argparse.Namespace) -> None:
    """Run the subcommand."""
    if getattr(args, "dir", None) is not None:
        run_on_folder(args)
        return
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


def run_on_folder(args: argparse.Namespace) -> None:
    """Import or verify all checkpoints of a folder."""
    from cxt.checkpoints.folders import apply_to_files, import_folder, list_checkpoint_files
    from cxt.checkpoints.parents import read_parent_file
    from cxt.config.file import load
    from cxt.workflow.verification import verify

    def report(line: str) -> None:
        print(line, flush=True)

    if args.command == "import":
        import_folder(args.dir, args.out, recursive=args.recursive, report=report)
        return
    files = list_checkpoint_files(args.dir, recursive=args.recursive)
    load(args.configfile, read_parent=read_parent_file)  # one message if it is not valid
    apply_to_files(files, lambda path: verify(path, configfiles=args.configfile), report=report)


if __name__ == "__main__":
    exit_on_bad_request(main)
