"""Write one model's training settings as a YAML file, which `cxt train --config` reads."""

import argparse
import json
from pathlib import Path

import yaml

from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest
from cxt.io import atomic_write


def main(argv: list[str] | None = None) -> None:
    """Run `cxt configfile`: write one model's training settings as YAML.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt configfile", description="Write one model's training settings as YAML.")
    parser.add_argument("--spec", required=True, help="the settings as JSON")
    parser.add_argument("--out", required=True, type=Path, help="YAML file to write")
    args = parser.parse_args(argv)
    try:
        settings = json.loads(args.spec)
    except json.JSONDecodeError as error:
        raise BadRequest(f"--spec is not valid JSON: {error}") from None
    atomic_write(args.out, yaml.safe_dump(settings, sort_keys=True).encode())


if __name__ == "__main__":
    exit_on_bad_request(main)
