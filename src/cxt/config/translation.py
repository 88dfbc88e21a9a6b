"""Settings of a translation: a file of genotypes, and how a checkpoint reads it. Of the command, and of the configuration."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cxt.config.bounds import (
    Flag,
    NonNegativeInteger,
    Positive,
    PositiveInteger,
    PositiveRate,
    Rate,
    Seed,
    ShareUpToOne,
    Text,
    integer_validator,
)
from cxt.config.section import Section
from cxt.config.type_descriptions import Expected
from cxt.errors import BadRequest

DEFAULT_REPLICATES = 15
"""Sequences that are decoded for each pair where their number is not given."""

Texts = Annotated[list[Text], Field(strict=True, min_length=1)]


class Translation(Section):
    """What to translate, and how: everything that the tracks depend on, apart from the bytes of the files."""

    input: Text
    """VCF, BCF, VCF Zarr, tree sequence (`.trees`, `.tsz`) or `.npz` file. In a configuration, a path that begins with
    `results/` is a file that the workflow makes. Of a simulation batch, the first simulation is read."""
    model: Text
    """Name or path of a checkpoint, such as `small`, or in a configuration, one of its models."""
    regions: Annotated[Texts | None, Expected("a list of regions, such as [chr1, '2', 'chr3:1-2000000']")] = None
    """Contigs, or parts of them, with the first and the last base counted from 1. Default: every contig."""
    samples: Annotated[Text | Texts | None, Expected("a list of names, or a file with one name a line")] = None
    """Individuals to use. Default: all."""
    populations: Text | None = None
    """Table with the population of each sample."""
    pairs: Annotated[
        Text | PositiveInteger,
        Expected("within-individual, all, within, between, a number, or a file with two names a line"),
    ] = "within-individual"
    """Pairs of haplotypes: those `within-individual`, `all`, those `within` or `between` populations, a number of random ones,
    or a file with two names a line."""
    assume_phased: Flag = False
    """Take unphased genotypes as phased, for pairs of different individuals."""
    mask: Text | None = None
    """Accessibility mask, BED or .npz. Needs `mask_marks`."""
    mask_marks: Literal["accessible", "inaccessible"] | None = None
    """Meaning of the intervals, or true values, of `mask`."""
    keep_filtered: Flag = False
    """Use records that failed a filter of the file, whose FILTER is neither PASS nor missing. They are dropped by default."""
    ancestral: Text = "auto"
    """Where the ancestral alleles come from: `INFO/AA` or another tag, a FASTA file, `ref` or `tree`. `auto`: INFO/AA or the
    tree sequence's ancestral states if there are any, and else the reference allele."""
    mutation_rate: PositiveRate | None = None
    """Mutations per base pair and generation, which set the time scale."""
    recombination_rate: Rate | None = None
    """Crossovers per base pair and generation, for a checkpoint that reads rates."""
    generation_time: Positive | None = None
    """Years of a generation, to write years as well."""
    calibration: Literal["auto", "none", "diversity", "gamma"] = "auto"
    """Whether the times of each pair are multiplied so that they imply the differences that are observed: `diversity` does so,
    `gamma` by a random draw given these. `auto`: `none` for a checkpoint that is given the mutation rate, and else
    `diversity`."""
    reading: Literal["marginal", "sampled"] | None = None
    """How to read the checkpoint. Default: as it was trained."""
    replicates: PositiveInteger | None = None
    """For a checkpoint that is read by sampling: sequences to decode for each pair, over which estimates average, and to write,
    too. Default: 15, which are not written."""
    panels: PositiveInteger = 1
    """Where there are more haplotypes than the checkpoint reads: random subsets with the pair to average."""
    min_accessible: ShareUpToOne = 0.25
    """Windows of which less than this share can be read are missing in the output."""
    max_gap: NonNegativeInteger | None = None
    """Base pairs without any variant that are taken as inaccessible; 0: none. Default: by the density of variants."""
    flank: NonNegativeInteger | None = None
    """Windows on each side of a block that are read and dropped. Default: a fifth of what the checkpoint reads."""
    seed: Seed = 0
    """Seed of random pairs, subsets, sampled sequences and draws."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.mutation_rate is None and self.calibration in ("diversity", "gamma"):
            raise BadRequest(f"calibration '{self.calibration}' needs the mutation rate: give mutation_rate, too")
        if self.mutation_rate is None and self.generation_time is not None:
            raise BadRequest(
                "generation_time converts generations to years, which needs times on the scale of the species: give "
                "mutation_rate, too"
            )
        if self.mask is not None and self.mask_marks is None:
            raise BadRequest(
                f"mask {self.mask}: give mask_marks, too, to say whether its intervals, or true values, are accessible or "
                "inaccessible"
            )
        if self.mask is None and self.mask_marks is not None:
            raise BadRequest("mask_marks cannot be used without mask")
        return self


class TranslationEntry(Translation):
    """TMRCA tracks of a file of genotypes, in `results/translate/<name>/`; the keys are the options of `cxt translate`."""

    bigwig: Flag = False
    """Also write a bigWig file for each pair."""
    parts: PositiveInteger = 1
    """Jobs that share the blocks."""
    devices: Annotated[int, Field(strict=True, ge=0, le=1), integer_validator] = 0
    """GPUs of each of these jobs: 0 or 1."""
