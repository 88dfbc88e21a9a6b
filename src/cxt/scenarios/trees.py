"""Take one tree sequence out of a batch file.

cxt trees results/simulations/constant/0.trees.batch --index 17 --out constant-17.trees
"""

import tskit

from cxt.errors import BadRequest


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
