"""Print the reference of all configuration keys, config/README.md, or their JSON Schema for editors."""

import argparse

from cxt.config.reference import json_schema, render_reference
from cxt.console import exit_on_bad_request


def main(argv: list[str] | None = None) -> None:
    """Run `cxt schema`: print the reference of all configuration keys, or their JSON Schema.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt schema", description="Print config/README.md, the reference of all keys.")
    parser.add_argument(
        "--json", action="store_true", help="print config/config.schema.json, the JSON Schema for editors, instead"
    )
    args = parser.parse_args(argv)
    print(json_schema() if args.json else render_reference(), end="")


if __name__ == "__main__":
    exit_on_bad_request(main)
