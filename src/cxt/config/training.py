"""Training settings: the published defaults, and quantities derived from them."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cxt.config.bounds import (
    Devices,
    Different,
    FactorUpToOne,
    Flag,
    Fraction,
    Machines,
    NonNegative,
    NonNegativeInteger,
    Positive,
    PositiveInteger,
    Seed,
    Text,
    Threads,
    Workers,
    integer_validator,
)
from cxt.config.learning import (
    Adaptive,
    AnyAdaptive,
    AnyContrast,
    AnyDistillation,
    AnyMasking,
    AnyNoise,
    AnyOptimizer,
    Contrast,
    Distillation,
    LossTerm,
    LossTerms,
    Masking,
    Metric,
    Noise,
    Objective,
    Optimizer,
    UserCallbacks,
)
from cxt.config.regions import WHOLE, AnyRegions, RegionPlan, Regions
from cxt.config.section import Section, Settings
from cxt.config.type_descriptions import Expected
from cxt.errors import BadRequest

PRECISIONS = {
    "bf16-mixed": ("true", "bf16"),
    "16-mixed": ("16", "fp16"),
    "32-true": ("no", "false", "32", "fp32"),
    "bf16-true": (),
}
"""Precisions by Lightning's names, and other accepted names of each."""


def _parse_precision(value: Any) -> Any:
    """Convert to Lightning's name of a precision; YAML reads `no` as False and `16` as a number."""
    word = str(value).lower()
    return next((name for name, others in PRECISIONS.items() if word in (name, *others)), value)


QuantizedBits = Annotated[int, Field(strict=True, ge=0, le=8), integer_validator]
Schedule = Literal["cosine", "linear", "constant", "wsd", "log_linear", "rex", "cosine_restarts", "adaptive"]
Compile = Literal["auto", "none", "inductor", "aot_eager", "eager"]
Attention = Literal["split", "flex"]
LossPath = Literal["target", "full", "chunked"]
Export = Literal["last", "best"]
Profiler = Literal["none", "simple", "advanced", "pytorch"]
Storage = Literal["auto", "memory", "disk"]
Precision = Annotated[Literal["bf16-mixed", "16-mixed", "32-true", "bf16-true"], BeforeValidator(_parse_precision)]


class TrainingFields(Section):
    """Settings that determine how a network is trained."""

    epochs: PositiveInteger = 10
    """Passes over the training examples."""
    objective: Objective = "autoregressive"
    """What the network learns to predict: `autoregressive`, each window from the sources and the windows before it, as
    published, so that it is read by sampling; `marginal`, each window from the sources alone, so that it is read in one pass;
    `joint`, both; `distill`, as `marginal`, and also what a `teacher` says. `masked`, for research, hides windows of the input
    and predicts their counts, so that it needs no times; its networks are starting points for others, and cannot be read
    themselves. `contrastive`, for research, is `marginal`, and also learns which halves of the sites are of the same genealogy.
    All networks have the same tensors, so that any of them can start from any other."""
    joint_weight: NonNegative = 0.5
    """Weight of the marginal losses in the `joint` objective; that of the autoregressive ones is 1."""
    distill: AnyDistillation = Distillation()
    """`distill` only: how the teacher is read, and what its distributions count."""
    masked: AnyMasking = Masking()
    """`masked` only: which windows are hidden."""
    contrastive: AnyContrast = Contrast()
    """`contrastive` only: what is compared, and what it counts."""
    rates_dropout: Fraction = 0.5
    """Probability with which each rate of an example is hidden from a network that reads rates, in training only, so that it
    also learns to do without."""
    noise: AnyNoise = Noise()
    """Errors of real data that training examples get, off by default."""
    regions: AnyRegions = Regions()
    """Lengths and order of the regions into which training examples are cut; by default, all have the model's `windows`."""
    losses: LossTerms = [LossTerm(name="cross_entropy")]
    """Terms of the loss, which are added."""
    optimizer: AnyOptimizer = Optimizer()
    """The optimizer, by its name or with settings of its own."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    min_lr: NonNegative = 3e-5
    """Learning rate at the end of the decay; at most `lr`."""
    warmup_steps: NonNegativeInteger = 10
    """Optimizer steps of linear warm-up from 0."""
    decay_steps: NonNegativeInteger = 150_000
    """Optimizer step at which the decay reaches `min_lr`; 0 = the last step of the run."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: `cosine` or `linear` decay to `min_lr`; `constant` at `lr`; `wsd`, constant for 40% of
    the steps from the warm-up to `decay_steps`, then a cosine; `log_linear`, lowered by the same factor in each step; `rex`,
    lowered slowly at first and fast at the end; `cosine_restarts`, `cycles` cosines, each starting lower than the last;
    `adaptive`, up while the validation loss improves, and down when it does not."""
    cycles: PositiveInteger = 4
    """`cosine_restarts` only: number of cosines."""
    cycle_decay: FactorUpToOne = 0.5
    """`cosine_restarts` only: height of each cosine above `min_lr` relative to that of the one before."""
    adaptive: AnyAdaptive = Adaptive()
    """`adaptive` only: when the learning rate changes, and by how much."""
    batch_size: PositiveInteger = 128
    """Examples per device in one micro-batch."""
    grad_accum: PositiveInteger = 6
    """Micro-batches per optimizer step."""
    weight_by_windows: Flag = False
    """Let every window of an optimizer step count the same, also where its micro-batches have regions of different lengths, and
    in the last step of an epoch, which may have fewer of them. Published: every micro-batch counts 1 / `grad_accum`."""
    grad_clip: NonNegative = 0.0
    """Clip the gradient to this norm; 0 = off."""
    weight_decay: NonNegative = 0.1
    """AdamW weight decay of tensors with two or more dimensions."""
    beta1: Fraction = 0.9
    """AdamW's first coefficient."""
    beta2: Fraction = 0.95
    """AdamW's second coefficient."""
    weight_noise: NonNegative = 0.0
    """Standard deviation of noise on the matrices of the blocks in training, relative to that of each matrix; new in every
    micro-batch. The checkpoint holds the weights without noise. 0 = off."""
    quantized_bits: QuantizedBits = 0
    """Train for weights of 2 to 8 bits: the matrices of the blocks are rounded in every forward pass, to integers times one
    scale for each row, and the checkpoint holds the rounded weights. 0 = off."""
    ema_decay: Fraction = 0.0
    """Validate, decode and publish an exponential moving average of the weights, in which those of each optimizer step count
    1 - `ema_decay`; 0 = off, the weights themselves. At step t of a run the decay is at most (1 + t) / (10 + t), so that its
    first steps are forgotten soon."""
    backbone_lr_factor: NonNegative = 0.05
    """Adapter training: learning rate of the unfrozen backbone relative to `lr`."""
    precision: Precision = "bf16-mixed"
    """Arithmetic on GPUs; a CPU always uses 32-true. The names `bf16`, `fp16`, `fp32` and `no` are also accepted."""
    compile: Compile = "auto"
    """Backend of `torch.compile` for the training step. `auto`: inductor on a GPU, none on a CPU. Compiling takes about a
    minute at the start and needs a compiler (gcc); it changes weights by rounding only."""
    attention: Attention = "split"
    """Implementation of attention, always without a dense mask: `split` uses two fused calls, `flex` one call of
    FlexAttention, which trains on GPUs only. They differ by rounding only."""
    loss_path: LossPath = "target"
    """Where the head computes logits: `target`, at the positions that predict windows; `full`, everywhere, as published;
    `chunked`, as `target` but an eighth at a time, recomputed in the backward pass, which saves memory if logits take most of
    it (few blocks, many bins). The losses differ by rounding only."""
    gradient_checkpointing: Flag = False
    """Recompute the inside of each block in the backward pass instead of keeping it: much less memory for about a third more
    time."""
    deterministic: Flag = True
    """On GPUs, use only kernels that add in a fixed order, so that an interrupted run ends with bit-identical weights; torch
    warns about operations that have none. `false` may be a few percent faster. CPU training is always deterministic."""
    threads: Threads = 2
    """CPU threads for training and evaluation, independent of the cores that Snakemake assigns, because the result depends on
    it."""
    workers: Workers = 0
    """Threads that prepare batches in advance; 0 = prepare each when needed, about 0.05 ms per example."""
    seed: Seed = 1
    """Seed of initial weights, dropout and data order."""
    validation_items: NonNegativeInteger = 0
    """Test examples, evenly spaced, on which the loss is measured; 0 = all, which may take longer than the steps of a short
    run."""
    validate_every: NonNegativeInteger = 0
    """Optimizer steps between validations; 0 = once per epoch. The last step is always validated."""
    decode_items: NonNegativeInteger = 8
    """Test examples decoded at each validation, to report MSE and correlation of ln TMRCA; 0 = none."""
    metrics: Annotated[Different[Metric], Expected("a list of some of accuracy, within_one_bin, perplexity, crps, ece")] = []
    """More about the distributions of the decoded examples, for columns of `training_log.csv`: `accuracy`, the share of windows
    whose most probable bin is the true one; `within_one_bin`, the share for which it is the true one or a neighbour;
    `perplexity`, the exponential of the mean of minus ln of the true bin's probability; `crps`, the continuous ranked
    probability score in ln generations; `ece`, the expected calibration error of the most probable bin, in 15 classes of its
    probability."""
    batch_size_eval: NonNegativeInteger = 0
    """Examples per device in a batch of validation and of decoding during training; 0 = `batch_size`, and 8 for decoding.
    Larger batches are faster if memory allows; losses differ by rounding only, except for `contrastive`, which compares the
    examples of a batch."""
    patience: NonNegativeInteger = 0
    """Stop after this many consecutive validations without an improvement of more than `min_delta`; 0 = never."""
    min_delta: NonNegative = 0.0
    """Smallest decrease of the validation loss that counts as an improvement for `patience`."""
    export: Export = "last"
    """Weights to publish: those of the last step, or of the lowest validation loss."""
    save_every: PositiveInteger = 200
    """Optimizer steps between training states, from which an interrupted run continues."""
    save_minutes: NonNegative = 10
    """Save a training state at least this often, in minutes, at the next optimizer step; 0 = by steps only."""
    keep_saves: PositiveInteger = 2
    """Number of most recent training states to keep."""
    log_every: PositiveInteger = 10
    """Optimizer steps between rows of `training_log.csv`."""
    mlflow: Text | None = None
    """Address of MLflow, such as `sqlite:///mlflow.db`, `file:./mlruns` or `https://server`, which gets settings, metrics,
    figures and the checkpoint, too. Passwords are taken from `MLFLOW_TRACKING_PASSWORD`."""
    wandb: Text | None = None
    """Project at Weights & Biases that gets the same; with `WANDB_MODE=offline`, into the run directory."""
    histograms: Flag = False
    """Send histograms of weights and gradients to TensorBoard at each validation."""
    profiler: Profiler = "none"
    """Measure where the time of the first steps goes, for `profile.txt` in the run directory: `simple`, the parts of a step;
    `advanced`, every Python function; `pytorch`, every torch operator, with a trace to look at."""
    profile_batches: PositiveInteger = 50
    """Micro-batches that are profiled, after the first one."""
    callbacks: UserCallbacks = []
    """Lightning callbacks of your own. Their names and arguments are settings of the run, but their code is not: a run is not
    repeated when it changes."""
    storage: Storage = "auto"
    """Where to hold the dataset: in memory shared by all processes of a machine, or in a temporary file. `auto`: in memory if
    it takes at most 70% of what is free."""
    scratch: Text | None = None
    """Directory for that temporary file, on a fast disk of the machine that trains; used only where `storage` does not hold
    the dataset in memory. Variables such as `$SLURM_TMPDIR` are replaced on that machine. Default: the directory for temporary
    files (`TMPDIR`). The file holds what is read from the shards, each of which is read once, checked, for all devices of the
    machine; it is gone when training ends, however it ends."""


class TrainingConfig(Settings, TrainingFields):
    """Training settings of a run; the defaults are the published ones."""

    @model_validator(mode="after")
    def _check_learning_rates(self) -> Self:
        if self.min_lr > self.lr:
            raise BadRequest(
                f"lr {self.lr:g} is below min_lr {self.min_lr:g}, so that the learning rate would rise; lower min_lr"
            )
        if self.schedule == "log_linear" and not self.min_lr:
            raise BadRequest("the schedule log_linear cannot end at min_lr 0; raise min_lr, or use linear")
        if self.quantized_bits == 1:
            raise BadRequest("quantized_bits must be 0 (off) or from 2 to 8, got 1: one bit would leave zeros only")
        return self


class TrainingSection(TrainingFields):
    """Training settings of all models; a model's own `training` overrides single keys."""

    devices: Devices = 0
    """GPUs of each machine that the train rule requests; 0 = CPU. Several GPUs train with DDP."""
    nodes: Machines = 1
    """Machines that train one model together, each with `devices` GPUs. More than one needs a Slurm cluster."""


class TrainingOverrides(TrainingSection):
    """Training settings that differ from the top-level `training`."""

    only_given: ClassVar[bool] = True

    max_steps: PositiveInteger | None = None
    """Optimizer steps after which training ends, in place of `epochs`: fewer or more than these would take. Default: those of
    the epochs."""


SETTINGS_SINCE_FORMAT_1 = (
    "objective", "joint_weight", "losses", "optimizer", "cycles", "cycle_decay", "adaptive", "rates_dropout",
    "distill", "masked", "contrastive", "noise", "weight_noise", "quantized_bits", "ema_decay", "callbacks", "batch_size_eval",
    "regions", "weight_by_windows",
)  # fmt: skip
"""Settings that are left out of lineages at their defaults, so that checkpoints from before there were such settings stay
current."""


ARCHITECTURE_SINCE_FORMAT_1 = {"reads_rates": False, "separate_embeddings": False}
"""The same for settings of the network, with their defaults."""


def drop_later_defaults(settings: dict) -> dict:
    """Leave out settings that were added since format 1 and have their default values."""
    defaults = TrainingConfig().model_dump(include=set(SETTINGS_SINCE_FORMAT_1)) | ARCHITECTURE_SINCE_FORMAT_1
    return {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]}


RESULT_NEUTRAL_SETTINGS = (
    "workers", "save_every", "save_minutes", "keep_saves", "log_every", "decode_items", "metrics", "storage", "scratch",
    "mlflow", "wandb", "histograms", "profiler", "profile_batches",
)  # fmt: skip
VALIDATION = ("validation_items", "validate_every", "batch_size_eval")


def list_result_neutral_settings(settings: dict) -> tuple[str, ...]:
    """Training settings that do not affect the published weights.

    Those of validation do with early stopping, with `best` weights, and if the learning rate adapts to the validation loss.
    """
    decides = settings.get("patience") or settings.get("export", "last") != "last" or settings.get("schedule") == "adaptive"
    without = () if settings.get("patience") else ("min_delta",)
    return RESULT_NEUTRAL_SETTINGS + without if decides else RESULT_NEUTRAL_SETTINGS + without + VALIDATION


def list_loss_terms(training: TrainingConfig) -> list[str]:
    """Names of the terms of a training's loss, in the order of its objective (`cxt.trainer.objectives`)."""
    names: list[str] = [term.name for term in training.losses]
    match training.objective:
        case "masked":
            return ["poisson"]
        case "joint":
            return [*names, *(f"marginal_{name}" for name in names)]
        case "distill":
            return ["distillation", *names]
        case "contrastive":
            return ["info_nce", *names]
    return names


def averaging_decay(step: int, decay: float) -> float:
    """Weight of the earlier average at an optimizer step, counted from 1: at most (1 + step) / (10 + step).

    Without this warm-up, which is that of TensorFlow's `ExponentialMovingAverage`, the initial weights would remain in the
    average for about 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))


def steps_per_epoch(*, examples: int, batch_size: int, grad_accum: int, world: int, plan: RegionPlan = WHOLE) -> int:
    """Optimizer steps of one epoch, from the full batches of each rank; the last accumulation may be shorter.

    Raises
    ------
    BadRequest
        If there is less than one batch for each rank.
    """
    return -(-plan.count_batches(examples=examples, batch_size=batch_size, world=world) // grad_accum)
