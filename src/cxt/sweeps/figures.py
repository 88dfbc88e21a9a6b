"""Figures of a sweep: the metric over its trials, and how much of it each parameter explains."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from cxt.console import counted
from cxt.drawing import COLORS, ESTIMATE, create_panels, save_figure


def draw_history(trials: Sequence[tuple[int, str, float | None]], path: Path, *, metric: str, goal: str) -> None:
    """Draw the metric of each trial and the best one so far.

    Parameters
    ----------
    trials : sequence of (number, state, value)
        States are complete, pruned, failed and running; value is None if there is none.
    path : path-like
        The .png file.
    metric, goal : str
        Name of the metric, and `minimize` or `maximize`.
    """
    figure, axes = create_panels(1, 1, size=(7, 4))
    axis = axes[0, 0]
    complete = [(number, value) for number, state, value in trials if state == "complete" and value is not None]
    pruned = [(number, value) for number, state, value in trials if state == "pruned" and value is not None]
    none = [number for number, state, value in trials if state in ("pruned", "failed") and value is None]
    if complete:
        better = min if goal == "minimize" else max
        best = [better(value for _, value in complete[: place + 1]) for place in range(len(complete))]
        axis.plot(
            [number for number, _ in complete], best, color=COLORS[1], lw=1.4, drawstyle="steps-post", label="best so far"
        )
        axis.plot(*zip(*complete, strict=True), "o", color=ESTIMATE, ms=5, label="complete")
    if pruned:
        axis.plot(*zip(*pruned, strict=True), "v", color=COLORS[7], ms=5, mfc="none", label="pruned, last value")
    if none:  # at the lower edge, because they have no value
        axis.plot(
            none, [0.02] * len(none), "x", color=COLORS[5], ms=6, label="refused or failed", clip_on=False,
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(-0.5, max((number for number, _, _ in trials), default=0) + 0.5)
    axis.set_xlabel("trial", fontsize=9)
    axis.set_ylabel(metric, fontsize=9)
    figure.suptitle(f"{metric} of {counted(len(trials), 'trial')}", fontsize=11)
    figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    save_figure(figure, path)


def draw_importances(importances: Mapping[str, float], path: Path, *, metric: str) -> None:
    """Draw the importance of each parameter, the largest at the top.

    Parameters
    ----------
    importances : mapping
        {parameter: share, from 0 to 1}.
    path : path-like
        The .png file.
    metric : str
        Name of the metric.
    """
    ordered = sorted(importances.items(), key=lambda item: item[1])
    figure, axes = create_panels(1, 1, size=(7, 1.2 + 0.35 * len(ordered)))
    axis = axes[0, 0]
    bars = axis.barh([name for name, _ in ordered], [share for _, share in ordered], color=ESTIMATE, height=0.6)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.set_xlim(0, 1.08 * max(1e-9, *(share for _, share in ordered), 0))
    axis.set_xlabel("importance (PED-ANOVA)", fontsize=9)
    axis.set_title(f"Importance for {metric}", fontsize=11, loc="left")
    save_figure(figure, path)
