"""Networks and adapters: their sizes, the published presets, and checks that they fit datasets and parents."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from cxt.config.bounds import BasePairs, Flag, Fraction, Number, Positive, Samples, integer_validator
from cxt.config.section import Section, Settings
from cxt.errors import BadRequest

START_TOKEN = 1
"""The token that a sequence starts with; token 0 is unused."""

SPECIAL_TOKENS = 2
"""Tokens before those of the grid: bin b is token b + 2."""


class Architecture(Section):
    """Sizes of the network that differ from the preset's.

    A model with a parent inherits the parent's sizes. Windows, samples and scales come from the dataset.
    """

    only_given: ClassVar[bool] = True

    layers: Annotated[int, Field(strict=True, ge=1, le=1000), integer_validator] = 10
    """Transformer blocks."""
    heads: Annotated[int, Field(strict=True, ge=1, le=1024), integer_validator] = 4
    """Attention heads; `width` must be a multiple of twice their number."""
    width: Annotated[int, Field(strict=True, ge=2, le=65536), integer_validator] = 400
    """Width of the residual stream; a multiple of the number of scales."""
    dropout: Fraction = 0.1
    """Dropout on embeddings and residual branches."""
    mask_singletons: Flag = True
    """Set frequency bin 0 of the input to zero (the name is the published flag's; true singletons, bin 1, are always used).
    False for models that read missingness from bin 0."""
    start_token_in_prefix: Flag = False
    """Let sources attend to the start token during training, as the published models did. Only for published weights: decoding
    never does."""
    reads_rates: Flag = False
    """Read the mutation rate and the recombination rate of an example, where they are known. A model can add it to what its
    parent reads."""
    separate_embeddings: Flag = False
    """Embed the counts of each channel and scale by weights of their own; published: the same for all."""


SIZES = ("layers", "heads", "width", "dropout", "reads_rates", "separate_embeddings")
"""Settings that a model inherits from its parent."""


class ModelConfig(Settings, Architecture):
    """Everything that determines the network; the defaults are the published `broad`."""

    only_given: ClassVar[bool] = False

    windows: Annotated[int, Field(strict=True, ge=1, le=10**7), integer_validator] = 500
    """Windows of a sequence."""
    samples: Annotated[int, Field(strict=True, ge=1, le=60_000), integer_validator] = 50
    """Haplotypes from which the features are counted."""
    scales: Annotated[int, Field(strict=True, ge=1, le=1000), integer_validator] = 4
    """Number of window widths."""
    window_size: BasePairs = 2000
    """Base pairs per window. A model trained from a parent may use another window size."""
    grid_low: Annotated[Number, Field(ge=-1000, le=1000)] = 3.0
    """Lower end of the grid, in ln generations."""
    grid_high: Annotated[Number, Field(ge=-1000, le=1000)] = 17.0
    """Upper end of the grid, in ln generations."""
    bins: Annotated[int, Field(strict=True, ge=1, le=10**6), integer_validator] = 324
    """Bins of the grid."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if not self.grid_low < self.grid_high:
            raise BadRequest(f"grid_low must be below grid_high ({self.grid_high}), got {self.grid_low}")
        if self.width % self.scales:
            raise BadRequest(f"width {self.width} is not a multiple of the number of scales, {self.scales}")
        if self.width % (2 * self.heads):
            raise BadRequest(
                f"width {self.width} is not a multiple of {2 * self.heads}: each of {self.heads} heads needs an even width"
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.bins + SPECIAL_TOKENS


Bottleneck = Annotated[int, Field(strict=True, ge=1, le=65536), integer_validator]
LastBlocks = Annotated[int, Field(strict=True, ge=0, le=1000), integer_validator]


class Adapter(Section):
    """Sample-size adapter in front of a mostly frozen backbone; a model with this section is an adapter model.

    Its input size is the dataset's `samples`.
    """

    bottleneck: Bottleneck = 32
    """Width of the gated branch."""
    dropout: Fraction = 0.0
    """Dropout in the gated branch."""
    unfreeze_strategy: Literal["none", "ln", "lastN", "ln_lastN", "all"] = "ln_lastN"
    """Backbone parameters to train along with the adapter: none, layer norms, the last blocks, both, or all parameters. The
    embedding of rates, if there is one, always is."""
    last_n: LastBlocks = 2
    """Number of last blocks for `lastN` and `ln_lastN`."""
    overwrite_bin0: Flag = False
    """Overwrite bin 0 before the adapter even where the backbone reads missingness from it, as the published adapter did. Only
    for published weights."""


class AdapterConfig(Settings, Adapter):
    """Everything that determines the adapter, from *samples* haplotypes to the backbone's number of them."""

    samples: Samples = 10
    """Haplotypes in its input."""


Rank = Annotated[int, Field(strict=True, ge=1, le=65536), integer_validator]
LoraTargets = Literal["attention", "mlp", "all"]


class Lora(Section):
    """Low-rank changes of a frozen base's matrices (LoRA); a model with this section is trained from its `lora_of`."""

    rank: Rank = 8
    """Rank of the change of each matrix; below the width of the network."""
    alpha: Positive = 16.0
    """The change is multiplied by alpha / rank."""
    targets: LoraTargets = "all"
    """Matrices of the blocks that are changed: those of `attention`, those of the feed-forward part (`mlp`), or `all`."""


class LoraConfig(Settings, Lora):
    """Everything that determines the low-rank changes."""


PRESETS = {
    "narrow": ModelConfig(layers=6),
    "broad": ModelConfig(),
    "broad_w200": ModelConfig(window_size=200),
    "w200_wmissing": ModelConfig(window_size=200, mask_singletons=False),
}
"""The published architectures, by name."""

Preset = Literal["narrow", "broad", "broad_w200", "w200_wmissing"]
assert get_args(Preset) == tuple(PRESETS)


def log_rates(mutation_rate: float | None, recombination_rate: float | None) -> tuple[float, float]:
    """Natural logarithms of two rates per base pair and generation, as a network reads them; NaN for None.

    A recombination rate of 0, as of a Y chromosome, gives minus infinity. A mutation rate of 0, with which nothing could be
    inferred, counts as unknown.
    """
    mutation = math.log(mutation_rate) if mutation_rate else math.nan
    if recombination_rate is None:
        return mutation, math.nan
    return mutation, math.log(recombination_rate) if recombination_rate else -math.inf


def count_pairs(samples: int) -> int:
    """Number of different pairs of *samples* haplotypes."""
    return samples * (samples - 1) // 2


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The properties of a network and its dataset that must fit together.

    Attributes
    ----------
    name : name in messages, such as `models.broad` or the path of a checkpoint
    network : its network; that of an adapter model has the backbone's number of samples
    dataset : name or path of the dataset
    scales : widths of the dataset's feature windows, in base windows
    samples : haplotypes of the dataset
    has_missingness : whether the dataset has an accessibility mask
    has_adapter : whether there is a sample-size adapter in front of the network
    """

    name: str
    network: ModelConfig
    dataset: str
    scales: Sequence[int]
    samples: int
    has_missingness: bool
    has_adapter: bool


def check_missingness(model: TrainedModel) -> None:
    """BadRequest if the network and its dataset disagree on the meaning of frequency bin 0."""
    if model.has_missingness and model.network.mask_singletons:
        raise BadRequest(
            f"{model.name}: dataset '{model.dataset}' carries missingness in bin 0, which this model masks; "
            "use preset w200_wmissing, or mask_singletons: false"
        )
    if not model.has_missingness and not model.network.mask_singletons:
        raise BadRequest(
            f"{model.name}: this model reads missingness from bin 0, but dataset '{model.dataset}' has none; "
            "give the dataset a mask, or choose a preset with mask_singletons"
        )


def check_adapter_samples(model: TrainedModel) -> None:
    """BadRequest if the model has an adapter but its dataset does not have fewer samples than the backbone."""
    if model.has_adapter and model.samples >= model.network.samples:
        raise BadRequest(
            f"{model.name}: an adapter needs fewer samples than its backbone's {model.network.samples}, but dataset "
            f"'{model.dataset}' has {model.samples}"
        )


def check_lora(lora: LoraConfig, network: ModelConfig, base: ModelConfig, *, name: str, base_name: str) -> None:
    """BadRequest if *lora* does not fit *network*, or this reads another input than *base*; sizes were checked before."""
    if lora.rank >= network.width:
        raise BadRequest(f"{name}: the rank of LoRA must be below the width of the network, {network.width}, got {lora.rank}")
    for key in ("reads_rates", "mask_singletons", "start_token_in_prefix"):
        value, frozen = getattr(network, key), getattr(base, key)
        if value != frozen:
            raise BadRequest(
                f"{name}: {key} is {value}, but the base of its LoRA, '{base_name}', has {frozen}; they must be equal, because "
                "the base is frozen"
            )


def check_inheritance(child: TrainedModel, parent: TrainedModel) -> None:
    """BadRequest if *child* cannot start from the weights of *parent*; windows and their size may differ."""
    has_new_adapter = child.has_adapter and not parent.has_adapter
    if not has_new_adapter and child.samples != parent.samples:
        raise BadRequest(
            f"{child.name}: dataset '{child.dataset}' has {child.samples} samples, but its parent '{parent.name}' takes "
            f"{parent.samples}; use an adapter"
        )
    if list(child.scales) != list(parent.scales):
        raise BadRequest(
            f"{child.name}: dataset '{child.dataset}' has scales {child.scales}, but its parent '{parent.name}' has "
            f"{parent.scales}"
        )
    for key in ("layers", "heads", "width", "samples", "bins", "grid_low", "grid_high", "separate_embeddings"):
        child_value, parent_value = getattr(child.network, key), getattr(parent.network, key)
        if child_value != parent_value:
            raise BadRequest(
                f"{child.name}: {key} is {child_value}, but its parent '{parent.name}' has {parent_value}; they must be equal"
            )
    if parent.network.reads_rates and not child.network.reads_rates:
        raise BadRequest(f"{child.name}: its parent '{parent.name}' reads rates, so that reads_rates cannot be false")
    if not child.has_missingness and not parent.network.mask_singletons:
        raise BadRequest(
            f"{child.name}: its parent '{parent.name}' was trained with missingness, but dataset '{child.dataset}' has none"
        )
