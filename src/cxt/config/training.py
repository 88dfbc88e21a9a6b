"""Training settings: the published defaults, and what follows from them alone."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from cxt.config.bounds import (
    Devices,
    Flag,
    Fraction,
    NonNegative,
    NonNegativeInteger,
    Positive,
    PositiveInteger,
    Seed,
    Threads,
    Workers,
)
from cxt.config.section import Section, Settings
from cxt.errors import BadRequest

PRECISIONS = {
    "bf16-mixed": ("true", "bf16"),
    "16-mixed": ("16", "fp16"),
    "32-true": ("no", "false", "32", "fp32"),
    "bf16-true": (),
}
"""What can be computed in, by Lightning's names, and other names for it."""


def _parse_precision(value: Any) -> Any:
    """Lightning's name of a precision; YAML reads `no` as False and `16` as a number."""
    word = str(value).lower()
    return next((name for name, others in PRECISIONS.items() if word in (name, *others)), value)


Schedule = Literal["cosine", "linear", "constant", "wsd"]
Compile = Literal["auto", "none", "inductor", "aot_eager", "eager"]
Attention = Literal["split", "flex"]
LossPath = Literal["target", "full", "chunked"]
Export = Literal["last", "best"]
Storage = Literal["auto", "memory", "disk"]
Precision = Annotated[Literal["bf16-mixed", "16-mixed", "32-true", "bf16-true"], BeforeValidator(_parse_precision)]


class TrainingFields(Section):
    """Settings that decide how a network is trained."""

    epochs: PositiveInteger = 10
    """Passes over the training items."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    min_lr: NonNegative = 3e-5
    """Learning rate at the end of the decay; not above `lr`."""
    warmup_steps: NonNegativeInteger = 10
    """Optimizer steps of linear warm-up from 0."""
    decay_steps: NonNegativeInteger = 150_000
    """Optimizer step at which the decay reaches `min_lr`; 0 = the last step of the run."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: down to `min_lr` as a cosine or a line, constant at `lr`, or `wsd`: constant for 40% of
    the way, then a cosine."""
    batch_size: PositiveInteger = 128
    """Items per device and micro-batch."""
    grad_accum: PositiveInteger = 6
    """Micro-batches per optimizer step."""
    grad_clip: NonNegative = 0.0
    """Clip the gradient to this norm; 0 = off."""
    weight_decay: NonNegative = 0.1
    """AdamW weight decay of tensors with two or more dimensions."""
    beta1: Fraction = 0.9
    """AdamW's first coefficient."""
    beta2: Fraction = 0.95
    """AdamW's second coefficient."""
    backbone_lr_factor: NonNegative = 0.05
    """Adapter training: learning rate of the unfrozen backbone relative to `lr`."""
    precision: Precision = "bf16-mixed"
    """Arithmetic on GPUs; on a CPU, 32-true is used instead, with a warning. Other names for them are taken as well (`bf16`,
    `fp16`, `fp32`, `no`)."""
    compile: Compile = "auto"
    """Backend of `torch.compile` for the training step. `auto`: inductor on a GPU, none on a CPU. It takes a minute at the
    start, and a compiler (gcc) on the machine; weights do not depend on it but for rounding."""
    attention: Attention = "split"
    """How the network attends, always without a dense mask: `split` is two fused calls, `flex` one of FlexAttention, which
    trains on GPUs only. The same but for rounding."""
    loss_path: LossPath = "target"
    """Where the head computes logits: `target` where windows are predicted, `full` everywhere, as published, `chunked` as
    `target` but an eighth at a time, computed again in the backward pass, which saves memory where logits are most of it (few
    blocks, many bins). The same loss but for rounding."""
    gradient_checkpointing: Flag = False
    """Compute the inside of each block again in the backward pass instead of keeping it: much less memory for about a third
    more time."""
    deterministic: Flag = True
    """On GPUs, take only kernels that add in a fixed order, so that an interrupted run ends in the same bits; torch warns of an
    operation that has none. `false` may be some per cent faster. On a CPU it is always so."""
    threads: Threads = 2
    """CPU threads of training and evaluation, whatever number of cores Snakemake gives: the result depends on it."""
    workers: Workers = 0
    """Threads that make batches ahead of their use; 0 makes them when they are needed, some 0.05 ms an item."""
    seed: Seed = 1
    """Seed of initial weights, dropout and data order."""
    validation_items: NonNegativeInteger = 0
    """Test items, spread evenly, on which the loss is measured; 0 = all."""
    validate_every: NonNegativeInteger = 0
    """Measure the loss on test items every so many optimizer steps; 0 = after each epoch. It is always measured after the last
    step."""
    decode_items: NonNegativeInteger = 8
    """Test items that are decoded at each validation, for the error and the correlation of ln TMRCA; 0 = none."""
    patience: NonNegativeInteger = 0
    """Stop after so many validations in a row whose loss is not below the lowest by more than `min_delta`; 0 = never."""
    min_delta: NonNegative = 0.0
    """What counts as an improvement of the validation loss, for `patience`."""
    export: Export = "last"
    """Weights that are published: of the last step, or of the lowest validation loss."""
    save_every: PositiveInteger = 200
    """Optimizer steps between saves from which an interrupted run continues."""
    save_minutes: NonNegative = 10
    """Minutes after which it is saved at the latest, at the next optimizer step; 0 = only by steps."""
    keep_saves: PositiveInteger = 2
    """Saves that are kept: the last ones."""
    log_every: PositiveInteger = 10
    """Optimizer steps between rows of `training_log.csv`."""
    storage: Storage = "auto"
    """Where the dataset is held: in memory, which all processes of a machine share, or in a temporary file. `auto`: in memory
    if 70% of what is free is enough."""


class TrainingConfig(Settings, TrainingFields):
    """Training settings of a run; the defaults are the published ones."""

    @model_validator(mode="after")
    def _check_learning_rates(self) -> Self:
        if self.min_lr > self.lr:
            raise BadRequest(f"lr {self.lr:g} is below min_lr {self.min_lr:g}, so the learning rate would rise: lower min_lr")
        return self


class TrainingSection(TrainingFields):
    """Training settings of all models; a model's own `training` overrides single keys."""

    devices: Devices = 0
    """GPUs that the train rule asks for; 0 = CPU. Several train with DDP."""


class TrainingOverrides(TrainingSection):
    """Training settings that differ from the top-level `training`."""

    only_given: ClassVar[bool] = True


RESULT_NEUTRAL_SETTINGS = ("workers", "save_every", "save_minutes", "keep_saves", "log_every", "decode_items", "storage")
VALIDATION = ("validation_items", "validate_every")


def list_result_neutral_settings(settings: dict) -> tuple[str, ...]:
    """Training settings that do not change what is published; those of validation do where it decides something."""
    decides = settings.get("patience") or settings.get("export", "last") != "last"
    without = () if settings.get("patience") else ("min_delta",)
    return RESULT_NEUTRAL_SETTINGS + without if decides else RESULT_NEUTRAL_SETTINGS + without + VALIDATION


def steps_per_epoch(*, examples: int, batch_size: int, grad_accum: int, world: int) -> int:
    """Optimizer steps of one epoch: full batches of each rank, and a last short accumulation that steps too.

    Raises
    ------
    BadRequest
        If a rank has less than one batch.
    """
    batches = examples // world // batch_size
    if batches < 1:
        devices = "device" if world == 1 else "devices"
        raise BadRequest(
            f"the dataset has {examples} training items, fewer than one batch of {batch_size} on {world} {devices}; "
            "lower the batch size or simulate more"
        )
    return -(-batches // grad_accum)
