"""What all figures have in common: how they are made and saved, and their colours.

They are drawn without pyplot, so that they do not depend on a backend (a notebook's `MPLBACKEND`) and do not change it.
"""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cxt.io import atomic_write

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


def save_figure(figure: Figure, path) -> None:
    """Write *figure* as PNG, atomically and without its software's name, so that equal figures have equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    atomic_write(path, out.getvalue())
