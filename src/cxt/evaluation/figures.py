"""Figures of a run and of an evaluation: losses, tracks along the genome, and predicted against true.

They are drawn without pyplot, so that they do not depend on a backend (a notebook's `MPLBACKEND`) and do not change it.
"""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cxt.io import atomic_write

TRUTH, ESTIMATE = "#222222", "#1f6fb4"


def _create_panels(rows: int, columns: int, *, size: tuple[float, float], **settings) -> tuple[Figure, np.ndarray]:
    """Create a figure of *size* in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def _save(figure: Figure, path) -> None:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    atomic_write(path, out.getvalue())


def draw_tracks(tracks: dict, path, *, title: str, window_size: int) -> None:
    """Draw true ln TMRCA, posterior mean and 95% interval along the genome, for two pairs of each scenario, one row each.

    *tracks* is {scenario: (truth, mean, low, high)}, each (simulations, pairs, windows). A key may also be a tuple with the
    names of the two pairs.
    """
    rows = len(tracks)
    figure, axes = _create_panels(rows, 2, size=(12, 2.1 * rows), sharex=True)
    for row, (name, arrays) in enumerate(tracks.items()):
        truth, mean, low, high = (a.reshape(-1, a.shape[-1]) for a in arrays)
        for column, pair in enumerate(dict.fromkeys((0, len(truth) // 2))):
            axis = axes[row, column]
            at = (np.arange(truth.shape[1]) + 0.5) * window_size / 1000
            axis.fill_between(at, low[pair], high[pair], step="mid", alpha=0.25, color=ESTIMATE, lw=0, label="95% interval")
            axis.step(at, mean[pair], where="mid", color=ESTIMATE, lw=1.2, label="posterior mean")
            axis.step(at, truth[pair], where="mid", color=TRUTH, lw=1.0, label="truth")
            axis.set_title(name if isinstance(name, str) else name[column], fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
        axes[row, 0].set_ylabel("ln TMRCA\n(generations)", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("position (kb)", fontsize=8)
    figure.suptitle(f"{title}: pairs of held-out simulations", fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=9, frameon=False, ncols=3, loc="upper right")
    _save(figure, path)


def draw_losses(rows: list[dict], path, *, title: str) -> None:
    """Draw loss, error of decoding, learning rate and gradient norm of a run over its optimizer steps.

    *rows* are those of a training_log.csv, as returned by `cxt.trainer.log.read_log`.
    """
    figure, axes = _create_panels(2, 2, size=(11, 6), sharex=True)
    panels = (
        ("loss", (("train_loss", "training", ESTIMATE), ("val_loss", "validation", TRUTH))),
        ("decoded test examples", (("val_mse", "MSE of ln TMRCA", ESTIMATE), ("val_r", "correlation along a pair", TRUTH))),
        ("learning rate", (("lr", "", ESTIMATE),)),
        ("gradient norm before clipping", (("grad_norm", "", ESTIMATE),)),
    )
    for axis, (name, lines) in zip(axes.flat, panels, strict=True):
        for column, label, color in lines:
            points = [(row["step"], row[column]) for row in rows if row[column] is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True), color=color, lw=1.2, label=label, marker="." if len(points) < 30 else None
                )
        axis.set_title(name, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1 and axis.lines:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=8)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    _save(figure, path)


def draw_learning_rates(rates, losses, suggestion: float, path, *, title: str) -> None:
    """Draw loss against learning rate of a search, and the rate that it suggests."""
    figure, axes = _create_panels(1, 1, size=(7, 4))
    axis = axes[0, 0]
    axis.plot(rates, losses, color=ESTIMATE, lw=1.2)
    at = int(np.argmin(np.abs(np.log(rates) - np.log(suggestion))))
    axis.plot(rates[at], losses[at], "o", color=TRUTH, label=f"suggestion {suggestion:.2g}")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate", fontsize=9)
    axis.set_ylabel("smoothed training loss", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, frameon=False)
    axis.set_title(title, fontsize=11, loc="left")
    _save(figure, path)


def draw_scatter(tracks: dict, path, *, title: str, scenarios: dict) -> None:
    """Draw predicted against true ln TMRCA of all windows, one panel per scenario."""
    columns = min(4, len(tracks))
    rows = -(-len(tracks) // columns)
    figure, axes = _create_panels(rows, columns, size=(3.1 * columns, 3.1 * rows))
    for axis, (name, (truth, mean, _, _)) in zip(axes.flat, tracks.items(), strict=False):
        low = min(truth.min(), mean.min())
        high = max(truth.max(), mean.max())
        axis.hexbin(truth.ravel(), mean.ravel(), gridsize=50, bins="log", cmap="Blues", extent=(low, high, low, high), mincnt=1)
        axis.plot([low, high], [low, high], color=TRUTH, lw=0.8)
        r = scenarios[name]["r"]
        axis.set_title(f"{name}\nMSE {scenarios[name]['mse']:.3f}, r {'-' if r is None else f'{r:.3f}'}", fontsize=9)
        axis.set_aspect("equal")
    for axis in axes.flat[len(tracks) :]:
        axis.set_visible(False)
    figure.supxlabel("true ln TMRCA (generations)", fontsize=9)
    figure.supylabel("posterior mean", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    _save(figure, path)
