"""Draw the tracks of a translation.

cxt plot tracks                                             tracks.png, pairs.png, distribution.png and ne.png in tracks/
cxt plot tracks --region chr2:1000001-2000000 --pairs NA12878/1,NA12878/2 --out figures
"""

import argparse
import sys
from pathlib import Path

from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest


def main(argv: list[str] | None = None) -> None:
    """Run `cxt plot`: draw the tracks of a translation.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="cxt plot",
        description="Draw the tracks of a translation: tracks.png (up to six pairs along the genome), pairs.png (a heat map of "
        "all pairs), distribution.png (of the TMRCA, for each pair of populations) and ne.png (effective population size "
        "through time).",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory that cxt translate --out wrote")
    parser.add_argument(
        "--pairs", nargs="+", metavar="NAME,NAME",
        help="pairs of haplotypes to draw in tracks.png, at most six (default: some of each pair of populations)",
    )  # fmt: skip
    parser.add_argument(
        "--region", metavar="CONTIG:START-END",
        help="part of the genome to draw in tracks.png and pairs.png, first and last base counted from 1 (default: all)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the figures (default: DIR)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    from cxt.genotypes.selection import parse_region  # imported late so that --help is quick
    from cxt.io import check_writable
    from cxt.translation.figures import choose_tracks, draw_distribution, draw_ne, draw_pairs, draw_tracks
    from cxt.translation.layout import find_segments
    from cxt.translation.tracks import Tracks

    tracks = Tracks(args.directory)
    out = args.out or (args.directory.parent if args.directory.resolve() == tracks.path.resolve() else args.directory)
    rows = [_find_pair(tracks, text) for text in args.pairs] if args.pairs else choose_tracks(tracks)
    region = parse_region(args.region, [name for name, _ in tracks.contigs]) if args.region else None
    segments = find_segments(tracks, region)
    if not segments:
        raise BadRequest(f"the tracks in {args.directory} have no windows")
    check_writable(out / "tracks.png")
    draw_tracks(tracks, out / "tracks.png", segments=segments, rows=rows)
    draw_pairs(tracks, out / "pairs.png", segments=segments)
    draw_distribution(tracks, out / "distribution.png")
    draw_ne(tracks, out / "ne.png")
    print(f"{out}: tracks.png, pairs.png, distribution.png, ne.png")


def _find_pair(tracks, text: str) -> int:
    """The row of a pair that is written as NAME,NAME; names may have commas themselves."""
    parts = text.split(",")
    known = {name for name, _ in tracks.haplotypes}
    for cut in range(1, len(parts)):
        first, second = ",".join(parts[:cut]).strip(), ",".join(parts[cut:]).strip()
        if len(parts) == 2 or {first, second} <= known:
            return tracks.find_pair(first, second)
    raise BadRequest(f"--pairs: '{text}' must be two names of haplotypes with a comma, such as NA12878/1,NA12878/2")


if __name__ == "__main__":
    exit_on_bad_request(main)
