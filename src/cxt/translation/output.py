"""Putting tracks together: the blocks of each contig, calibrated, into Zarr, a table, bigWig files, Ne(t) and a summary."""

from pathlib import Path

import numpy as np

from cxt.config.translation import Translation
from cxt.console import get_logger
from cxt.genotypes.store import GenotypeStore
from cxt.io import atomic_write, json_text
from cxt.translation.blocks import choose_flank
from cxt.translation.calibration import compute_offsets
from cxt.translation.contigs import ContigPlan
from cxt.translation.estimates import LEVELS, Reader
from cxt.translation.gathering import (
    MEAN,
    QUANTILES,
    SD,
    WIDE,
    Sums,
    add_up,
    group_units,
    iterate_stretches,
)
from cxt.translation.job import Unit
from cxt.translation.rates import write_ne
from cxt.translation.request import choose_calibration, describe_time_scale
from cxt.translation.tables import write_bigwigs, write_table
from cxt.translation.tracks import Tracks, TrackWriter

logger = get_logger(__name__)

MUCH = 0.1
"""Share of the mean TMRCA of a contig that is due to windows with wide intervals, from which on a warning says so."""


def write_output(
    directory: Path,
    units: list[Unit],
    plans: list[ContigPlan],
    *,
    request: Translation,
    reader: Reader,
    store: GenotypeStore,
    pairs: np.ndarray,
    work: Path,
    checkpoint_sha256: str,
    bigwig: bool,
) -> Tracks:
    """Write everything to *directory*; `summary.json` comes last, and says that the translation is finished."""
    method = choose_calibration(request, reader.model)
    used, columns = np.unique(pairs, return_inverse=True)
    haplotypes = [store.haplotypes[i] for i in used]
    names = [(store.haplotypes[a].name, store.haplotypes[b].name) for a, b in pairs]
    attributes = {
        "model": Path(request.model).stem,
        "checkpoint_sha256": checkpoint_sha256,
        "window_size": reader.model.config.window_size,
        "units": "ln generations",
        "time_scale": describe_time_scale(reader.model, request, method),
        "mutation_rate": request.mutation_rate,
        "recombination_rate": request.recombination_rate,
        "generation_time": request.generation_time,
        "calibration": method,
        "seed": request.seed,
        "panels": request.panels,
        "reading": reader.reading,
        "quantile_levels": list(LEVELS),
        "min_accessible": request.min_accessible,
        "haplotypes": [[haplotype.name, haplotype.population] for haplotype in haplotypes],
        "pairs": columns.reshape(-1, 2).tolist(),
    }
    replicates = reader.kept_replicates
    if replicates:
        read = reader.model.config.windows
        attributes |= {"replicates": replicates, "block_windows": read - 2 * choose_flank(read, request.flank)}
    centres = reader.grid.centres
    warnings: dict[str, int] = {}
    described = {}
    groups = group_units(units)
    writer = TrackWriter(directory / "tracks.zarr", attributes, replicates=replicates)
    for plan in plans:
        kept = plan.kept
        size = reader.model.config.window_size
        start = kept * size
        widths = plan.windows.widths[kept]
        accessible = plan.windows.accessible[kept] / widths
        writer.add_contig(
            plan.name, plan.length, start=start, end=start + widths, accessible=accessible.astype(np.float32),
            called=plan.called.astype(np.float32),
        )  # fmt: skip
        sums, implied = [], []
        for chunk in (chunk for (place, _), chunk in groups.items() if place == plan.place):
            rows = slice(chunk[0].from_pair, chunk[0].to_pair)
            total = add_up(chunk, work=work, mutation_rate=reader.rates["mutation_rate"] or 0.0, warnings=warnings)
            offsets = compute_offsets(total.diversity, method=method, seed=request.seed, names=names[rows], contig=plan.name)
            offsets = offsets.astype(np.float32)
            for stretch in iterate_stretches(chunk, kept, work=work, replicates=replicates):
                values = stretch.values
                sampled = {}
                if stretch.bins is not None:
                    sequences = (centres[stretch.bins] + offsets[:, None, None]).astype(np.float32)
                    sequences[np.broadcast_to(np.isnan(values[:, None, :, MEAN]), sequences.shape)] = np.nan
                    sampled = {"replicates": sequences.transpose(1, 0, 2)}
                writer.write_pairs(
                    rows,
                    stretch.windows,
                    mean=values[..., MEAN] + offsets[:, None],
                    sd=values[..., SD],
                    quantiles=values[..., QUANTILES] + offsets[:, None, None],
                    **sampled,
                )
            sums.append(total)
            implied.append(total.diversity.implied * np.exp(offsets))
        estimated = sum(block.keep_to - block.keep_from for block in plan.blocks)
        missing = sum(one.missing for one in sums) + (len(kept) - estimated) * len(pairs)
        described[plan.name] = {
            "windows": len(kept),
            "missing_windows": missing / max(len(pairs), 1),
            "accessible": float(np.sum(accessible * widths) / widths.sum()),
            "gaps": plan.windows.gaps,
            "gap_rules": [{"start": start, "end": end} | rule._asdict() for start, end, rule in plan.gap_rules],
            "haplotypes_in_panels": len(plan.candidates),
            "called_share": _describe(plan.called),
            "observed_differences": _describe(np.concatenate([one.diversity.observed for one in sums])),
            "wide_intervals": _describe_wide(sums, len(kept) * len(pairs) - missing),
        }
        _warn_of_wide(plan.name, described[plan.name]["wide_intervals"], len(kept) * len(pairs) - missing)
        if request.mutation_rate is not None:
            described[plan.name]["implied_differences"] = _describe(np.concatenate(implied))
    writer.finish()
    tracks = Tracks(directory / "tracks.zarr")
    logger.info("writing tracks.tsv.gz")
    write_table(tracks, directory / "tracks.tsv.gz")
    write_ne(tracks, directory / "ne.csv")
    if bigwig:
        write_bigwigs(tracks, directory / "bigwig")
    for text, blocks in warnings.items():
        logger.warning(f"in {blocks} of {len(units)} blocks, for example: {text}")
    summary = {
        **{key: value for key, value in attributes.items() if key not in ("haplotypes", "pairs")},
        "input": request.input,
        "pairs": len(pairs),
        "read": store.report,
        "contigs": described,
        "warnings": warnings,
    }
    atomic_write(directory / "summary.json", json_text(summary).encode())
    return tracks


def _describe(values: np.ndarray) -> dict[str, float]:
    """Smallest, mean and largest value over the pairs."""
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def _describe_wide(sums: list[Sums], windows: int) -> dict[str, float]:
    """How many of the pairs' *windows* have a 95% interval that is uninformative, and what they make up."""
    total = sum(one.mean_time for one in sums)
    return {
        "longer_than": WIDE,
        "windows": sum(one.wide for one in sums),
        "share_of_windows": sum(one.wide for one in sums) / max(windows, 1),
        "share_of_mean_tmrca": sum(one.wide_time for one in sums) / total if total else 0.0,
    }


def _warn_of_wide(contig: str, found: dict[str, float], windows: int) -> None:
    """Log that there are such windows; as a warning, if means over the contig depend on them."""
    if not found["windows"]:
        return
    share = found["share_of_mean_tmrca"]
    text = (
        f"contig {contig}: {found['windows']:,} of {windows:,} windows of pairs have a 95% interval that spans more than "
        f"{WIDE:g} in ln TMRCA, and {share:.1%} of the mean TMRCA"
    )
    if share < MUCH:
        logger.info(text)
    else:
        logger.warning(f"{text}: means over the contig, and the oldest part of ne.csv, depend on uninformative windows")
