"""From a user's genotypes to TMRCA tracks: `cxt.translate`, and the steps that a workflow runs one by one."""

import importlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cxt.checkpoints.load import find_checkpoint, load_model
from cxt.config.learning import check_replicates, choose_reading
from cxt.config.translation import DEFAULT_REPLICATES, Translation
from cxt.console import get_logger
from cxt.errors import BadRequest, Failed
from cxt.genotypes.mask_file import MaskFile
from cxt.genotypes.pairs import check_pairs, choose_pairs
from cxt.genotypes.read import read_genotypes
from cxt.genotypes.records import Contig, Region, Source
from cxt.genotypes.selection import parse_region, resolve_regions
from cxt.genotypes.sources import open_source
from cxt.genotypes.store import GenotypeStore
from cxt.io import file_sha256
from cxt.model.inputs import reads_missingness
from cxt.model.transformer import CoalescenceModel
from cxt.translation.blocks import choose_flank
from cxt.translation.contigs import ContigPlan, extend_regions, plan_contigs
from cxt.translation.directory import hold_directory
from cxt.translation.estimates import Reader
from cxt.translation.job import list_missing, list_units, run_units
from cxt.translation.output import write_output
from cxt.translation.request import identify
from cxt.translation.tables import check_bigwig
from cxt.translation.tracks import Tracks

logger = get_logger(__name__)

STEPS = ("all", "read", "blocks", "finish")

CPU_BATCH = 8
"""Pairs that are read together on a CPU."""


def translate(
    input: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "small",
    out: str | os.PathLike[str],
    regions: Sequence[str] | str = (),
    samples: Sequence[str] | str | None = None,
    populations: str | os.PathLike[str] | None = None,
    pairs: str | int = "within-individual",
    assume_phased: bool = False,
    mask: str | os.PathLike[str] | None = None,
    mask_marks: str | None = None,
    keep_filtered: bool = False,
    ancestral: str = "auto",
    mutation_rate: float | None = None,
    recombination_rate: float | None = None,
    generation_time: float | None = None,
    calibration: str = "auto",
    reading: str | None = None,
    replicates: int | None = None,
    panels: int = 1,
    min_accessible: float = 0.25,
    max_gap: int | None = None,
    flank: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | str = "auto",
    bigwig: bool = False,
    force: bool = False,
) -> Tracks:
    """Estimate the TMRCA of pairs of haplotypes along the genome, from a file of genotypes.

    Run again after an interruption with the same arguments, it goes on where it was; the result is the same to the byte.

    Parameters
    ----------
    input : path-like
        VCF or BCF (plain or compressed, with or without an index), VCF Zarr, a tree sequence (`.trees`, `.tsz`), or a `.npz`
        file of arrays. The format is recognised by the content.
    model : path-like
        Name or path of a checkpoint, as for `cxt.load_model`.
    out : path-like
        Directory to write: `tracks.zarr`, `tracks.tsv.gz` with its index, `ne.csv` and `summary.json`.
    regions : sequence of str
        Such as `chr2` or `chr2:1000001-2000000`, first and last base counted from 1; by default, every contig. Genotypes on
        both sides are read as context, so that an estimate does not depend on the region that was asked for.
    samples : sequence of str, or path, optional
        Individuals to use, or a file with one name a line; by default, all.
    populations : path-like, optional
        Table of samples and their populations.
    pairs : str or int
        `within-individual` (the two haplotypes of each individual), `all`, `within` or `between` populations, a number of
        random pairs, or a file with two names a line.
    assume_phased : bool
        Take unphased genotypes as phased, for pairs of different individuals.
    mask : path-like, optional
        Accessibility mask: BED, or .npz with one value a base.
    mask_marks : str
        `accessible` or `inaccessible`: what the intervals or true values of *mask* mean. Required with it.
    keep_filtered : bool
        Use records that failed a filter of the file; they are dropped by default.
    ancestral : str
        `INFO/AA` or another tag, a FASTA file, `ref`, or `tree`. `auto`: INFO/AA if there is one, the tree sequence's ancestral
        states, or else the reference allele, with a warning.
    mutation_rate : float, optional
        Per base pair and generation. It sets the time scale; without it, times are in the training scenarios' rate.
    recombination_rate : float, optional
        Per base pair and generation, for a checkpoint that reads rates.
    generation_time : float, optional
        Years, to write years as well.
    calibration : str
        With *mutation_rate*: `diversity` multiplies the times of each pair on each contig so that they imply the differences
        observed; `gamma` does so by a random draw given these; `none` does not. `auto`: `none` for a checkpoint that reads
        rates and so is given the rate, `diversity` for others.
    reading : str, optional
        As for `cxt.predict`.
    replicates : int, optional
        For a checkpoint that is read by sampling: sequences to decode for each pair. Estimates average over them, and they are
        part of the output (`ContigTracks.replicates`). By default 15, which are not part of it.
    panels : int
        Where there are more haplotypes than the checkpoint reads: random subsets with the pair to average.
    min_accessible : float
        Windows of which less than this share can be read are missing in the output.
    max_gap : int, optional
        Base pairs without any variant that are taken as inaccessible, see `cxt.translation.accessibility.find_gaps`; 0: none.
    flank : int, optional
        Windows on each side of a block that are read and dropped; by default a fifth of what the checkpoint reads.
    seed : int
        Of random pairs, subsets, sampled sequences and gamma draws.
    device : str
        `auto` is the first GPU if there is one.
    batch_size : int or "auto"
        Pairs that are read together. The result does not depend on it, except for rounding on a GPU.
    bigwig : bool
        Also write `bigwig/<pair>.bw`.
    force : bool
        Replace a translation of other settings, or a finished one, in *out*.

    Returns
    -------
    Tracks

    Raises
    ------
    BadRequest
        If a setting or file is not valid, nothing usable was read, the checkpoint does not fit the data, or *out* holds
        something else.
    Failed
        If a part of an interrupted translation is damaged.
    """
    settings = {
        "input": os.fspath(input), "model": os.fspath(model), "regions": _as_list(regions),
        "samples": _as_list(samples, split=False), "populations": None if populations is None else os.fspath(populations),
        "pairs": pairs, "assume_phased": assume_phased, "mask": None if mask is None else os.fspath(mask),
        "mask_marks": mask_marks, "keep_filtered": keep_filtered, "ancestral": os.fspath(ancestral),
        "mutation_rate": mutation_rate,
        "recombination_rate": recombination_rate, "generation_time": generation_time, "calibration": calibration,
        "reading": reading, "replicates": replicates, "panels": panels, "min_accessible": min_accessible, "max_gap": max_gap,
        "flank": flank, "seed": seed,
    }  # fmt: skip
    request = Translation.read({name: value for name, value in settings.items() if value is not None})
    tracks = run_translation(
        request, Path(out), device=device, batch_size=batch_size, bigwig=bigwig, force=force, step="all", part=(1, 1)
    )
    assert tracks is not None
    return tracks


def run_translation(
    request: Translation,
    directory: Path,
    *,
    device: str,
    batch_size: int | str,
    bigwig: bool,
    force: bool,
    step: str,
    part: tuple[int, int],
) -> Tracks | None:
    """Run one step of a translation, or all of them; see `translate`.

    Parameters
    ----------
    request : Translation
    directory : Path
        Where to write.
    device, batch_size, bigwig, force
        As in `translate`.
    step : str
        `read` only reads the genotypes, `blocks` then translates the *part*, `finish` writes the output; `all` does all.
    part : (int, int)
        Which part of how many the step `blocks` translates, counted from 1.

    Returns
    -------
    Tracks, or None unless the last step is done
    """
    if step not in STEPS:
        raise BadRequest(f"step must be one of {', '.join(STEPS)}, got '{step}'")
    if not 1 <= part[0] <= part[1]:
        raise BadRequest(f"part must be from 1 to the number of parts, got {part[0]} of {part[1]}")
    checkpoint = find_checkpoint(request.model)
    network = load_model(checkpoint, device=_choose_device(device))
    way = choose_reading(network.objective, request.reading, name=f"checkpoint {request.model}")
    # What can be known before a long file is read.
    check_pairs(request.pairs)
    check_replicates(request.replicates, network.objective, way, name=f"checkpoint {request.model}")
    choose_flank(network.config.windows, request.flank)
    batch = _choose_batch(batch_size, network, sequences=_count_sequences(request, way))
    _import_writers(bigwig=bigwig)
    identity = identify(request, file_sha256(checkpoint))
    with hold_directory(directory, identity, force=force, lock=step != "blocks") as work:
        if step == "blocks" and not (work / "genotypes.zarr").is_dir():
            raise Failed(f"the genotypes of {directory} are not read yet; run the step `read` first")
        source = open_source(request.input, ancestral=request.ancestral)
        names = [contig.name for contig in source.contigs]
        wanted = resolve_regions([parse_region(text, names) for text in request.regions or ()], source.contigs)
        if bigwig:
            chosen_names = {region.contig for region in wanted} or set(names)
            check_bigwig(c for c in source.contigs if c.name in chosen_names and c.length is not None)
        masks = _open_mask(request, source, wanted)
        store = _read(request, network, source, wanted, masks, work)
        chosen = choose_pairs(
            store.haplotypes,
            request.pairs,
            seed=request.seed,
            unphased=store.report["unphased"],
            assume_phased=request.assume_phased,
        )
        plans = plan_contigs(
            store,
            network,
            request,
            pairs=chosen,
            regions=wanted,
            read_mask=lambda contig: None if masks is None else masks.load(contig, dict(store.contigs)[contig]),
        )
        if bigwig:  # of contigs, too, whose length was not known before
            check_bigwig(Contig(plan.name, plan.length) for plan in plans)
        _warn(network, request, plans, store)
        if step == "read":  # and check that pairs and checkpoint fit, before there are many jobs
            return None
        units = list_units(plans, pairs=len(chosen))
        reader = Reader(network, way, request, batch, share_polarised(store))
        if step in ("all", "blocks"):
            mine = units[part[0] - 1 :: part[1]]
            logger.info(f"translating {len(chosen)} pairs in {len({u.block for u in units})} blocks on {reader.device}")
            run_units(mine, reader=reader, store=store, pairs=chosen, work=work)
        if step == "blocks":
            return None
        if missing := list_missing(units, work=work):
            raise Failed(
                f"{len(missing)} of {len(units)} blocks of {directory} are not translated yet, {missing[0]} among them; run "
                "the step `blocks` for all of its parts, or all steps"
            )
        tracks = write_output(
            directory, units, plans, request=request, reader=reader, store=store, pairs=chosen, work=work,
            checkpoint_sha256=file_sha256(checkpoint), bigwig=bigwig,
        )  # fmt: skip
        shutil.rmtree(work)
    return tracks


def _import_writers(*, bigwig: bool) -> None:
    """Import what the output is written with, so that a package that is missing is noticed before the work."""
    importlib.import_module("pysam")
    if bigwig:
        importlib.import_module("pyBigWig")


def _as_list(values: Sequence[str] | str | None, *, split: bool = True) -> list[str] | str | None:
    """One text or several as a list, or None for none; without *split*, one text is kept."""
    if isinstance(values, str):
        return [values] if split else values
    return list(values) if values else None


def _choose_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _count_sequences(request: Translation, reading: str) -> int:
    """Sequences that are sampled for each pair."""
    return 0 if reading != "sampled" else request.replicates or DEFAULT_REPLICATES


def _choose_batch(batch_size: int | str, network: CoalescenceModel, *, sequences: int) -> int:
    """Pairs to read together: what was asked for, or what the memory of the device has room for."""
    if batch_size != "auto":
        try:
            number = int(batch_size)
        except ValueError:
            number = 0
        if number < 1:
            raise BadRequest(f"batch_size must be a positive whole number or auto, got {batch_size!r}")
        return number
    device = network.backbone.head.weight.device
    if device.type != "cuda":
        return int(np.clip(CPU_BATCH * DEFAULT_REPLICATES // max(sequences, 1), 1, CPU_BATCH))
    config = network.config
    # Activations of one block at a time, and the distributions in float64; distributions, keys and values of each sequence.
    per_pair = config.windows * (16 * config.width + 4 * config.bins) * 8
    per_pair += sequences * config.windows * (config.bins + 2 * config.layers * config.width) * 4
    free, _ = torch.cuda.mem_get_info(device)
    return int(np.clip(free // (4 * per_pair), 1, 512))


def _open_mask(request: Translation, source: Source, regions: list[Region]) -> MaskFile | None:
    """The mask, checked for all contigs that are asked for."""
    if request.mask is None or request.mask_marks is None:
        return None
    names = {region.contig for region in regions}
    contigs = [contig for contig in source.contigs if contig.name in names or not names]
    return MaskFile(request.mask, marks=request.mask_marks, contigs=contigs)


def _read(
    request: Translation, network: CoalescenceModel, source: Source, regions: list[Region], masks: MaskFile | None, work: Path
) -> GenotypeStore:
    """The genotypes, read before or now."""
    path = work / "genotypes.zarr"
    if path.is_dir():
        return GenotypeStore(path)
    context = network.config.windows * network.config.window_size
    lengths = dict(source.contigs)
    return read_genotypes(
        source,
        out=path,
        regions=extend_regions(regions, context=context),
        samples=request.samples,
        populations=request.populations,
        masks=None if masks is None else lambda contig: masks.load(contig, lengths.get(contig)),
        beyond_mask=request.mask_marks == "accessible",
        keep_failed=request.keep_filtered,
        # A contig of unknown length goes on at least to the end of a region that was asked for.
        least_lengths={region.contig: region.end for region in regions if region.end is not None},  # the last is the farthest
    )


def share_polarised(store: GenotypeStore) -> float:
    """Share of the sites whose ancestral allele is known, of those that could be used otherwise, on contigs that have any."""
    counts = [one for one in store.report["counts"].values() if one["used"]]
    used = sum(one["used"] for one in counts)
    return used / (used + sum(one["ancestral_unknown"] for one in counts))


def _warn(network: CoalescenceModel, request: Translation, plans: list[ContigPlan], store: GenotypeStore) -> None:
    """Log what a user has to know before the work starts."""
    if (lost := 1 - share_polarised(store)) > 0.02:
        effect = "the mutation rate is lowered by that share" if request.mutation_rate else "times come out too young by that"
        logger.warning(
            f"the ancestral allele is unknown at {lost:.0%} of the sites, which are left out: {effect}; --ancestral names "
            "another source of ancestral alleles"
        )
    if network.config.reads_rates and request.mutation_rate is None:
        logger.warning("no mutation_rate was given: the network infers it, and times are in the training scenarios' rate")
    # Of the windows to estimate: beside the regions that were asked for, nothing was read.
    share = sum(p.windows.accessible[p.kept].sum() for p in plans) / sum(p.windows.widths[p.kept].sum() for p in plans)
    if share < 0.98 and not reads_missingness(network):
        logger.warning(
            f"{1 - share:.1%} of the bases are inaccessible, but checkpoint {request.model} does not read missing data: it "
            "takes them as bases without variants, and times near them are estimated too low; use one that does, such as small"
        )
