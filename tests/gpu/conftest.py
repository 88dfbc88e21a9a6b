"""Tests in this directory need a GPU; without one they are skipped."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items) -> None:
    """Mark the tests of this directory `gpu`, and skip them if torch sees no GPU."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))
