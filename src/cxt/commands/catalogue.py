"""Fetch a genetic map into stdpopsim's cache."""

import argparse
from pathlib import Path

from cxt.console import exit_on_bad_request
from cxt.scenarios.genetic_maps import fetch_genetic_map, get_genetic_map, write_fetch_record


def main(argv: list[str] | None = None) -> None:
    """Run `cxt catalogue`: fetch a genetic map into stdpopsim's cache.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt catalogue", description="Fetch a genetic map into stdpopsim's cache.")
    parser.add_argument("--species", required=True, help="stdpopsim's identifier, such as HomSap")
    parser.add_argument("--genetic-map", required=True, help="the map's identifier, such as HapMapII_GRCh38")
    parser.add_argument("--scenario", help="scenario to name in messages (default: the species)")
    parser.add_argument("--out", type=Path, help="JSON file recording the fetch")
    args = parser.parse_args(argv)
    spec = {"name": args.species, "species": args.species, "genetic_map": args.genetic_map}
    if args.scenario is not None:
        spec |= {"name": args.scenario, "kind": "stdpopsim"}
    fetch_genetic_map(spec)
    if args.out is not None:
        write_fetch_record(spec, args.out)
    print(f"{args.species} {args.genetic_map}: in {get_genetic_map(spec).map_cache_dir}")


if __name__ == "__main__":
    exit_on_bad_request(main)
