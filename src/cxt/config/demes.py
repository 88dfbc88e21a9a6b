"""Demes models: read from a file, checked, and reduced to the simplest mapping that means the same."""

import json
from pathlib import Path

from cxt.config.yaml import read_yaml
from cxt.errors import BadRequest


def read_demes(demography: str | dict, *, at: str) -> dict:
    """A Demes file or its content, checked, as the simplest mapping that means the same; words for people are left out.

    Raises
    ------
    BadRequest
        If there is no such file, it does not parse or is no valid Demes model, or is too large.
    """
    import demes  # of an extra, which configurations without such a scenario do not need

    if isinstance(demography, str):
        path = Path(demography)
        if not path.is_file():
            raise BadRequest(
                f"{at}.demography: there is no file {path.absolute()}; give the path of a Demes YAML file, from the working "
                "directory (that of snakemake's --directory) or absolute"
            )
        at = f"{at}.demography: {path}"
    else:
        at = f"{at}.demography"
    try:
        if isinstance(demography, str):
            read_yaml(path)  # demes would follow nested anchors for ever
        graph = demes.load(path) if isinstance(demography, str) else demes.Graph.fromdict(demography)
    except Exception as error:  # demes raises what its YAML parser and its validators raise
        reason = f"it has no `{error.args[0]}`" if isinstance(error, KeyError) else " ".join(str(error).split())
        if error.__cause__ is not None:
            reason += f": {error.__cause__}"
        raise BadRequest(f"{at} is no valid Demes model: {reason or type(error).__name__}") from None
    content = graph.in_generations().asdict_simplified()
    content = {key: value for key, value in content.items() if key not in ("description", "doi", "metadata")}
    content["demes"] = [{key: value for key, value in deme.items() if key != "description"} for deme in content["demes"]]
    size = len(json.dumps(content))
    if size > LONGEST_DEMOGRAPHY:
        raise BadRequest(f"{at} takes {size} characters, more than the {LONGEST_DEMOGRAPHY} that fit on a command line")
    return json.loads(json.dumps(content))


LONGEST_DEMOGRAPHY = 50_000
"""Characters of a Demes graph in JSON: it travels on command lines, whose words may hold 131 072."""
