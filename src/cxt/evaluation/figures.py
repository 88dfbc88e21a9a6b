"""Figures of a run and of an evaluation: losses, tracks along the genome, and predicted against true."""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from cxt.checkpoints.training_log import METRIC_PREFIX
from cxt.drawing import COLORS, ESTIMATE, create_panels, save_figure

TRUTH = "#222222"


METRIC_TITLES = {
    "accuracy": ("accuracy", "share of windows in the right bin"),
    "within_one_bin": ("accuracy within one bin", "share of windows"),
    "perplexity": ("perplexity", "bins"),
    "crps": ("continuous ranked probability score", "ln generations"),
    "ece": ("expected calibration error", "probability"),
}
"""Titles and units of the metrics in a training log."""

MARKERS = ("o", "s", "^", "D")


def draw_tracks(tracks: dict, path, *, title: str, window_size: int) -> None:
    """Draw true ln TMRCA, posterior mean and 95% interval along the genome, for two pairs of each scenario, one row each.

    *tracks* is {scenario: (truth, mean, low, high)}, each (simulations, pairs, windows). A key may also be a tuple with the
    names of the two pairs.
    """
    rows = len(tracks)
    figure, axes = create_panels(rows, 2, size=(12, 2.0 * rows + 0.8), sharex=True)
    for row, (name, arrays) in enumerate(tracks.items()):
        truth, mean, low, high = (a.reshape(-1, a.shape[-1]) for a in arrays)
        edges = np.arange(truth.shape[1] + 1) * window_size / 1000
        for column, pair in enumerate(dict.fromkeys((0, len(truth) // 2))):
            axis = axes[row, column]
            axis.stairs(
                high[pair], edges, baseline=low[pair], fill=True, alpha=0.25, color=ESTIMATE, lw=0, label="95% interval"
            )
            axis.stairs(mean[pair], edges, baseline=None, color=ESTIMATE, lw=1.4, label="posterior mean")
            axis.stairs(truth[pair], edges, baseline=None, color=TRUTH, lw=1.0, label="truth")
            axis.set_title(name if isinstance(name, str) else name[column], fontsize=9, loc="left")
            axis.margins(x=0)
        axes[row, 0].set_ylabel("ln TMRCA\n(ln generations)", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("position (kb)", fontsize=8)
    figure.suptitle(f"{title}: pairs of held-out simulations", fontsize=11)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=9, frameon=False, ncols=3, loc="outside lower center")
    save_figure(figure, path)


def draw_losses(rows: list[dict], path, *, title: str) -> None:
    """Draw loss, accuracy of decoding, learning rate, gradient norm and speed of a run over its optimizer steps.

    *rows* are those of a training_log.csv, as returned by `cxt.checkpoints.training_log.read_log`. Its `metrics` have panels,
    too.
    """
    panels = [
        ("loss", "cross-entropy (nats per window)", (("train_loss", "training", ESTIMATE), ("val_loss", "validation", TRUTH))),
        ("MSE of decoded test pairs", "(ln generations)²", (("val_mse", "", TRUTH),)),
        ("correlation of decoded test pairs", "Pearson's r", (("val_r", "", TRUTH),)),
        ("learning rate", "learning rate", (("lr", "", ESTIMATE),)),
        ("gradient norm before clipping", "norm", (("grad_norm", "", ESTIMATE),)),
        ("speed", "examples per second", (("items_per_s", "", ESTIMATE),)),
    ]
    columns = rows[0].keys() if rows else ()
    panels += [
        (f"{title} of decoded test pairs", unit, ((METRIC_PREFIX + metric, "", TRUTH),))
        for metric, (title, unit) in METRIC_TITLES.items()
        if METRIC_PREFIX + metric in columns
    ]
    lowest = -(-len(panels) // 3)
    figure, axes = create_panels(lowest, 3, size=(13, 3 * lowest), sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, unit, lines) in zip(axes.flat, panels, strict=False):
        for column, label, color in lines:
            points = [(row["step"], row[column]) for row in rows if row[column] is not None]
            if points:
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), color=color, lw=1.2, label=label, marker=marker, ms=4)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_ylabel(unit, fontsize=8)
        if len(lines) > 1 and axis.lines:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes.flat[max(0, len(panels) - 3) : len(panels)]:
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelbottom=True)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def draw_comparison(logs: dict[str, list[dict]], path) -> None:
    """Draw losses, accuracy and learning rates of several runs; *logs* is {name: rows of a training_log.csv}."""
    figure, axes = create_panels(2, 2, size=(11, 6), sharex=True)
    panels = (
        ("training loss", "nats per window", "train_loss"),
        ("validation loss", "nats per window", "val_loss"),
        ("MSE of decoded test pairs", "(ln generations)²", "val_mse"),
        ("learning rate", "learning rate", "lr"),
    )
    for axis, (title, unit, column) in zip(axes.flat, panels, strict=True):
        for number, (name, rows) in enumerate(logs.items()):
            points = [(row["step"], row[column]) for row in rows if row[column] is not None]
            if points:
                marker = "o" if len(points) < 30 else None
                axis.plot(
                    *zip(*points, strict=True), color=COLORS[number % len(COLORS)], lw=1.2, label=name, marker=marker, ms=4
                )
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel(unit, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside lower center")
    save_figure(figure, path)


def draw_learning_rates(rates, losses, suggestion: float, path, *, title: str) -> None:
    """Draw loss against learning rate of a search, and the rate that it suggests."""
    figure, axes = create_panels(1, 1, size=(7, 4))
    axis = axes[0, 0]
    axis.plot(rates, losses, color=ESTIMATE, lw=1.2)
    at = int(np.argmin(np.abs(np.log(rates) - np.log(suggestion))))
    axis.plot(rates[at], losses[at], "o", color=TRUTH, label=f"suggestion {suggestion:.2g}")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate", fontsize=9)
    axis.set_ylabel("smoothed training loss (nats per window)", fontsize=9)
    axis.legend(fontsize=9, frameon=False)
    axis.set_title(title, fontsize=11, loc="left")
    save_figure(figure, path)


def draw_scatter(tracks: dict, path, *, title: str, scenarios: dict) -> None:
    """Draw predicted against true ln TMRCA of all windows, one panel per scenario, with one scale of colours."""
    columns = min(4, len(tracks))
    rows = -(-len(tracks) // columns)
    figure, axes = create_panels(rows, columns, size=(2.9 * columns + 1, 3.1 * rows + 0.6))
    cells = []
    for axis, (name, (truth, mean, _, _)) in zip(axes.flat, tracks.items(), strict=False):
        low = min(truth.min(), mean.min())
        high = max(truth.max(), mean.max())
        cells.append(
            axis.hexbin(truth.ravel(), mean.ravel(), gridsize=50, cmap="viridis", extent=(low, high, low, high), mincnt=1)
        )
        axis.plot([low, high], [low, high], color=TRUTH, lw=0.8)
        r = scenarios[name]["r"]
        axis.set_title(f"{name}\nMSE {scenarios[name]['mse']:.3f}, r {'-' if r is None else f'{r:.3f}'}", fontsize=9)
        ticks = [tick for tick in MaxNLocator(5, integer=True).tick_values(low, high) if low <= tick <= high]
        axis.set(aspect="equal", xticks=ticks, yticks=ticks)
    most = max(float(cell.get_array().max()) for cell in cells)
    for cell in cells:
        cell.set_norm(LogNorm(1, max(most, 2)))
    for axis in axes.flat[len(tracks) :]:
        axis.set_visible(False)
    figure.colorbar(cells[-1], ax=axes, label="windows per cell", shrink=0.8, aspect=30)
    figure.supxlabel("true ln TMRCA (ln generations)", fontsize=9)
    figure.supylabel("posterior mean (ln generations)", fontsize=9)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def draw_calibration(scenarios: dict, path, *, title: str) -> None:
    """Draw how well intervals and ranks of the truth are calibrated, a line per scenario.

    On the left is the share of windows whose truth is inside an interval, against the interval's level; on the right, the
    histogram of the rank of the truth in its posterior distribution.
    """
    figure, axes = create_panels(1, 2, size=(11, 4.5))
    axis, ranks = axes[0]
    axis.plot([0, 1], [0, 1], color=TRUTH, lw=0.8, label="calibrated")
    ranks.axhline(1, color=TRUTH, lw=0.8)
    for number, (name, metrics) in enumerate(scenarios.items()):
        levels = [float(level) for level in metrics["coverage"]]
        style = {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[number // len(COLORS) % len(MARKERS)],
            "ms": 4,
            "lw": 1.2,
        }
        axis.plot(levels, list(metrics["coverage"].values()), label=name, **style)
        classes = len(metrics["ranks"])
        density = [share * classes for share in metrics["ranks"]]
        ranks.stairs(density, np.linspace(0, 1, classes + 1), baseline=None, color=style["color"], lw=1.2)
    axis.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
    axis.set_xlabel("level of the central interval", fontsize=9)
    axis.set_ylabel("share of windows with the truth inside", fontsize=9)
    ranks.set(xlim=(0, 1), ylim=(0, None))
    ranks.set_xlabel("rank of the truth in its posterior", fontsize=9)
    ranks.set_ylabel("windows, relative to equal shares", fontsize=9)
    figure.suptitle(f"{title}: calibration on held-out simulations", fontsize=11)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    save_figure(figure, path)
