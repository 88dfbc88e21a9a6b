"""Tests in this directory take seconds to minutes each: they are marked slow, and left out by `make test`."""

from pathlib import Path

import pytest

QUICK = ()


def pytest_collection_modifyitems(items) -> None:
    """Mark the tests of this directory, but for those of some modules."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.name not in QUICK:
            item.add_marker(pytest.mark.slow)
