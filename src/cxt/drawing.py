"""What all figures have in common: how they are made and saved, and their colours.

They are drawn without pyplot, so that they do not depend on a backend (a notebook's `MPLBACKEND`) and do not change it.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cxt.errors import BadRequest
from cxt.io import atomic_write, check_writable

ESTIMATE = "#1f6fb4"

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933", "#666666")
"""Told apart with any colour vision (after Okabe and Ito 2008)."""


def create_panels(rows: int, columns: int, *, size: tuple[float, float], **settings) -> tuple[Figure, np.ndarray]:
    """Create a figure of *size* in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


FORMATS = {
    ".png": {"Software": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    ".svg": {"Creator": None, "Date": None},
}
"""{ending of a figure's file: metadata that matplotlib is to leave out}."""


def check_figure_file(path, *, flag: str) -> None:
    """BadRequest unless the ending of *path*, the value of *flag*, is that of a format, and it can be written."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise BadRequest(
            f"{flag} {path}: a figure must end in {', '.join(FORMATS)}, got {repr(ending) if ending else 'no ending'}"
        )
    check_writable(path)


def save_figure(figure: Figure, path) -> None:
    """Write *figure* in the format of its ending, atomically; without date and software, equal ones have equal bytes."""
    ending, out = Path(path).suffix.lower(), io.BytesIO()
    with rc_context({"svg.hashsalt": "cxt"}):  # which is random by default
        figure.savefig(out, format=ending[1:], dpi=120, metadata=FORMATS[ending])
    atomic_write(path, out.getvalue())
