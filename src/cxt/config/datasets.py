"""Datasets of the configuration, and their accessibility masks."""

from typing import Annotated, Literal

from pydantic import Field

from cxt.config.bounds import BasePairs, NonEmpty, Positive, PositiveInteger, Text, integer_validator
from cxt.config.section import Section
from cxt.config.type_descriptions import Expected

ScenarioNames = Annotated[Text | NonEmpty[Text], Expected("the name of a scenario or of a scenario set, or a list of them")]

DatasetSamples = Annotated[int, Field(strict=True, ge=3, le=60_000), integer_validator]


class Mask(Section):
    """Accessibility mask laid over each simulation at a random offset; its presence gives the dataset missingness.

    `mask: {}` makes a synthetic one.
    """

    path: Text | None = None
    """A BED file of intervals (`.bed`, `.bed.gz`), or a .npz that holds an array with one value per base (true and false, or 0
    and 1); `marks` says what they mean. The plan and the logs say how much of it is accessible. A relative path starts from the
    working directory. Without it a synthetic mask is made."""
    key: Text = "accessible"
    """Name of the array in the .npz."""
    contig: Text | None = None
    """Sequence name to take from a BED file; needed when it has several."""
    marks: Literal["accessible", "inaccessible"] = "accessible"
    """What the intervals of `path`, or its true values, mark: where genotypes can be called, or where they cannot. A BED file
    of inaccessible intervals is taken to end with the last of them."""
    length: PositiveInteger = 5_000_000
    """Length of the synthetic mask in base pairs."""
    accessible_run: Positive = 500
    """Synthetic mask: mean length of an accessible run in base pairs (log-normal, sigma 1.2)."""
    inaccessible_run: Positive = 200
    """Synthetic mask: mean length of an inaccessible run in base pairs (log-normal, sigma 1.5: many short gaps, few repeats of
    kilobases)."""


class Layout(Section):
    """What a dataset keeps of each simulation."""

    window_size: BasePairs = 2000
    """Base window in base pairs."""
    sequence_length: BasePairs = 1_000_000
    """How much of each simulation is used, from its start, in base pairs; a multiple of `window_size`. Their quotient is the
    number of windows."""
    samples: DatasetSamples = 50
    """Haplotypes kept (the first ones), by simplification."""
    pairs: PositiveInteger = 200
    """Random pairs of haplotypes per simulation (and region), without replacement."""
    regions_per_simulation: PositiveInteger = 1
    """Disjoint stretches of `sequence_length` used of each simulation, evenly spread from its start; 1 = only the first, as
    published. Each has its own pairs and mask offset."""
    scales: Annotated[list[PositiveInteger], Field(strict=True, min_length=1), Expected("a list of positive integers")] = [
        2, 8, 32, 64,
    ]  # fmt: skip
    """Widths of the feature windows, in multiples of `window_size`."""


class Dataset(Layout):
    """One preprocessed set."""

    scenarios: ScenarioNames
    """Scenarios that it is made of, or sets of them. An overlay replaces the whole list."""
    mask: Mask | None = None
    """Accessibility mask laid over each simulation at a random offset; its presence gives the dataset missingness. `mask: {}`
    makes a synthetic one."""
