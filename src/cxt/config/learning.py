"""What training minimises, and by which optimizer: sections of the training settings."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cxt.config.bounds import (
    FactorUpToOne,
    Flag,
    Fraction,
    NonNegative,
    NonNegativeInteger,
    Positive,
    PositiveInteger,
    ShareUpToOne,
    Text,
    float_validator,
)
from cxt.config.section import Section
from cxt.config.type_descriptions import Expected
from cxt.config.yaml import parse_yaml
from cxt.errors import BadRequest

Objective = Literal["autoregressive", "marginal", "joint", "distill", "masked", "contrastive"]
Reading = Literal["marginal", "sampled"]
LossName = Literal["cross_entropy", "label_smoothing", "emd", "mse", "z_loss"]
Metric = Literal["accuracy", "within_one_bin", "perplexity", "crps", "ece"]
OptimizerName = Literal["adamw", "muon", "adam", "sgd", "adafactor", "lion"]

READINGS: dict[str, tuple[Reading, ...]] = {
    "autoregressive": ("sampled",), "marginal": ("marginal",), "joint": ("marginal", "sampled"),
    "distill": ("marginal",), "masked": (), "contrastive": ("marginal",),
}  # fmt: skip
"""Ways to read times from a network, by the objective that it was trained with; the first is the default."""

SMOOTHING_WIDTH = 0.15
"""Standard deviation of smoothed targets in ln generations; about three and a half bins of the published grid."""

SETTINGS_OF_TERMS = {"sigma": ("label_smoothing",)}
"""Settings that only some loss terms have."""

SETTINGS_OF_OPTIMIZERS = {
    "momentum": ("sgd", "muon"), "nesterov": ("sgd", "muon"), "other_lr": ("muon",),
}  # fmt: skip
"""Settings that only some optimizers have."""


class _Named(Section):
    """A section with a `name`, some of whose other settings belong to some names only."""

    name: str

    @model_serializer(mode="wrap")
    def _leave_out_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    def _check_settings(self, owners: dict[str, tuple[str, ...]]) -> None:
        for setting, names in owners.items():
            if getattr(self, setting) is not None and self.name not in names:
                raise BadRequest(f"`{setting}` is a setting of {' and '.join(names)}, not of {self.name}")


class LossTerm(_Named):
    """One term of the loss that training minimises, a mean over windows."""

    name: LossName
    """`cross_entropy`: minus the logarithm of the probability of the true bin, in nats. `label_smoothing`: cross-entropy with a
    target that is spread over neighbouring bins as a normal density. `emd`: the squared difference of predicted and true
    cumulative distributions, summed over bins and times their width, in ln generations (the continuous ranked probability
    score). `mse`: squared error of the predicted mean of ln TMRCA. `z_loss`: the squared logarithm of the sum of the
    exponentials of the logits, which keeps them small."""
    weight: NonNegative = 1.0
    """Factor of this term in the sum."""
    final_weight: NonNegative | None = None
    """Factor at the last step, towards which it changes from `weight`. Default: it does not change."""
    weight_schedule: Literal["linear", "cosine", "exponential"] | None = None
    """How the factor changes; `exponential` only between positive ones. Default: linear."""
    sigma: Positive | None = None
    """`label_smoothing` only: standard deviation of the target in ln generations. Default: 0.15."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_settings(SETTINGS_OF_TERMS)
        if self.weight_schedule is not None and self.final_weight is None:
            raise BadRequest("`weight_schedule` needs a `final_weight`")
        if self.weight_schedule == "exponential" and not (self.weight and self.final_weight):
            raise BadRequest("an exponential `weight_schedule` needs a positive `weight` and `final_weight`")
        return self


class Optimizer(_Named):
    """The optimizer, and settings that only some optimizers have."""

    name: OptimizerName = "adamw"
    """`muon` orthogonalises the updates of the matrices in the transformer blocks, and uses AdamW for all other parameters."""
    momentum: Fraction | None = None
    """`sgd` and `muon`: momentum. Default: 0.9 and 0.95."""
    nesterov: Flag | None = None
    """`sgd` and `muon`: Nesterov's momentum. Default: false for `sgd`, true for `muon`."""
    other_lr: Positive | None = None
    """`muon` only: peak learning rate of AdamW for parameters outside of the blocks' matrices. Default: 0.15 times `lr`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_settings(SETTINGS_OF_OPTIMIZERS)
        return self


class UserCallback(Section):
    """A callback of one's own."""

    class_path: Text
    """Module and class, such as `my_package.callbacks.Histogram`. Python must find the module (`PYTHONPATH`)."""
    init_args: dict[Text, Any] = {}
    """Arguments of the class, by name."""


class Adaptive(Section):
    """How the schedule `adaptive` changes the learning rate after a validation.

    With `up: 1.1, down: 0.9, patience_up: 3, patience_down: 3, cooldown: 0` it is what is called a greedy schedule.
    """

    up: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=1, le=10), float_validator] = 1.2
    """Factor after `patience_up` validations in a row with an improvement."""
    down: FactorUpToOne = 0.7
    """Factor after `patience_down` validations in a row without one."""
    patience_up: PositiveInteger = 3
    """Validations with an improvement before the learning rate rises."""
    patience_down: PositiveInteger = 5
    """Validations without an improvement before it falls."""
    threshold: Fraction = 1e-4
    """An improvement lowers the lowest validation loss by at least this fraction of it."""
    cooldown: NonNegativeInteger = 1
    """Validations after a change that do not count."""
    highest: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=1, le=1000), float_validator] = 4.0
    """Largest learning rate relative to `lr`. The smallest is `min_lr`."""


class Distillation(Section):
    """How a student learns from its teacher's distributions."""

    weight: NonNegative = 1.0
    """Weight of the divergence from the teacher's distribution; those of the true bin's losses are in `losses`."""
    temperature: Positive = 1.0
    """Temperature at which both distributions are compared: above 1, small probabilities count more."""
    replicates: PositiveInteger = 12
    """Sequences that a teacher which is read by sampling decodes for each pair."""


NOISE_RATES = ("thinning", "mispolarised", "genotype_errors", "missing_genotypes", "phase_switches")
"""The rates of `Noise`, in the order in which they are applied."""


class Noise(Section):
    """Errors of real data that are added to the sites of training examples, in the order of the first five keys.

    Sites at which all haplotypes then agree are dropped. Each example has its own errors, others in each epoch. Validation has
    none, and targets do not change.
    """

    thinning: Fraction = 0.0
    """Probability with which a site is lost, from all haplotypes."""
    mispolarised: Fraction = 0.0
    """Probability with which the ancestral and the derived allele of a site are exchanged."""
    genotype_errors: Fraction = 0.0
    """Probability with which an allele of a haplotype is flipped, at a site that segregates in the simulation."""
    missing_genotypes: Fraction = 0.0
    """Probability with which an allele of a haplotype is missing. It is read as ancestral, as in genotypes without a code for
    missing data."""
    phase_switches: Fraction = 0.0
    """Switch error rate: for each site at which the haplotypes 2i and 2i + 1 (of one diploid individual) differ, the
    probability with which they are exchanged from this site on."""
    initial_factor: ShareUpToOne = 1.0
    """Factor of all rates at the first optimizer step."""
    final_factor: ShareUpToOne = 1.0
    """Factor at the last step."""
    factor_schedule: Literal["linear", "cosine"] = "linear"
    """How the factor changes between them."""

    @property
    def is_off(self) -> bool:
        """Whether no example ever has noise."""
        return not (any(getattr(self, name) for name in NOISE_RATES) and (self.initial_factor or self.final_factor))


class Masking(Section):
    """Which windows the objective `masked` hides. Sequences are cut into spans of windows, and whole spans are chosen."""

    share: FactorUpToOne = 0.15
    """Probability with which a span is chosen; at least one of each example is."""
    span: PositiveInteger = 16
    """Windows of a span. The shorter spans are, the fewer wide feature windows contain no hidden site."""
    all: Flag = False
    """Whether all chosen spans are replaced by the mask vector. Otherwise 80% are; 10% are replaced by the vectors of other
    random windows, and 10% stay as they are."""


class Contrast(Section):
    """How the objective `contrastive` compares two views of each example."""

    weight: Positive = 0.1
    """Weight of InfoNCE, the loss of telling which views belong together; those of the losses of times are in `losses`."""
    temperature: Positive = 0.1
    """Divides the cosines that are compared: the lower, the more the most similar other views count."""
    span: PositiveInteger = 16
    """Windows whose states are averaged, and compared with those of all other spans of the batch. With at least as many as
    the sequence has, whole sequences are compared."""


def parse_text(value: Any) -> Any:
    """Parse the text of a flag as YAML; return other values unchanged."""
    return parse_yaml(value) if isinstance(value, str) else value


def _read_terms(value: Any) -> Any:
    value = parse_text(value)
    value = [value] if isinstance(value, str | dict) else value
    return [{"name": term} if isinstance(term, str) else term for term in value] if isinstance(value, list) else value


def _read_optimizer(value: Any) -> Any:
    value = parse_text(value)
    return {"name": value} if isinstance(value, str) else value


def _check_terms(terms: list[LossTerm]) -> list[LossTerm]:
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise BadRequest("there must be at least one loss term, and none may be named twice")
    return terms


LossTerms = Annotated[
    list[LossTerm],
    AfterValidator(_check_terms),
    BeforeValidator(_read_terms),
    Expected("a list of loss terms, such as `[{name: cross_entropy}, {name: z_loss, weight: 1.0e-4}]`"),
]
AnyOptimizer = Annotated[
    Optimizer, BeforeValidator(_read_optimizer), Expected("the name of an optimizer, or a mapping with `name` and its settings")
]


UserCallbacks = Annotated[
    list[UserCallback],
    BeforeValidator(parse_text),
    Expected("a list of callbacks, such as `[{class_path: my_package.callbacks.Histogram, init_args: {every: 10}}]`"),
]

AnyAdaptive = Annotated[Adaptive, BeforeValidator(parse_text)]
AnyDistillation = Annotated[Distillation, BeforeValidator(parse_text)]
AnyNoise = Annotated[Noise, BeforeValidator(parse_text)]
AnyMasking = Annotated[Masking, BeforeValidator(parse_text)]
AnyContrast = Annotated[Contrast, BeforeValidator(parse_text)]


def as_json(value: Any) -> Any:
    """A setting that is a section, or a list of them, as JSON text for a flag; other values unchanged."""
    if isinstance(value, Section):
        value = value.model_dump()
    elif isinstance(value, list) and value and all(isinstance(item, Section) for item in value):
        value = [item.model_dump() for item in value]
    structured = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))
    return json.dumps(value) if structured else value


def choose_reading(objective: str, reading: str | None, *, name: str = "this model") -> Reading:
    """The way to read a network that was trained with *objective*: *reading*, or the default if it is None or `auto`.

    Raises
    ------
    BadRequest
        If it cannot be read in this way, or at all; the message calls it *name*.
    """
    possible = READINGS[objective]
    if not possible:
        raise BadRequest(
            f"{name} was trained with the objective {objective}, which predicts no times, so that it cannot be read; train a "
            "model from it with another objective (`checkpoint:`), and read that one"
        )
    if reading in (None, "auto"):
        return possible[0]
    for way in possible:
        if way == reading:
            return way
    raise BadRequest(
        f"{name} was trained with the objective {objective}, so that reading must be {' or '.join(possible)}, got {reading!r}; "
        "leave reading out, or train a checkpoint with `objective: joint`"
    )


def check_replicates(replicates: int | None, objective: str, reading: Reading, *, name: str) -> None:
    """BadRequest if sampled tracks are asked for of a network, called *name*, that is read in one pass, which samples none."""
    if replicates is None or reading == "sampled":
        return
    advice = (
        "add `reading: sampled` (--reading sampled)"
        if "sampled" in READINGS[objective]
        else "use a checkpoint that was trained with `objective: autoregressive`, or `joint` and `reading: sampled`"
    )
    raise BadRequest(
        f"{name} is read in one pass, which samples no tracks, but replicates is {replicates}; leave replicates out, or "
        f"{advice}"
    )


def list_readings(objective: str, reading: str) -> tuple[Reading, ...]:
    """The ways in which an evaluation with the setting *reading* reads a network; BadRequest as for `choose_reading`."""
    return READINGS[objective] if reading == "auto" else (choose_reading(objective, reading),)


def is_readable(objective: str) -> bool:
    """Whether times can be read from a network that was trained with *objective*."""
    return bool(READINGS[objective])
