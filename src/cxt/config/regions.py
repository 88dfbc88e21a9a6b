"""Training on regions of a dataset's examples, instead of on whole examples: settings, and the arithmetic of batches."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BeforeValidator, model_validator

from cxt.config.bounds import FactorUpToOne, Flag, NonNegativeInteger
from cxt.config.learning import parse_text
from cxt.config.network import ModelConfig
from cxt.config.section import Section
from cxt.errors import BadRequest

if TYPE_CHECKING:  # which has these settings
    from cxt.config.training import TrainingConfig


class Regions(Section):
    """Regions of other lengths than `windows` that training examples are cut into, and in which order they come.

    Where a region lies in its example is random, and another place in each epoch. Validation has regions of `windows` windows
    at places that stay the same.
    """

    shortest: NonNegativeInteger = 0
    """Smallest number of windows of a region. Numbers are drawn between this and `windows`, one for each batch, or with `pack`
    one for each region. 0 = all regions have `windows` windows."""
    pack: Flag = False
    """Put several regions of different lengths into one row, without padding; none sees another. `batch_size` counts rows."""
    first_windows: NonNegativeInteger = 0
    """Number of windows at the first optimizer step, from which it grows to `windows`; 0 = it does not change."""
    growth: FactorUpToOne = 0.5
    """`first_windows` only: fraction of the optimizer steps in which it grows."""
    in_order: Flag = False
    """Read each example in consecutive regions of `windows` windows, one in each of consecutive batches, in place of one random
    region in each epoch. Windows that are left at the end are not read."""
    carry: Flag = False
    """Let a region begin with the bin of the window before it, where there is one, in place of the start token, so that a
    network learns to continue."""

    @property
    def is_off(self) -> bool:
        """Whether all regions have the same length, lie at random places, and are in rows of their own."""
        return not (self.shortest or self.first_windows or self.in_order or self.carry)

    @property
    def varies(self) -> bool:
        """Whether batches differ in their number of windows."""
        return bool(self.first_windows or (self.shortest and not self.pack))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pack and not self.shortest:
            raise BadRequest("pack needs regions of different lengths; set shortest, such as to a fifth of `windows`")
        if self.first_windows and self.shortest:
            raise BadRequest(
                "first_windows and shortest cannot be used together: lengths either grow or are random; remove one"
            )
        if self.in_order and (self.shortest or self.first_windows):
            other = "shortest" if self.shortest else "first_windows"
            raise BadRequest(f"in_order and {other} cannot be used together: regions in order have the same length; remove one")
        if self.carry and self.pack:
            raise BadRequest("carry and pack cannot be used together: every region of a packed row begins with a start token")
        return self


AnyRegions = Annotated[Regions, BeforeValidator(parse_text)]


@dataclasses.dataclass(frozen=True)
class RegionPlan:
    """How many regions, of which lengths, the examples of a dataset give.

    Attributes
    ----------
    dataset_windows : int
        Windows of an example.
    windows : int
        Windows that the network reads: those of the longest region.
    regions : Regions
        The settings.
    """

    dataset_windows: int
    windows: int
    regions: Regions

    @property
    def is_off(self) -> bool:
        """Whether every example is read as a whole."""
        return self.windows == self.dataset_windows and self.regions.is_off

    @property
    def shortest(self) -> int:
        """Smallest number of windows of a region."""
        return self.regions.shortest or self.regions.first_windows or self.windows

    @property
    def per_row(self) -> int:
        """Regions in each row of a batch: as many as fill the dataset's windows with regions of medium length."""
        if not self.regions.pack:
            return 1
        fitting = round(2 * self.dataset_windows / (self.shortest + self.windows))
        return min(max(2, fitting), self.dataset_windows // self.shortest)

    @property
    def longest(self) -> int:
        """Largest number of windows of a region: less than `windows` where a row has no room for the others beside it."""
        return min(self.windows, self.row_windows - (self.per_row - 1) * self.shortest)

    @property
    def row_windows(self) -> int:
        """Windows of the widest rows: of packed ones the dataset's, if so many regions can fill them."""
        return min(self.dataset_windows, self.per_row * self.windows) if self.regions.pack else self.windows

    @property
    def chunks(self) -> int:
        """Consecutive batches that read the same examples in order."""
        return self.dataset_windows // self.windows if self.regions.in_order else 1

    @property
    def mean_windows(self) -> float:
        """Mean number of windows of a region."""
        if self.regions.pack:
            return self.row_windows / self.per_row
        if self.regions.first_windows:
            return self.windows - self.regions.growth * (self.windows - self.regions.first_windows) / 2
        return (self.shortest + self.windows) / 2

    def resize(self, network: ModelConfig, windows: float) -> ModelConfig:
        """*network* for another number of windows, to estimate what a region or a row costs; unchanged if the plan is off."""
        return network if self.is_off else network.replace(windows=round(windows))

    def count_batches(self, *, examples: int, batch_size: int, world: int) -> int:
        """Batches of each device in an epoch; examples that do not fill a batch are left out.

        Raises
        ------
        BadRequest
            If there is less than one batch.
        """
        used = batch_size * self.per_row
        batches = examples // world // used
        if batches < 1:
            devices = "device" if world == 1 else "devices"
            rows = f" rows of {self.per_row} regions" if self.per_row > 1 else ""
            raise BadRequest(
                f"the dataset has {examples} training examples, fewer than one batch of {batch_size}{rows} on {world} "
                f"{devices}; lower the batch size or simulate more"
            )
        return batches * self.chunks


WHOLE = RegionPlan(1, 1, Regions())
"""A plan that reads every example as a whole, for counting."""


def check_regions(plan: RegionPlan, training: "TrainingConfig", network: ModelConfig) -> None:
    """BadRequest for regions that do not fit the dataset, the network or what it learns.

    Parameters
    ----------
    plan : RegionPlan
    training : TrainingConfig
        Its objective, attention and compiler.
    network : ModelConfig
        What it reads.
    """
    objective, compiles = training.objective, training.compile not in ("auto", "none")
    regions, windows, whole = plan.regions, plan.windows, plan.dataset_windows
    if windows > whole:
        raise BadRequest(
            f"windows is {windows}, but the examples of the dataset have only {whole}; lower it, or make a dataset of longer "
            "regions (sequence_length)"
        )
    for name in ("shortest", "first_windows"):
        if (value := getattr(regions, name)) > windows:
            raise BadRequest(f"regions.{name} is {value}, above the {windows} windows that the network reads; lower it")
    if regions.pack and 2 * regions.shortest > whole:
        raise BadRequest(
            f"regions.pack: two regions of {regions.shortest} or more windows do not fit into a row of {whole}; lower shortest "
            "to half of that, or omit pack"
        )
    if regions.in_order and 2 * windows > whole:
        raise BadRequest(
            f"regions.in_order: an example of {whole} windows is no more than one region of {windows}; set windows to half of "
            "it or less, or omit in_order"
        )
    if objective in ("masked", "contrastive", "distill") and not regions.is_off:
        raise BadRequest(
            f"regions cannot be used with the objective {objective}, which learns from regions of the same length at random "
            "places; omit regions (`windows` alone is possible), or use another objective"
        )
    if regions.carry and plan.shortest == whole:
        raise BadRequest(
            f"regions.carry: a region of all {whole} windows of an example has no window before it, whose bin it could carry; "
            "set windows to fewer, or omit carry"
        )
    if regions.carry and objective == "marginal":
        raise BadRequest(
            "regions.carry is for networks that read the bins of windows, which the objective marginal does not; omit it, or "
            "use the objective autoregressive or joint"
        )
    if regions.carry and network.start_token_in_prefix:
        raise BadRequest(
            "regions.carry cannot be used where sources see the start token, which would tell them the bin of the window "
            "before; set start_token_in_prefix to false, or omit carry"
        )
    if regions.pack and training.attention == "flex":
        raise BadRequest("regions.pack needs attention split; attention flex cannot tell the regions of a row apart")
    if regions.varies and compiles:
        raise BadRequest(
            "compile would compile the training step anew for every number of windows; leave it at auto, which does not "
            "compile where regions.shortest or regions.first_windows vary it, or use regions.pack, whose rows are equally long"
        )
