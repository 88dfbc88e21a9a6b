"""Exceptions for bad requests and failed runs, and helpers for their messages."""

import difflib
from collections.abc import Callable, Iterable


class BadRequest(ValueError):
    """A request that cannot be fulfilled. The message says what was found and expected, and what to do; commands exit 2."""


class Failed(RuntimeError):
    """A run that started but could not be finished. The message explains why.

    Parameters
    ----------
    message : str
        What went wrong; nothing is printed if it is empty.
    status : int
        Exit status of the command.
    agreed : bool
        Whether all processes of the run end in this way by themselves, so that none has to be killed.
    """

    def __init__(self, message: str, *, status: int = 1, agreed: bool = False):
        super().__init__(message)
        self.status, self.agreed = status, agreed


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def try_drawing(draw: Callable[[], object]) -> str:
    """Call *draw* and return why it failed, or "": a figure that cannot be drawn must not cost the results."""
    try:
        draw()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


MAX_LISTED_NAMES = 12
"""A message lists at most this many names; if there are more, it lists up to five that are at least half alike."""


NAMES_ELSEWHERE = {
    "lr": ("learning_rate", "peak_lr", "eta"),
    "min_lr": ("learning_rate_min", "end_lr", "final_lr"),
    "schedule": ("lr_scheduler", "lr_schedule", "scheduler"),
    "warmup_steps": ("warmup_iters", "num_warmup_steps"),
    "decay_steps": ("lr_decay_iters",),
    "epochs": ("max_epochs", "num_epochs", "num_train_epochs"),
    "max_steps": ("max_iters", "num_steps", "iterations"),
    "batch_size": ("per_device_train_batch_size", "micro_batch_size"),
    "batch_size_eval": ("per_device_eval_batch_size", "eval_batch_size"),
    "grad_accum": ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum_steps"),
    "grad_clip": ("gradient_clip_val", "gradient_clipping", "max_grad_norm"),
    "precision": ("dtype", "mixed_precision", "use_bf16"),
    "compile": ("torch_compile",),
    "attention": ("attn_backend",),
    "workers": ("num_workers", "dataloader_num_workers"),
    "storage": ("cache_data",),
    "patience": ("early_stopping_patience",),
    "min_delta": ("early_stopping_min_delta",),
    "validate_every": ("eval_every", "eval_steps", "eval_interval", "val_check_interval"),
    "validation_items": ("eval_iters", "limit_val_batches"),
    "log_every": ("log_freq", "logging_steps", "log_every_n_steps", "log_interval"),
    "save_every": ("save_steps", "save_interval"),
    "keep_saves": ("save_total_limit", "save_top_k"),
    "resume": ("resume_from_checkpoint", "train_from_checkpoint"),
    "run_dir": ("output_dir",),
    "dataset_path": ("data_path", "data_dir", "dataset"),
    "objective": ("paradigm",),
    "losses": ("loss", "loss_function"),
    "layers": ("num_layers", "n_layers", "num_hidden_layers"),
    "heads": ("num_heads", "n_heads", "num_attention_heads"),
    "width": ("hidden_size", "n_embd", "d_model", "embed_dim"),
    "quantized_bits": ("qat", "bits"),
    "mlflow": ("mlflow_tracking_uri", "mlflow_active"),
    "seed": ("random_seed",),
    "nodes": ("num_nodes",),
}
"""{name of a setting: what other training systems call it}, where the two are not alike enough to be found by likeness."""


def _normalise(name: str) -> str:
    """A name without leading dashes, with underscores in place of dashes, in lower case."""
    return name.casefold().lstrip("-").replace("-", "_")


def _likeness(name: str, choice: str) -> float:
    """Similarity of two names, from 0 to 1, ignoring case, leading dashes, and dashes for underscores."""
    return difflib.SequenceMatcher(None, _normalise(name), _normalise(choice)).ratio()


def suggest_nearest(name: str, choices: Iterable[str]) -> str:
    """Suggest names for a misspelt one, as the end of a message.

    Parameters
    ----------
    name : str
        The name that was given.
    choices : iterable of str
        The names that exist.

    Returns
    -------
    str
        ``"; here it is called 'x'"`` if other training systems call one of *choices* so (`NAMES_ELSEWHERE`); ``"; did you mean
        'x'?"`` if one is similar to *name*; and otherwise a list of choices, unless there are many and none is similar.
    """
    names = sorted(map(str, choices))
    if not names:
        return "; none are available"
    for choice in names:
        if _normalise(str(name)) in NAMES_ELSEWHERE.get(_normalise(choice), ()):
            return f"; here it is called '{choice}'"
    by_likeness = sorted(names, key=lambda choice: -_likeness(str(name)[:200], choice))
    if _likeness(str(name)[:200], by_likeness[0]) >= 0.7:
        return f"; did you mean '{by_likeness[0]}'?"
    if len(names) <= MAX_LISTED_NAMES:
        return f"; choose from {', '.join(names)}"
    similar = [choice for choice in by_likeness[:5] if _likeness(str(name)[:200], choice) >= 0.5]
    return f"; the most similar of {len(names)} are {', '.join(similar)}" if similar else f"; none of {len(names)} is similar"


EXTRAS = {
    "demes": "simulate", "msprime": "simulate", "stdpopsim": "simulate",
    "jsonargparse": "train", "lightning_fabric": "train", "pytorch_lightning": "train", "tensorboard": "train",
    "snakemake": "workflow",
    "mlflow": "tracking", "wandb": "tracking",
    "optuna": "sweep",
    "cyvcf2": "vcf", "pyBigWig": "vcf", "pysam": "vcf", "tszip": "vcf",
}  # fmt: skip
"""{package to import: the extra of cxt that installs it}."""


def advise_extra(error: ModuleNotFoundError) -> str | None:
    """Say which extra of cxt to install for a package that could not be imported.

    Parameters
    ----------
    error : ModuleNotFoundError
        The import error.

    Returns
    -------
    str or None
        One line with the command; None for a package that is in no extra.
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"this needs the package {package}, which is not installed: pip install 'cxt[{EXTRAS[package]}]'"
