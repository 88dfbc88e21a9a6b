"""Networks and training settings: the published presets and defaults, and what fits together."""

import dataclasses

from cxt.config.bounds import ANY_COUNT, COUNT, NOT_NEGATIVE, POSITIVE, SHARE, THREADS, WORKERS, Range, problems
from cxt.errors import BadRequest, suggest_nearest
from cxt.seeds import LARGEST_SEED


def _refuse(found: list[str]) -> None:
    """BadRequest with everything that was found to be wrong at once, if anything was."""
    if found:
        raise BadRequest("\n  ".join(["not a valid request:", *found] if len(found) > 1 else found))


NETWORK_RANGES = {
    "layers": Range(1, 1000), "heads": Range(1, 1024), "width": Range(2, 65536), "dropout": SHARE,
    "windows": Range(1, 10**7), "samples": Range(1, 60_000), "scales": Range(1, 1000), "window_size": Range(1, 10**10),
    "grid_low": Range(-1000, 1000, whole=False), "grid_high": Range(-1000, 1000, whole=False), "bins": Range(1, 10**6),
}  # fmt: skip
"""What is accepted of each number of a network; `config.schema.yaml` says the same of those that it has."""

ADAPTER_RANGES = {"samples": Range(2, 60_000), "bottleneck": Range(1, 65536), "dropout": SHARE, "last_n": Range(0, 1000)}
"""The same of an adapter."""

TRAINING_RANGES = {
    "epochs": COUNT, "lr": POSITIVE, "min_lr": NOT_NEGATIVE, "warmup_steps": ANY_COUNT, "decay_steps": ANY_COUNT,
    "batch_size": COUNT, "grad_accum": COUNT, "grad_clip": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "beta1": SHARE,
    "beta2": SHARE, "backbone_lr_factor": NOT_NEGATIVE, "threads": THREADS, "workers": WORKERS, "seed": Range(0, LARGEST_SEED),
    "validation_items": ANY_COUNT, "validate_every": ANY_COUNT, "decode_items": ANY_COUNT, "patience": ANY_COUNT,
    "min_delta": NOT_NEGATIVE, "save_every": COUNT, "save_minutes": NOT_NEGATIVE, "keep_saves": COUNT, "log_every": COUNT,
}  # fmt: skip
"""The same of training."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network; the defaults are the published `broad`.

    Attributes
    ----------
    layers, heads, width : transformer blocks, attention heads, width of the residual stream
    dropout : on embeddings and residual branches
    windows, samples, scales : windows of a region, haplotypes, number of window widths
    window_size : base pairs; informational, weights may move to another one
    mask_singletons : zero frequency bin 0 of the input. Despite the published name, true singletons (bin 1) stay.
    start_token_in_prefix : sources attend to the start token when all tokens are given, as in published training;
        decoding never does, so leave it False for anything but published weights
    grid_low, grid_high, bins : the grid of ln generations
    """

    layers: int = 10
    heads: int = 4
    width: int = 400
    dropout: float = 0.1
    windows: int = 500
    samples: int = 50
    scales: int = 4
    window_size: int = 2000
    mask_singletons: bool = True
    start_token_in_prefix: bool = False
    grid_low: float = 3.0
    grid_high: float = 17.0
    bins: int = 324

    def __post_init__(self):
        found = problems(vars(self), NETWORK_RANGES)
        if not found and not self.grid_low < self.grid_high:
            found = [f"grid_low is {self.grid_low}, expected below grid_high, {self.grid_high}"]
        _refuse(found)
        if self.width % self.scales:
            raise BadRequest(f"width {self.width} is not a multiple of the number of scales, {self.scales}")
        if self.width % (2 * self.heads):
            raise BadRequest(
                f"width {self.width} is not a multiple of {2 * self.heads}: each of {self.heads} heads needs an even width"
            )

    @property
    def vocabulary(self) -> int:
        return self.bins + 2


STRATEGIES = ("none", "ln", "lastN", "ln_lastN")
"""Backbone parameters that train beside an adapter."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The sample-size adapter: *samples* haplotypes in, the backbone's number out.

    Attributes
    ----------
    samples : haplotypes of its input
    bottleneck, dropout : width and dropout of the gated branch
    unfreeze_strategy : backbone parameters that train too: `none`, `ln` (layer norms), `lastN` (last *last_n* blocks),
        or `ln_lastN` (both)
    overwrite_bin0 : overwrite bin 0 always, as published, not only where the backbone masks it
    """

    samples: int = 10
    bottleneck: int = 32
    dropout: float = 0.0
    unfreeze_strategy: str = "ln_lastN"
    last_n: int = 2
    overwrite_bin0: bool = False

    def __post_init__(self):
        found = problems(vars(self), ADAPTER_RANGES)
        if self.unfreeze_strategy not in STRATEGIES:
            found.append(
                f"unknown unfreeze_strategy '{self.unfreeze_strategy}'{suggest_nearest(self.unfreeze_strategy, STRATEGIES)}"
            )
        _refuse(found)


PRECISIONS = {
    "bf16-mixed": ("true", "bf16"),
    "16-mixed": ("16", "fp16"),
    "32-true": ("no", "false", "32", "fp32"),
    "bf16-true": (),
}
"""What can be computed in, by Lightning's names, and other names for it."""

SCHEDULES = ("cosine", "linear", "constant", "wsd")
"""Shapes of the learning rate after its warm-up; `wsd` stays at its peak for a part of the decay and ends as a cosine."""

COMPILES = ("auto", "none", "inductor", "aot_eager", "eager")
"""Backends of `torch.compile` for the training step; `auto` is inductor on a GPU and none on a CPU."""

ATTENTIONS = ("split", "flex")
"""How the prefix-LM attends: two fused calls, or FlexAttention, which needs a GPU."""

LOSS_PATHS = ("target", "full", "chunked")
"""Where the head computes logits: where windows are predicted, everywhere (as published), or there in parts."""

EXPORTS = ("last", "best")
"""Which weights a finished run publishes: those after its last step, or those of the lowest validation loss."""

STORAGES = ("auto", "memory", "disk")
"""Where a dataset is held while it is read: `memory`, or `disk`, a nameless temporary file of which the system keeps in
memory what it can; `auto` chooses by what is free."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training settings; the defaults are the published ones, and config/README.md describes each."""

    epochs: int = 10
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 10
    decay_steps: int = 150_000
    schedule: str = "cosine"
    batch_size: int = 128
    grad_accum: int = 6
    grad_clip: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    backbone_lr_factor: float = 0.05
    precision: str = "bf16-mixed"
    compile: str = "auto"
    attention: str = "split"
    loss_path: str = "target"
    gradient_checkpointing: bool = False
    deterministic: bool = True
    threads: int = 2
    workers: int = 0
    seed: int = 1
    validation_items: int = 0
    validate_every: int = 0
    decode_items: int = 8
    patience: int = 0
    min_delta: float = 0.0
    export: str = "last"
    save_every: int = 200
    save_minutes: float = 10.0
    keep_saves: int = 2
    log_every: int = 10
    storage: str = "auto"

    def __post_init__(self):
        found = problems(vars(self), TRAINING_RANGES)
        in_range = not found
        word = str(self.precision).lower()
        known = [name for name, others in PRECISIONS.items() if word in (name, *others)]
        if known:
            object.__setattr__(self, "precision", known[0])
        else:
            accepted = ", ".join(word for name, others in PRECISIONS.items() for word in (name, *others))
            found.append(f"unknown precision '{self.precision}'{suggest_nearest(word, PRECISIONS)}; accepted: {accepted}")
        if in_range and self.min_lr > self.lr:
            found.append(f"lr {self.lr:g} is below min_lr {self.min_lr:g}, so the learning rate would rise: lower min_lr")
        choices_of = {
            "storage": STORAGES, "schedule": SCHEDULES, "export": EXPORTS, "compile": COMPILES, "attention": ATTENTIONS,
            "loss_path": LOSS_PATHS,
        }  # fmt: skip
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                found.append(f"unknown {name} '{getattr(self, name)}'{suggest_nearest(getattr(self, name), choices)}")
        _refuse(found)


PRESETS = {
    "narrow": ModelConfig(layers=6),
    "broad": ModelConfig(),
    "broad_w200": ModelConfig(window_size=200),
    "w200_wmissing": ModelConfig(window_size=200, mask_singletons=False),
}
"""The published architectures, by name."""

CHANGE_NO_RESULT = ("workers", "save_every", "save_minutes", "keep_saves", "log_every", "decode_items", "storage")
VALIDATION = ("validation_items", "validate_every")


def change_no_result(settings: dict) -> tuple[str, ...]:
    """Training settings that do not change what is published; those of validation do where it decides something."""
    decides = settings.get("patience") or settings.get("export", "last") != "last"
    without = () if settings.get("patience") else ("min_delta",)
    return CHANGE_NO_RESULT + without if decides else CHANGE_NO_RESULT + without + VALIDATION


SIZES = ("layers", "heads", "width", "dropout")


def pairs_of(samples: int) -> int:
    """Number of different pairs of *samples* haplotypes."""
    return samples * (samples - 1) // 2


def check_adapter_samples(at: str, dataset: str, samples: int, backbone: int) -> None:
    """BadRequest if an adapter would not expand anything."""
    if samples >= backbone:
        raise BadRequest(
            f"{at}: an adapter needs fewer samples than its backbone's {backbone}, dataset '{dataset}' has {samples}"
        )


def check_missingness(at: str, network: ModelConfig, dataset: str, missing: bool) -> None:
    """BadRequest if the network and the dataset disagree on what frequency bin 0 means."""
    if missing and network.mask_singletons:
        raise BadRequest(
            f"{at}: dataset '{dataset}' carries missingness in bin 0, which this model masks; "
            "use preset w200_wmissing, or mask_singletons: false"
        )
    if not missing and not network.mask_singletons:
        raise BadRequest(
            f"{at}: this model reads missingness from bin 0, but dataset '{dataset}' has none; "
            "give the dataset a mask, or choose a preset with mask_singletons"
        )


def check_inheritance(
    *,
    child,
    network,
    parent,
    parent_network,
    dataset,
    scales,
    parent_scales,
    samples_in,
    parent_samples_in,
    fresh_adapter,
    missing,
) -> None:
    """BadRequest if a child cannot start from its parent's weights with its dataset; window size may differ."""
    if not fresh_adapter and samples_in != parent_samples_in:
        raise BadRequest(
            f"{child}: dataset '{dataset}' has {samples_in} samples, but its parent '{parent}' takes {parent_samples_in}; "
            "an adapter can bridge that"
        )
    if list(scales) != list(parent_scales):
        raise BadRequest(f"{child}: dataset '{dataset}' has scales {scales}, but its parent '{parent}' {parent_scales}")
    for key in ("layers", "heads", "width", "samples", "bins"):
        mine, theirs = getattr(network, key), getattr(parent_network, key)
        if mine != theirs:
            raise BadRequest(f"{child}: {key} is {mine}, but its parent '{parent}' has {theirs}; they must be equal")
    if network.windows != parent_network.windows:
        raise BadRequest(
            f"{child}: dataset '{dataset}' has {network.windows} windows, but its parent '{parent}' was trained with "
            f"{parent_network.windows}; change sequence_length or window_size"
        )
    if not missing and not parent_network.mask_singletons:
        raise BadRequest(f"{child}: its parent '{parent}' was trained with missingness, dataset '{dataset}' has none")


def steps_per_epoch(*, items: int, batch_size: int, grad_accum: int, world: int) -> int:
    """Optimizer steps of one epoch: full batches of each rank, and a last short accumulation that steps too.

    Raises
    ------
    BadRequest
        If a rank has less than one batch.
    """
    batches = items // world // batch_size
    if batches < 1:
        devices = "device" if world == 1 else "devices"
        raise BadRequest(
            f"the dataset has {items} training items, fewer than one batch of {batch_size} on {world} {devices}; "
            "lower the batch size or simulate more"
        )
    return -(-batches // grad_accum)


START_TOKEN = 1


SPECIAL_TOKENS = 2
"""Token 0 is unused, token 1 starts a sequence; bin b of the grid is token b + 2."""
