"""Translate genotypes into TMRCA tracks.

cxt translate my.vcf.gz --out tracks --mutation-rate 1.25e-8
cxt translate my.vcf.gz --out tracks --regions chr2:1000001-2000000 --pairs 20 --mask good.bed.gz --mask-marks accessible
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cxt.config.bounds import Threads
from cxt.config.flags import add_config_flag, check_flags, insert_config
from cxt.config.translation import Translation
from cxt.console import add_verbosity_flags, exit_on_bad_request, progress_only, set_verbosity
from cxt.errors import BadRequest

LISTS = ("regions", "samples")

DEFAULT_MODEL = "small"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `cxt translate`: a flag for each setting of `Translation`, and those that change no result."""
    parser = argparse.ArgumentParser(
        prog="cxt translate",
        description="Estimate the TMRCA of pairs of haplotypes along the genome from a file of genotypes.",
    )
    parser.add_argument("file", nargs="?", help="the file of genotypes (or --input)")
    add_config_flag(parser)
    parser.add_argument("--out", help="directory to write")
    settings = parser.add_argument_group("settings")
    for name, field in Translation.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        text = " ".join((field.description or "").replace("`", "").replace("%", "%%").split())
        if field.default is False:
            settings.add_argument(flag, nargs="?", const="true", help=text)
        elif name in LISTS:
            settings.add_argument(flag, nargs="+", action="extend", help=text)
        else:
            standard = DEFAULT_MODEL if name == "model" else None if field.is_required() else field.default
            default = "" if standard is None else f" Default: {standard}."
            choices = _list_choices(field.annotation)
            settings.add_argument(flag, help=f"{text}{default}", metavar=f"{{{','.join(choices)}}}" if choices else None)
    run = parser.add_argument_group("how to run it")
    run.add_argument("--device", default="auto", help="auto (the first GPU, if there is one), cpu, cuda or cuda:1")
    run.add_argument("--batch-size", default="auto", help="pairs read together (default auto)")
    run.add_argument("--threads", type=int, help="CPU threads")
    run.add_argument("--bigwig", nargs="?", const="true", help="also write a .bw file for each pair")
    run.add_argument("--force", action="store_true", help="replace the translation that --out holds")
    run.add_argument(
        "--step", default="all", choices=("all", "read", "blocks", "finish"),
        help="for workflows: only read the genotypes, translate the blocks of --part, or write the output (default all)",
    )  # fmt: skip
    run.add_argument("--part", default="1/1", help="K/N: which of N parts of the blocks (default 1/1)")
    add_verbosity_flags(parser)
    return parser


def _list_choices(annotation: Any) -> list[str]:
    """The values of a setting that has one of a few, or none."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _list_choices(part)]


def _as_list(words: list[str]) -> list[str] | str:
    """The values of a list: words, words with commas, or JSON from a file for `--config`; one word may also name a file."""
    if len(words) == 1 and words[0].startswith("["):
        return json.loads(words[0])
    if len(words) == 1 and Path(words[0]).is_file():
        return words[0]
    return [part for word in words for part in word.split(",") if part]  # of samples


def main(argv: list[str] | None = None) -> None:
    """Run `cxt translate`: estimate the TMRCA of pairs of haplotypes along the genome.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = build_parser()
    args = parser.parse_args(insert_config(sys.argv[1:] if argv is None else argv, parser))
    set_verbosity(args)
    check_flags(args, threads=Threads)
    if args.file is not None and args.input is not None:
        raise BadRequest(f"the file of genotypes was given twice: {args.file} and --input {args.input}")
    values: dict[str, Any] = {name: getattr(args, name) for name in Translation.model_fields}
    values |= {"input": args.file or args.input, "model": args.model or DEFAULT_MODEL}
    if values["samples"] is not None:
        values["samples"] = _as_list(values["samples"])
    regions = values["regions"]
    if regions is not None and len(regions) == 1 and regions[0].startswith("["):
        values["regions"] = json.loads(regions[0])  # from a file for --config; commas may also be within numbers
    missing = [what for what, value in (("a file of genotypes", values["input"]), ("--out", args.out)) if value is None]
    if missing:
        raise BadRequest(f"{' and '.join(missing)} must be given, as in `cxt translate my.vcf.gz --out tracks`")
    part = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if part is None:
        raise BadRequest(f"--part must be K/N, such as 1/4, got {args.part!r}")
    request = Translation.read({name: value for name, value in values.items() if value is not None})

    import torch  # imported late so that --help is quick

    from cxt.translation.translate import run_translation

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with progress_only():
        run_translation(
            request,
            Path(args.out),
            device=args.device,
            batch_size=args.batch_size,
            bigwig=args.bigwig not in (None, "False", "false"),
            force=args.force,
            step=args.step,
            part=(int(part[1]), int(part[2])),
        )


if __name__ == "__main__":
    exit_on_bad_request(main)
