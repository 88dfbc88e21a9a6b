"""Translate genotypes into TMRCA tracks.

cxt translate my.vcf.gz --out tracks --mutation-rate 1.25e-8
cxt translate my.vcf.gz --out tracks --region chr2:1000001-2000000 --pairs 20 --mask accessible.bed.gz --mask-marks accessible
"""

import argparse
import re
import sys

from cxt.config.bounds import Threads
from cxt.config.flags import add_config_flag, check_flags, insert_config
from cxt.console import add_verbosity_flags, exit_on_bad_request, progress_only, set_verbosity
from cxt.errors import BadRequest


def build_parser() -> argparse.ArgumentParser:
    """The parser of `cxt translate`."""
    parser = argparse.ArgumentParser(
        prog="cxt translate",
        description="Estimate the TMRCA of pairs of haplotypes along the genome, from a file of genotypes.",
    )
    add_config_flag(parser)
    parser.add_argument("input", nargs="?", help="VCF, BCF, VCF Zarr, tree sequence (.trees, .tsz) or .npz")
    parser.add_argument("--input", dest="input_flag", help=argparse.SUPPRESS)  # for --config
    parser.add_argument("--model", default="small", help="name or path of a checkpoint (default small)")
    parser.add_argument("--out", help="directory to write")
    what = parser.add_argument_group("what to translate")
    what.add_argument("--region", action="append", default=[], help="contig, or contig:first-last counted from 1; repeatable")
    what.add_argument("--samples", help="individuals, separated by commas, or a file with one a line (default all)")
    what.add_argument("--populations", help="table of samples and populations")
    what.add_argument(
        "--pairs", default="within-individual",
        help="within-individual (default), all, within or between populations, a number of random pairs, or a file of pairs",
    )  # fmt: skip
    what.add_argument(
        "--assume-phased", action="store_true", help="take unphased genotypes as phased, for pairs of different individuals"
    )
    data = parser.add_argument_group("how to read the genotypes")
    data.add_argument("--mask", help="accessibility mask, BED or .npz; needs --mask-marks")
    data.add_argument("--mask-marks", choices=("accessible", "inaccessible"), help="what its intervals or true values mean")
    data.add_argument(
        "--ancestral", default="auto",
        help="INFO/AA or another tag, a FASTA file, ref, or tree (default auto: INFO/AA or the tree sequence's states if there, "
        "else ref)",
    )  # fmt: skip
    data.add_argument("--min-accessible", type=float, default=0.25, help="windows with less are missing (default 0.25)")
    data.add_argument(
        "--max-gap", type=int, help="base pairs without variants that count as inaccessible; 0: none (default: by the density)"
    )
    scale = parser.add_argument_group("time scale")
    scale.add_argument("--mutation-rate", type=float, help="per bp and generation")
    scale.add_argument("--recombination-rate", type=float, help="per bp and generation, for checkpoints that read rates")
    scale.add_argument("--generation-time", type=float, help="years; adds years to the output")
    scale.add_argument(
        "--calibration", default="auto", choices=("auto", "none", "diversity", "gamma"),
        help="with --mutation-rate: whether a pair's times are multiplied so that they imply its differences (default auto: only "
        "for checkpoints that do not read rates)",
    )  # fmt: skip
    network = parser.add_argument_group("network")
    network.add_argument("--reading", choices=("marginal", "sampled"), help="default: what the checkpoint was trained for")
    network.add_argument("--replicates", type=int, default=15, help="sampled sequences of each pair (default 15)")
    network.add_argument("--panels", type=int, default=1, help="subsets of more haplotypes than it reads, averaged (default 1)")
    network.add_argument("--flank", type=int, help="windows read and dropped on each side of a block (default a fifth)")
    network.add_argument("--seed", type=int, default=0, help="of pairs, subsets and draws (default 0)")
    network.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    network.add_argument("--batch-size", default="auto", help="pairs read together (default auto)")
    network.add_argument("--threads", type=int, help="CPU threads")
    output = parser.add_argument_group("output")
    output.add_argument("--bigwig", action="store_true", help="also write a .bw file for each pair")
    output.add_argument("--force", action="store_true", help="replace a translation in --out")
    steps = parser.add_argument_group("steps, for workflows")
    steps.add_argument(
        "--step", default="all", choices=("all", "read", "blocks", "finish"),
        help="read the genotypes, translate the blocks of --part, or write the output (default all)",
    )  # fmt: skip
    steps.add_argument("--part", default="1/1", help="K/N: which of N parts of the blocks (default 1/1)")
    add_verbosity_flags(parser)
    return parser


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
    path = args.input or args.input_flag
    missing = [name for name, value in (("a file of genotypes", path), ("--out", args.out)) if value is None]
    if missing:
        raise BadRequest(f"{' and '.join(missing)} must be given")
    part = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if part is None:
        raise BadRequest(f"--part must be K/N, such as 1/4, got {args.part!r}")

    import torch  # imported late so that --help is quick

    from cxt.translation.translate import translate

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with progress_only():
        translate(
            path,
            model=args.model,
            out=args.out,
            regions=args.region,
            samples=args.samples,
            populations=args.populations,
            pairs=args.pairs,
            assume_phased=args.assume_phased,
            mask=args.mask,
            mask_marks=args.mask_marks,
            ancestral=args.ancestral,
            mutation_rate=args.mutation_rate,
            recombination_rate=args.recombination_rate,
            generation_time=args.generation_time,
            calibration=args.calibration,
            reading=args.reading,
            replicates=args.replicates,
            panels=args.panels,
            min_accessible=args.min_accessible,
            max_gap=args.max_gap,
            flank=args.flank,
            seed=args.seed,
            device=args.device,
            batch_size=args.batch_size,
            bigwig=args.bigwig,
            force=args.force,
            step=args.step,
            part=(int(part[1]), int(part[2])),
        )


if __name__ == "__main__":
    exit_on_bad_request(main)
