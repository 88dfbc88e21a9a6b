"""What a run is asked to be: one frozen object, made once from the command line or from the arguments of `train_model`."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from cxt.config.training import TrainingConfig
from cxt.errors import BadRequest, suggest_nearest
from cxt.trainer.flags import build_parser, check_numbers, parse_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The trainer's flags, with the names that they have in Python; `python -m cxt.train --help` says what each is.

    None is what nobody has asked for; what it then is depends on the preset, the dataset and the parent. The settings of
    `TrainingConfig` are together in *training*.
    """

    model: str
    name: str | None
    dataset_path: str | None
    simulate: tuple[str, ...] | None
    configfile: tuple[str, ...]
    window_size: int | None
    samples: int | None
    eval_samples: int | None
    eval_max_batches: int | None
    max_steps: int | None
    gpus: tuple[int, ...] | None
    devices: int | None
    nodes: int
    accelerator: str
    checkpoint: str | None
    resume_adapter: str | None
    resume: bool | str
    restart: bool
    adapter: bool
    adapter_samples: int | None
    adapter_bottleneck: int | None
    adapter_dropout: float | None
    unfreeze_strategy: str | None
    last_n: int | None
    overwrite_bin0: bool | None
    log_dir: str
    run_dir: str | None
    max_minutes: float | None
    out: str | None
    lineage: str | None
    settings_lineage: str | None
    dataset_lineage: str | None
    parent_lineage: str | None
    wait_for_lock: float
    layers: int | None
    heads: int | None
    width: int | None
    dropout: float | None
    mask_singletons: bool | None
    start_token_in_prefix: bool | None
    training: TrainingConfig

    @property
    def source(self) -> str | None:
        """The checkpoint to start from, as it was named."""
        return self.checkpoint or self.resume_adapter

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained."""
        return self.adapter or self.resume_adapter is not None

    @property
    def data(self) -> str:
        """The dataset or the scenarios to train on, in words."""
        return self.dataset_path or f"--simulate {' '.join(self.simulate or ())}"

    def flatten(self) -> dict[str, Any]:
        """All options by the names of their flags, those of *training* among the others, as YAML and JSON hold them."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "training"}
        values = own | self.training.model_dump()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


OPTIONS = tuple(field.name for field in dataclasses.fields(TrainingOptions) if field.name != "training")
TRAINING_SETTINGS = tuple(TrainingConfig.model_fields)
TYPES = get_type_hints(TrainingOptions)


def build_options(values: Mapping[str, Any]) -> TrainingOptions:
    """The options that parsed flags give.

    Parameters
    ----------
    values : mapping
        Every flag's value by its name; what is no option of a run is passed over.

    Raises
    ------
    BadRequest
        If a setting of `TrainingConfig` is out of its range.
    """
    own = {name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in OPTIONS}
    return TrainingOptions(**own, training=TrainingConfig(**{name: values[name] for name in TRAINING_SETTINGS}))


def read_options(argv: list[str]) -> TrainingOptions:
    """The options that a command line gives, with the files that its `--config` names."""
    return build_options(vars(parse_flags(argv, build_parser())))


def merge_options(config: str | Path | None, given: Mapping[str, Any]) -> TrainingOptions:
    """The options that a configuration file gives, and over them what was *given* in Python.

    Parameters
    ----------
    config : path-like, optional
        YAML file of settings, such as the config.yaml of a run directory.
    given : mapping
        Options by name; None is as if a name were not there.

    Raises
    ------
    BadRequest
        For unknown names and keys, with the nearest one, and for values of another type or out of range.
    """
    import jsonargparse

    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in (*OPTIONS, *TRAINING_SETTINGS):
            raise BadRequest(f"unknown option {name}{suggest_nearest(name, (*OPTIONS, *TRAINING_SETTINGS))}")
    parser = build_parser(exit_on_error=False)
    try:
        values = vars(parse_flags([] if config is None else ["--config", str(config)], parser))
    except jsonargparse.ArgumentError as error:
        raise BadRequest(str(error)) from None
    options = build_options(values | {name: _check_type(name, value) for name, value in given.items()})
    check_numbers(options)
    return options


def _check_type(name: str, value: Any) -> Any:
    """*value* as the type of the option *name*; BadRequest if it is none."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy's
        value = value.item()
    if name in ("simulate", "configfile", "gpus") and not isinstance(value, list | tuple | range):
        value = [value]
    if name == "configfile":
        value = [os.fspath(path) for path in value]
    if name in TRAINING_SETTINGS:
        return value  # which they check themselves
    try:
        return TypeAdapter(TYPES[name]).validate_python(value)
    except ValidationError as error:
        raise BadRequest(f"{name}: found {value!r}: {error.errors()[0]['msg']}") from None
