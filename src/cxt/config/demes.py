"""Demes models: reading, checking and reducing them to the simplest equivalent mapping."""

import json
from pathlib import Path

from cxt.config.yaml import read_yaml
from cxt.errors import BadRequest


def read_demes(demography: str | dict, *, at: str) -> dict:
    """Read a Demes file, or its content, as the simplest equivalent mapping; descriptions and other metadata are dropped.

    Raises
    ------
    BadRequest
        If there is no such file, it is not a valid Demes model, or it is too large.
    """
    import demes  # part of an extra, which other configurations do not need

    if isinstance(demography, str):
        path = Path(demography)
        if not path.is_file():
            raise BadRequest(
                f"{at}.demography: there is no file {path.absolute()}; set it to the path of a Demes YAML file, absolute or "
                "relative to the configuration file that names it"
            )
        at = f"{at}.demography: {path}"
    else:
        at = f"{at}.demography"
    try:
        if isinstance(demography, str):
            read_yaml(path)  # refuses nested anchors, which demes would expand without limit
        graph = demes.load(path) if isinstance(demography, str) else demes.Graph.fromdict(demography)
    except Exception as error:  # demes passes on the exceptions of its YAML parser and validators
        reason = f"it has no `{error.args[0]}`" if isinstance(error, KeyError) else " ".join(str(error).split())
        if error.__cause__ is not None:
            reason += f": {error.__cause__}"
        raise BadRequest(f"{at} is not a valid Demes model: {reason or type(error).__name__}") from None
    content = graph.in_generations().asdict_simplified()
    content = {key: value for key, value in content.items() if key not in ("description", "doi", "metadata")}
    content["demes"] = [{key: value for key, value in deme.items() if key != "description"} for deme in content["demes"]]
    size = len(json.dumps(content))
    if size > LONGEST_DEMOGRAPHY:
        raise BadRequest(f"{at} has {size} characters, more than the {LONGEST_DEMOGRAPHY} that fit on a command line")
    return json.loads(json.dumps(content))


LONGEST_DEMOGRAPHY = 50_000
"""Largest number of characters of a Demes graph in JSON: it is passed on command lines, whose arguments hold 131 072."""
