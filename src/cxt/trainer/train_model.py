"""Training from Python: `cxt.train_model`."""

import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Never

from cxt.trainer.launch import train
from cxt.trainer.options import merge_options


def train_model(
    config: str | PathLike[str] | None = None,
    *,
    # What is trained, and on what
    model: str | None = None,
    name: str | None = None,
    dataset_path: str | PathLike[str] | None = None,
    soft_targets: str | PathLike[str] | None = None,
    simulate: str | Sequence[str] | None = None,
    configfile: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    windows: int | None = None,
    window_size: int | None = None,
    samples: int | None = None,
    eval_samples: int | None = None,
    eval_max_batches: int | None = None,
    max_steps: int | None = None,
    # The checkpoint to start from
    checkpoint: str | PathLike[str] | None = None,
    resume_adapter: str | PathLike[str] | None = None,
    lora_of: str | PathLike[str] | None = None,
    # LoRA
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: Literal["attention", "mlp", "all"] | None = None,
    # The network
    layers: int | None = None,
    heads: int | None = None,
    width: int | None = None,
    dropout: float | None = None,
    mask_singletons: bool | None = None,
    start_token_in_prefix: bool | None = None,
    reads_rates: bool | None = None,
    separate_embeddings: bool | None = None,
    # The adapter
    adapter: bool | None = None,
    adapter_samples: int | None = None,
    adapter_bottleneck: int | None = None,
    adapter_dropout: float | None = None,
    unfreeze_strategy: Literal["none", "ln", "lastN", "ln_lastN", "all"] | None = None,
    last_n: int | None = None,
    overwrite_bin0: bool | None = None,
    # Optimization
    epochs: int | None = None,
    lr: float | None = None,
    min_lr: float | None = None,
    warmup_steps: int | None = None,
    decay_steps: int | None = None,
    schedule: Literal["cosine", "linear", "constant", "wsd", "log_linear", "rex", "cosine_restarts", "adaptive"] | None = None,
    cycles: int | None = None,
    cycle_decay: float | None = None,
    adaptive: Mapping[str, Any] | None = None,
    objective: Literal["autoregressive", "marginal", "joint", "distill", "masked", "contrastive"] | None = None,
    joint_weight: float | None = None,
    distill: Mapping[str, Any] | None = None,
    masked: Mapping[str, Any] | None = None,
    contrastive: Mapping[str, Any] | None = None,
    rates_dropout: float | None = None,
    noise: Mapping[str, Any] | None = None,
    regions: Mapping[str, Any] | None = None,
    losses: str | Sequence[str | Mapping[str, Any]] | None = None,
    optimizer: str | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    grad_accum: int | None = None,
    weight_by_windows: bool | None = None,
    grad_clip: float | None = None,
    weight_decay: float | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    weight_noise: float | None = None,
    quantized_bits: int | None = None,
    ema_decay: float | None = None,
    backbone_lr_factor: float | None = None,
    seed: int | None = None,
    # How it is computed
    precision: str | None = None,
    compile: Literal["auto", "none", "inductor", "aot_eager", "eager"] | None = None,
    attention: Literal["split", "flex"] | None = None,
    loss_path: Literal["target", "full", "chunked"] | None = None,
    gradient_checkpointing: bool | None = None,
    deterministic: bool | None = None,
    threads: int | None = None,
    workers: int | None = None,
    storage: Literal["auto", "memory", "disk"] | None = None,
    scratch: str | PathLike[str] | None = None,
    gpus: int | Sequence[int] | None = None,
    devices: int | Literal["all"] | None = None,
    nodes: int | None = None,
    accelerator: Literal["auto", "cpu", "gpu", "mps"] | None = None,
    # Validation and what is published
    validation_items: int | None = None,
    validate_every: int | None = None,
    decode_items: int | None = None,
    metrics: Sequence[Literal["accuracy", "within_one_bin", "perplexity", "crps", "ece"]] | None = None,
    batch_size_eval: int | None = None,
    patience: int | None = None,
    min_delta: float | None = None,
    export: Literal["last", "best"] | None = None,
    out: str | PathLike[str] | None = None,
    log_out: str | PathLike[str] | None = None,
    # The run directory, and continuing
    log_dir: str | PathLike[str] | None = None,
    run_dir: str | PathLike[str] | None = None,
    resume: bool | str | PathLike[str] | None = None,
    prolong: str | PathLike[str] | None = None,
    restart: bool | None = None,
    save_every: int | None = None,
    save_minutes: float | None = None,
    keep_saves: int | None = None,
    log_every: int | None = None,
    mlflow: str | None = None,
    wandb: str | None = None,
    histograms: bool | None = None,
    profiler: Literal["none", "simple", "advanced", "pytorch"] | None = None,
    profile_batches: int | None = None,
    callbacks: Sequence[Mapping[str, Any]] | None = None,
    max_minutes: float | None = None,
    wait_for_lock: float | None = None,
    # What the workflow has planned
    lineage: str | None = None,
    settings_lineage: str | None = None,
    dataset_lineage: str | None = None,
    parent_lineage: str | None = None,
    parent_sha256: str | None = None,
    soft_targets_lineage: str | None = None,
    simulate_specs: str | None = None,
    **unknown: Never,
) -> Path:
    """Train one checkpoint, as `python -m cxt.train` does with flags of the same names.

    ``train_model(dataset_path="data", epochs=2, gpus=[0, 1])`` trains a `broad` network for two epochs on two GPUs. With
    *run_dir*, repeating the same call continues an interrupted run exactly. config/README.md describes the settings of networks
    and training with their defaults, `python -m cxt.train --help` the others.

    Parameters
    ----------
    config : path-like, optional
        YAML file of settings, such as the config.yaml of a run directory. Arguments take precedence; those that are None come
        from the file, or are the default.
    model : str
        Preset of the network: narrow, broad, broad_w200, w200_wmissing.
    dataset_path : path-like
        Directory of a dataset, with train/ and test/; alternatively, *simulate* names scenarios.
    windows : int
        Windows that the network reads, in regions of the dataset's examples; by default, all.
    checkpoint, resume_adapter : path-like
        Checkpoint to start from, by name or path, without or with adapter weights.
    lora_of : path-like
        Checkpoint to train a LoRA of, whose rank, alpha and targets are *lora_rank*, *lora_alpha* and *lora_targets*.
    epochs : int
        Passes over the training examples.
    gpus, devices : list of int, int
        Indices of GPUs, or their number (0 = CPU) or `all`.
    run_dir : path-like
        Run directory to start or continue; by default, a new one below *log_dir*.
    out : path-like
        File to publish the finished checkpoint to.

    Returns
    -------
    Path
        The run directory.

    Raises
    ------
    BadRequest
        If the options cannot be fulfilled.
    Failed
        If the run was started but could not be finished.
    """
    given = {name: value for name, value in locals().items() if name not in ("config", "unknown")}
    return train(merge_options(config, given | unknown), began=time.monotonic())
