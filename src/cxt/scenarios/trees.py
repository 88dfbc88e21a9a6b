"""Take one tree sequence out of a batch file.

python -m cxt.scenarios.trees results/simulations/constant/0.trees.batch --index 17 --out constant-17.trees
"""

import argparse
from pathlib import Path

import tskit

from cxt.errors import BadRequest, exit_on_bad_request
from cxt.files import atomic_file, check_writable
from cxt.config.bounds import INDEX, check_flags


def find(path, index: int) -> tskit.TreeSequence:
    """Simulation *index* of a batch file.

    Raises
    ------
    BadRequest
        If the file cannot be read, is damaged before that simulation, or does not hold it.
    """
    found = []
    try:
        with open(path, "rb") as file:
            while True:
                ts = tskit.load(file)
                identity = ts.metadata.get("cxt", {}) if isinstance(ts.metadata, dict) else {}
                if "index" not in identity:
                    raise BadRequest(
                        f"{path}: tree sequence {len(found)} has no cxt identity; expected a batch of cxt.simulate"
                    )
                if identity["index"] == index:
                    return ts
                found.append(identity["index"])
    except EOFError:
        held = f"{found[0]} to {found[-1]}" if found else "none"
        raise BadRequest(f"{path} does not hold simulation {index}; indices in it: {held}") from None
    except (tskit.FileFormatError, tskit.LibraryError) as error:
        raise BadRequest(f"{path} is no batch of tree sequences, or damaged after {len(found)} of them: {error}") from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cxt.scenarios.trees", description="Take one tree sequence out of a batch file.")
    parser.add_argument("batch", type=Path, help="file made by cxt.simulate")
    parser.add_argument("--index", type=int, required=True, help="index of the simulation in its leaf scenario")
    parser.add_argument("--out", type=Path, required=True, help="FILE.trees to write, for tskit.load")
    args = parser.parse_args()
    check_flags(args, index=INDEX)
    check_writable(args.out)
    if args.out.name.endswith(".batch") or (args.out.exists() and args.out.samefile(args.batch)):
        raise BadRequest(f"--out {args.out} is a batch of tree sequences; give another name, such as {args.index}.trees")
    ts = find(args.batch, args.index)
    try:
        with atomic_file(args.out) as file:
            ts.dump(file)
    except OSError as error:
        raise BadRequest(f"{args.out} cannot be written: {error.strerror or error}") from None
    about = ts.metadata["cxt"]
    print(f"{args.out}: simulation {args.index} of '{about['scenario']}', {ts.num_trees} trees, {ts.num_sites} sites")


if __name__ == "__main__":
    exit_on_bad_request(main)
