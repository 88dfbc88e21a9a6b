"""Datasets of the configuration, and their accessibility masks."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cxt.config.bounds import BasePairs, NonEmpty, NonNegative, Positive, PositiveInteger, Text, integer_validator
from cxt.config.section import Section
from cxt.config.type_descriptions import Expected
from cxt.errors import BadRequest

ScenarioNames = Annotated[Text | NonEmpty[Text], Expected("the name of a scenario or of a scenario set, or a list of them")]

DatasetSamples = Annotated[int, Field(strict=True, ge=3, le=60_000), integer_validator]


class Mask(Section):
    """Accessibility mask, applied to each simulation at a random offset; a dataset with one has missingness.

    `mask: {}` makes a synthetic one.
    """

    path: Text | None = None
    """A BED file of intervals (`.bed`, `.bed.gz`), or a .npz file with an array of one value per base (true and false, or 0 and
    1); `marks` says what they mean. The plan and the logs report the accessible fraction. Relative to the configuration file.
    Without it, a synthetic mask is made."""
    key: Text = "accessible"
    """Name of the array in the .npz file."""
    contig: Text | None = None
    """Sequence to use from a BED file; required if the file has several."""
    marks: Literal["accessible", "inaccessible"] = "accessible"
    """Meaning of the intervals, or true values, of `path`: where genotypes can be called, or where they cannot. The end of the
    last interval of a BED file is taken as the end of the sequence."""
    length: PositiveInteger = 5_000_000
    """Length of the synthetic mask in base pairs."""
    accessible_run: Annotated[
        Positive | Annotated[list[Positive], Field(strict=True, min_length=1)],
        Expected("a positive number, or a list of positive numbers"),
    ] = 500
    """Synthetic mask: mean length of an accessible run in base pairs (log-normal, sigma 1.2). A list divides the mask into
    equal parts, one for each value."""
    inaccessible_run: Annotated[
        Positive | Annotated[list[NonNegative], Field(strict=True, min_length=1)],
        Expected("a positive number, or a list of numbers of at least 0"),
    ] = 200
    """Synthetic mask: mean length of an inaccessible run in base pairs (log-normal, sigma 1.5: many short gaps, few repeats of
    kilobases). A list has one value for each part, and 0 for parts that are accessible throughout."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        accessible, inaccessible = self.accessible_run, self.inaccessible_run
        if isinstance(accessible, list) != isinstance(inaccessible, list) or (
            isinstance(accessible, list) and isinstance(inaccessible, list) and len(accessible) != len(inaccessible)
        ):
            raise BadRequest("`accessible_run` and `inaccessible_run` must be two numbers, or two lists of the same length")
        return self


class Layout(Section):
    """The part of each simulation that a dataset keeps."""

    window_size: BasePairs = 2000
    """Width of a base window in base pairs."""
    sequence_length: BasePairs = 1_000_000
    """Length used of each simulation, from its start, in base pairs; a multiple of `window_size`. The number of windows is
    `sequence_length` / `window_size`."""
    samples: DatasetSamples = 50
    """Haplotypes to keep (the first ones); the tree sequence is simplified to them."""
    pairs: PositiveInteger = 200
    """Random pairs of haplotypes per simulation (and region), without replacement."""
    regions_per_simulation: PositiveInteger = 1
    """Disjoint regions of `sequence_length` to use from each simulation, evenly spaced from its start; 1 = only the first, as
    published. Each region has its own pairs and mask offset."""
    scales: Annotated[list[PositiveInteger], Field(strict=True, min_length=1), Expected("a list of positive integers")] = [
        2, 8, 32, 64,
    ]  # fmt: skip
    """Widths of the feature windows, in multiples of `window_size`."""


class Dataset(Layout):
    """A preprocessed set of training and test examples."""

    scenarios: ScenarioNames
    """Scenarios, or scenario sets, that it is made from. An overlay replaces the whole list."""
    mask: Mask | None = None
    """Accessibility mask, applied to each simulation at a random offset; a dataset with one has missingness. `mask: {}` makes a
    synthetic one."""
