"""Putting tracks together: the blocks of each contig, calibrated, into Zarr, a table, bigWig files, Ne(t) and a summary."""

from pathlib import Path

import numpy as np

from cxt.config.translation import Translation
from cxt.console import get_logger
from cxt.genotypes.store import GenotypeStore
from cxt.io import atomic_write, json_text
from cxt.translation.calibration import Diversity, compute_implied, compute_offsets
from cxt.translation.contigs import ContigPlan
from cxt.translation.estimates import COLUMNS, LEVELS, Reader
from cxt.translation.job import Unit, gather
from cxt.translation.rates import write_ne
from cxt.translation.request import choose_calibration, describe_time_scale
from cxt.translation.tables import write_bigwigs, write_table
from cxt.translation.tracks import Tracks, TrackWriter

logger = get_logger(__name__)

MEAN, SD, LOG_MEAN, QUANTILES = 0, 1, 2, slice(3, len(COLUMNS))


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
    warnings: dict[str, int] = {}
    described = {}
    writer = TrackWriter(directory / "tracks.zarr", attributes)
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
        observed, implied, missing = [], [], 0
        for part in gather(units, plan, work=work, warnings=warnings):
            known = ~np.isnan(part.values[..., MEAN])
            diversity = Diversity(
                (part.differences * known).sum(axis=1),
                compute_implied(part.values[..., LOG_MEAN], part.bases, mutation_rate=reader.rates["mutation_rate"] or 0.0),
            )
            rows = slice(part.from_pair, part.to_pair)
            offsets = compute_offsets(diversity, method=method, seed=request.seed, names=names[rows], contig=plan.name)
            offsets = offsets.astype(np.float32)
            writer.write_pairs(
                rows,
                mean=part.values[..., MEAN] + offsets[:, None],
                sd=part.values[..., SD],
                quantiles=part.values[..., QUANTILES] + offsets[:, None, None],
            )
            observed.append(diversity.observed)
            implied.append(diversity.implied * np.exp(offsets))
            missing += int((~known).sum())
        described[plan.name] = {
            "windows": len(kept),
            "missing_windows": missing / max(len(pairs), 1),
            "accessible": float(np.sum(accessible * widths) / widths.sum()),
            "gaps": plan.windows.gaps,
            "gap_rules": [{"start": start, "end": end} | rule._asdict() for start, end, rule in plan.gap_rules],
            "haplotypes_in_panels": len(plan.candidates),
            "called_share": _describe(plan.called),
            "observed_differences": _describe(np.concatenate(observed)),
        }
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
