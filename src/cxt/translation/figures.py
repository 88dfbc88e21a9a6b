"""Figures of tracks: along the genome, all pairs as a heat map, their distribution, and Ne(t)."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cxt.drawing import COLORS, ESTIMATE, create_panels, save_figure
from cxt.errors import BadRequest
from cxt.translation.layout import Layout, Segment, lay_out, read_columns
from cxt.translation.rates import coalescence_rates, compute_shares
from cxt.translation.tracks import Tracks

MISSING = "#d9d9d9"

MOST_TRACKS = 6
"""Pairs of `draw_tracks`."""

MOST_ROWS, MOST_COLUMNS = 300, 1500
"""Pairs and columns of `draw_pairs`."""

TRACK_COLUMNS = 1000

LEAST_SHARE = 0.002
"""Intervals of time in which a smaller share of the genome coalesces are left out of the figure of Ne."""


def _name_pair(names: tuple[str, str], populations: tuple[str, str], *, width: int = 40) -> str:
    """Names of a pair, shortened, with its populations if they are known."""
    text = " – ".join(name if len(name) <= width else f"{name[: width - 1]}…" for name in names)
    return text if populations == ("all", "all") else f"{text}  ({populations[0]}–{populations[1]})"


def _name_populations(populations: tuple[str, str]) -> str:
    return "all pairs" if populations == ("all", "all") else f"{populations[0]} – {populations[1]}"


def _title(tracks: Tracks, what: str) -> str:
    return f"{what}, checkpoint {tracks.attributes['model']}"


def _label_positions(axis: Axes, layout: Layout) -> None:
    """Label the x axis: positions of a single segment, or names of several where there is room."""
    axis.set_xlim(0, layout.edges[-1])
    total = layout.edges[-1]
    if len(layout.segments) == 1:
        segment = layout.segments[0]
        unit, name = (1e6, "Mb") if total >= 2e6 else (1e3, "kb")
        ticks = MaxNLocator(10).tick_values(segment.start / unit, segment.end / unit) * unit
        ticks = ticks[(ticks >= segment.start) & (ticks <= segment.end)]
        axis.set_xticks(ticks - segment.start, [f"{tick / unit:,.10g}" for tick in ticks])
        axis.set_xlabel(f"position on {segment.contig} ({name})", fontsize=8)
        return
    contigs = [segment.contig for segment in layout.segments]
    middles, labels, used = [], [], 0.0
    begins = [0.0, *layout.breaks, total]
    for segment, begin, end in zip(layout.segments, begins[:-1], begins[1:], strict=True):
        label = segment.contig if contigs.count(segment.contig) == 1 else _name_segment(segment)
        half = 0.0037 * len(label) * total  # of a label at this size in a figure of 12 inches
        if (begin + end) / 2 - half >= used:
            middles.append((begin + end) / 2)
            labels.append(label)
            used = (begin + end) / 2 + half
    axis.set_xticks(middles, labels)
    axis.set_xlabel("region" if len(set(contigs)) < len(contigs) else "contig", fontsize=8)


def _name_segment(segment: Segment) -> str:
    return f"{segment.contig}:{segment.start / 1e6:.4g}–{segment.end / 1e6:.4g} Mb"


def _format_times(axis, limits: tuple[float, float]) -> None:
    """Label a logarithmic axis of numbers with plain ones: 200, 5,000; and few enough of them."""
    decades = np.log10(max(limits) / min(limits))
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.6 else (1.0, 2.0, 5.0) if decades > 0.8 else range(1, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _describe_step(layout: Layout, tracks: Tracks) -> str:
    size = tracks.attributes["window_size"]
    return f"windows of {size:,} bp" if layout.step == 1 else f"means of {layout.step} windows of {size:,} bp"


def choose_tracks(tracks: Tracks) -> list[int]:
    """Rows of up to six pairs: of each pair of populations in turn, the first ones."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row, populations in enumerate(tracks.population_pairs):
        groups.setdefault(populations, []).append(row)
    ranked = sorted((place, key) for key, rows in groups.items() for place in range(min(len(rows), MOST_TRACKS)))
    return sorted((groups[key][place] for place, key in ranked[:MOST_TRACKS]), key=lambda r: (tracks.population_pairs[r], r))


def draw_tracks(tracks: Tracks, path, *, segments: Sequence[Segment], rows: Sequence[int]) -> None:
    """Draw the posterior median and the 95% interval of up to six pairs along the genome.

    Parameters
    ----------
    tracks : Tracks
    path : path-like
        Of the PNG file.
    segments : sequence of Segment
        What to draw of the genome.
    rows : sequence of int
        Pairs.

    Raises
    ------
    BadRequest
        If there are more than six pairs, or all windows are missing.
    """
    if not 1 <= len(rows) <= MOST_TRACKS:
        raise BadRequest(f"from 1 to {MOST_TRACKS} pairs can be drawn, got {len(rows)}")
    layout = lay_out(segments, most=TRACK_COLUMNS, window_size=tracks.attributes["window_size"])
    values = np.exp(read_columns(tracks, layout, rows, (0.025, 0.5, 0.975)))
    if np.isnan(values).all():
        raise BadRequest("all windows of these pairs are missing here, so that there is nothing to draw")
    figure, axes = create_panels(len(rows), 1, size=(12, 1.55 * len(rows) + 1.1), sharex=True, sharey=True)
    axes = axes[:, 0]
    limits = np.nanmin(values) / 1.3, np.nanmax(values) * 1.3
    for axis, row, one in zip(axes, rows, values, strict=True):
        gone = np.isnan(one[:, 1])
        for begin, end in zip(np.flatnonzero(np.diff([0, *gone]) == 1), np.flatnonzero(np.diff([*gone, 0]) == -1), strict=True):
            axis.axvspan(layout.edges[begin], layout.edges[end + 1], color=MISSING, lw=0)
        axis.stairs(one[:, 2], layout.edges, baseline=one[:, 0], fill=True, alpha=0.25, color=ESTIMATE, lw=0)
        axis.stairs(one[:, 1], layout.edges, baseline=None, color=ESTIMATE, lw=1.0)
        for place in layout.breaks:
            axis.axvline(place, color="#777777", lw=0.6)
        axis.set_yscale("log")
        axis.set_ylim(limits)
        axis.set_title(_name_pair(tracks.pair_names[row], tracks.population_pairs[row]), fontsize=9, loc="left")
    _format_times(axes[0].yaxis, limits)
    _label_positions(axes[-1], layout)
    if len(segments) > 1:
        for axis in axes:
            axis.tick_params(axis="x", length=0)
    figure.supylabel("TMRCA (generations)", fontsize=9)
    figure.suptitle(f"{_title(tracks, 'TMRCA of pairs')}: {_describe_step(layout, tracks)}", fontsize=11)
    handles = [
        axes[0].plot([], [], color=ESTIMATE, lw=1.4, label="posterior median")[0],
        Patch(color=ESTIMATE, alpha=0.25, lw=0, label="95% interval"),
    ]
    if np.isnan(values).any():
        handles.append(Patch(color=MISSING, lw=0, label="missing"))
    figure.legend(handles=handles, fontsize=9, frameon=False, ncols=3, loc="outside lower center")
    save_figure(figure, path)


def draw_pairs(tracks: Tracks, path, *, segments: Sequence[Segment]) -> None:
    """Draw the posterior medians of all pairs as a heat map: ordered by their populations, then by their mean.

    Of more than 300 pairs, every k-th one is drawn.

    Parameters
    ----------
    tracks : Tracks
    path : path-like
        Of the PNG file.
    segments : sequence of Segment
        What to draw of the genome.

    Raises
    ------
    BadRequest
        If all windows are missing.
    """
    layout = lay_out(segments, most=MOST_COLUMNS, window_size=tracks.attributes["window_size"])
    number = len(tracks.pairs)
    rows = np.arange(0, number, -(-number // MOST_ROWS))
    parts = [read_columns(tracks, layout, rows[i : i + 50], (0.5,))[:, :, 0] for i in range(0, len(rows), 50)]
    values = np.concatenate(parts)
    if np.isnan(values).all():
        raise BadRequest("all windows are missing here, so that there is nothing to draw")
    known = ~np.isnan(values)
    means = np.where(known, values, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    groups = [tracks.population_pairs[row] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (groups[i], means[i], i))
    values, groups = np.exp(values[order]), [groups[i] for i in order]
    has_names = len(rows) <= 40
    height = float(np.clip(0.17 * len(rows) if has_names else 0.03 * len(rows) + 3, 1.2, 9)) + 1.6
    figure, ((axis,),) = create_panels(1, 1, size=(12, height))
    low, high = np.nanpercentile(values, [1, 99])
    high = max(high, low * 1.5)
    axis.set_facecolor(MISSING)
    mesh = axis.pcolormesh(
        layout.edges, np.arange(len(rows) + 1), values, norm=LogNorm(low, high), cmap="viridis", rasterized=True
    )
    for place in layout.breaks:
        axis.axvline(place, color="white", lw=0.8)
    borders = [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]
    for place in borders:
        axis.axhline(place, color="white", lw=1.2)
    axis.invert_yaxis()
    if has_names:
        names = [_name_pair(tracks.pair_names[rows[i]], ("all", "all"), width=24) for i in order]
        axis.set_yticks(np.arange(len(rows)) + 0.5, names, fontsize=7)
    else:
        every = -(-number // MOST_ROWS)
        axis.set_yticks([])
        axis.set_ylabel(f"{len(rows):,} of {number:,} pairs" if every > 1 else f"{number:,} pairs", fontsize=8)
    if groups[0] != ("all", "all"):
        right = axis.twinx()
        right.spines[["top", "right"]].set_visible(False)
        right.set_ylim(axis.get_ylim())
        edges = [0, *borders, len(groups)]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        gap = 0.03 * len(groups) * 6 / height  # room of a label
        shown = [m for i, m in enumerate(middles) if edges[i + 1] - edges[i] >= gap]
        right.set_yticks(shown, [_name_populations(groups[int(m)]) for m in shown], fontsize=8)
        right.tick_params(length=0)
    _label_positions(axis, layout)
    bar = figure.colorbar(mesh, ax=axis, label="TMRCA (generations)", extend="both", aspect=30, pad=0.01)
    _format_times(bar.ax.yaxis, (low, high))
    bar.ax.tick_params(labelsize=8)
    if np.isnan(values).any():
        figure.legend(
            handles=[Patch(color=MISSING, lw=0, label="missing")], fontsize=9, frameon=False, loc="outside lower center"
        )
    figure.suptitle(f"{_title(tracks, 'Posterior median of the TMRCA')}: {_describe_step(layout, tracks)}", fontsize=11)
    save_figure(figure, path)


def _add_years(axis: Axes, tracks: Tracks) -> None:
    """A second axis above with years, if the generation time is known."""
    years = tracks.attributes.get("generation_time")
    if years:
        top = axis.secondary_xaxis("top", functions=(lambda x: x * years, lambda x: x / years))
        top.set_xlabel(f"years ({years:g} per generation)", fontsize=8)
        top.tick_params(labelsize=8)
        _format_times(top.xaxis, axis.get_xlim())  # the same ratio in years


def draw_distribution(tracks: Tracks, path) -> None:
    """Draw the distribution of the TMRCA over windows and pairs for each pair of populations, as the mean of the posteriors.

    Raises
    ------
    BadRequest
        If all windows are missing.
    """
    grid = np.arange(0.0, 20.0, 0.1)
    groups, above, _ = compute_shares(tracks, np.exp(grid))
    if not groups:
        raise BadRequest("all windows are missing, so that there is nothing to draw")
    density = (above[:, :-1] - above[:, 1:]) / np.diff(grid)
    cumulative = np.cumsum(density.mean(axis=0) * np.diff(grid))
    first, last = np.searchsorted(cumulative, [0.0005, 0.9995])
    first, last = max(first - 3, 0), min(last + 4, len(grid) - 1)
    figure, ((axis,),) = create_panels(1, 1, size=(8, 4.2))
    for number, (group, one, shares) in enumerate(zip(groups, density, above, strict=True)):
        median = np.exp(np.interp(0.5, 1 - shares, grid))
        label = f"{_name_populations(group)}: median {median:,.3g}" if median < 1000 else (
            f"{_name_populations(group)}: median {float(f'{median:.3g}'):,.0f}"
        )  # fmt: skip
        middles = np.exp((grid[:-1] + grid[1:]) / 2)
        axis.plot(
            middles[first:last], one[first:last], color=COLORS[number % len(COLORS)], lw=1.6,
            ls=("-", "--", ":")[number // len(COLORS) % 3], label=label,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlim(np.exp(grid[first]), np.exp(grid[last]))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("TMRCA (generations)", fontsize=9)
    axis.set_ylabel("density of ln TMRCA", fontsize=9)
    _format_times(axis.xaxis, axis.get_xlim())
    _add_years(axis, tracks)
    figure.suptitle(_title(tracks, "TMRCA of windows and pairs"), fontsize=11)
    _add_legend(figure, len(groups))
    save_figure(figure, path)


def _add_legend(figure: Figure, entries: int) -> None:
    """A legend below, in up to three columns."""
    figure.legend(fontsize=8, frameon=False, ncols=min(3, entries), loc="outside lower center")


def draw_ne(tracks: Tracks, path) -> None:
    """Draw Ne(t) of each population, and 1 / (2 · rate of coalescence) of pairs of two populations as dashed lines.

    Intervals in which less than 0.2% of the genome coalesces are left out, and so are those that have no neighbour then.

    Raises
    ------
    BadRequest
        If all windows are missing.
    """
    found = coalescence_rates(tracks)
    if not found:
        raise BadRequest("all windows are missing, so that there is nothing to draw")
    figure, ((axis,),) = create_panels(1, 1, size=(8, 4.2))
    lows, highs = [], []
    for number, one in enumerate(found):
        ends = np.append(one.edges[1:], one.edges[-1] * 2)  # the last interval has no end
        shown = (one.share >= LEAST_SHARE) & np.isfinite(one.ne)
        padded = np.pad(shown, 1)
        shown &= padded[:-2] | padded[2:]
        ne = np.where(shown, one.ne, np.nan)
        begins = one.edges.copy()
        begins[0] = one.edges[1] / 2  # 0 has no place on a logarithmic axis
        first, second = one.populations
        axis.stairs(
            ne, np.append(begins, ends[-1]), baseline=None, color=COLORS[number % len(COLORS)], lw=1.6,
            ls="-" if first == second else "--",
            label=_name_populations(one.populations) + ("" if first == second else " (between)"),
        )  # fmt: skip
        lows.append(begins[shown].min(initial=np.inf))
        highs.append(ends[shown].max(initial=0))
    axis.set_xscale("log")
    axis.set_yscale("log")
    if np.isfinite(min(lows)):
        axis.set_xlim(min(lows), max(highs))
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 10 ** (np.log10(low * high) / 2 - 0.5)), max(high, 10 ** (np.log10(low * high) / 2 + 0.5)))
    axis.grid(axis="y", which="major", color="#eeeeee", lw=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("time ago (generations)", fontsize=9)
    axis.set_ylabel("Ne = 1 / (2 · rate of coalescence)\n(diploid individuals)", fontsize=9)
    _format_times(axis.xaxis, axis.get_xlim())
    _format_times(axis.yaxis, axis.get_ylim())
    _add_years(axis, tracks)
    figure.suptitle(_title(tracks, "Effective population size from coalescence rates"), fontsize=11)
    _add_legend(figure, len(found))
    save_figure(figure, path)
