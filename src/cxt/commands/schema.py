"""Print config/README.md, the reference of all configuration keys."""

import argparse

from cxt.config.schema import (
    document,
)
from cxt.console import exit_on_bad_request


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="cxt schema", description="Print config/README.md, made from the schema of the configuration."
    ).parse_args(argv)
    print(document(), end="")


if __name__ == "__main__":
    exit_on_bad_request(main)
