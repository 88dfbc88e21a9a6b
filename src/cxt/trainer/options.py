"""The options of a run: their flags, their keys in configuration files, and the frozen object that holds them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from cxt.config.flags import check_flags, read_config_file, take_config_files
from cxt.config.learning import as_json
from cxt.config.network import PRESETS, Adapter, Architecture, Lora
from cxt.config.problems import refuse
from cxt.config.training import TrainingConfig
from cxt.config.type_descriptions import list_choices
from cxt.console import add_verbosity_flags, set_verbosity
from cxt.errors import BadRequest, suggest_nearest
from cxt.trainer.flag_values import FLAG_VALUES, find_wrong_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The trainer's flags under their Python names; `python -m cxt.train --help` describes each of them.

    None means not given: the value then comes from the preset, the dataset or the parent. The settings of `TrainingConfig` are
    in *training*.
    """

    model: str
    name: str | None
    dataset_path: str | None
    simulate: tuple[str, ...] | None
    simulate_specs: str | None
    configfile: tuple[str, ...]
    windows: int | None
    window_size: int | None
    samples: int | None
    eval_samples: int | None
    eval_max_batches: int | None
    max_steps: int | None
    gpus: tuple[int, ...] | None
    devices: int | str | None
    nodes: int
    accelerator: str
    checkpoint: str | None
    resume_adapter: str | None
    lora_of: str | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_targets: str | None
    resume: bool | str
    prolong: str | None
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
    log_out: str | None
    lineage: str | None
    settings_lineage: str | None
    dataset_lineage: str | None
    parent_lineage: str | None
    parent_sha256: str | None
    soft_targets: str | None
    soft_targets_lineage: str | None
    wait_for_lock: float
    layers: int | None
    heads: int | None
    width: int | None
    dropout: float | None
    mask_singletons: bool | None
    start_token_in_prefix: bool | None
    reads_rates: bool | None
    separate_embeddings: bool | None
    training: TrainingConfig

    @property
    def parent(self) -> str | None:
        """The checkpoint to start from, by the name or path that was given."""
        return self.checkpoint or self.resume_adapter or self.lora_of

    @property
    def has_adapter(self) -> bool:
        """Whether the run trains an adapter."""
        return self.adapter or self.resume_adapter is not None

    @property
    def checkpoint_name(self) -> str:
        """Name of the checkpoint: as given, or the preset, followed by `_adapter` for one with an adapter, as published."""
        return self.name or (f"{self.model}_adapter" if self.has_adapter else self.model)

    @property
    def data(self) -> str:
        """Description of the dataset or the scenarios to train on, for messages."""
        return self.dataset_path or f"--simulate {' '.join(self.simulate or ())}"

    def flatten(self) -> dict[str, Any]:
        """All options, including those of *training*, by the names of their flags, with values for YAML and JSON."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "training"}
        values = options | self.training.model_dump()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


OPTIONS = tuple(field.name for field in dataclasses.fields(TrainingOptions) if field.name != "training")
TRAINING_SETTINGS = tuple(TrainingConfig.model_fields)
TYPES = get_type_hints(TrainingOptions)


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of all flags; the keys of a `--config` file are the names of the flags, with underscores."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m cxt.train",
        usage="python -m cxt.train [FILE.yaml] [options]",
        description="Train one checkpoint.",
        exit_on_error=False,  # `parse_flags` raises BadRequest
    )
    add = parser.add_argument
    add(
        "--config",
        type=str | None,
        help="YAML file whose keys are the names of these flags; null means the default, and the command line takes "
        "precedence; FILE.yaml as the first argument is the same",
    )
    add("--model", default="broad", help=f"preset: {', '.join(PRESETS)}")
    add(
        "--name",
        type=str | None,
        help="name of the checkpoint in logs and file names (default: the preset, with _adapter if it has one)",
    )
    add("--dataset-path", type=str | None, help="dataset directory, with train/ and test/")
    add("--soft-targets", type=str | None, help="directory of a teacher's soft targets for the dataset, made by cxt.teach")
    add("--simulate", type=str, nargs="+", help="train on these scenarios, simulated on the fly, instead of a dataset")
    add(
        "--simulate-specs",
        type=str | None,
        help="the variants of the scenarios of --simulate as JSON, instead of looking them up in the configuration",
    )
    add("--configfile", type=str, nargs="+", default=[], help="overlays on the default configuration, for --simulate")
    add(
        "--windows",
        type=int | None,
        help="windows that the network reads, in regions that are cut from the examples of --dataset-path (default: all)",
    )
    add("--window-size", type=int | None, help="base pairs per window, for --simulate (default: the preset's)")
    add("--samples", type=int | None, help="haplotypes, for --simulate (default: all that are simulated)")
    add("--eval-samples", type=int | None, help="held-out validation examples for --simulate")
    add("--eval-max-batches", type=int | None, help="the same, counted in batches of --batch-size")
    add("--max-steps", type=int | None, help="optimizer steps after which training ends, fewer or more than those of --epochs")
    add("--gpus", type=int, nargs="+", help="indices of the GPUs to train on; several use DDP")
    add("--devices", type=int | str | None, help="number of GPUs instead of indices, or `all`; 0 = CPU")
    add(
        "--nodes",
        type=int,
        default=1,
        help="number of machines, each with this many devices; start the same command once on every machine",
    )
    add(
        "--accelerator",
        type=str,
        default="auto",
        metavar="{auto,cpu,gpu,mps}",
        help="cpu, with --devices N: N DDP processes on the CPU; mps: the GPU of an Apple computer, always in 32-true; auto: "
        "the first NVIDIA or AMD GPU, or the CPU",
    )
    add("--checkpoint", type=str | None, help="start from the weights of this checkpoint")
    add("--resume-adapter", type=str | None, help="start from the backbone and adapter weights of this adapter checkpoint")
    add("--lora-of", type=str | None, help="train low-rank changes (LoRA) of this checkpoint, which stays frozen")
    for name, field in Lora.model_fields.items():
        _add_setting(parser, f"lora_{name}", field, default=f"{field.default}")
    add(
        "--resume",
        type=bool | str,
        default=False,
        nargs="?",
        const=True,
        help="continue a run: the newest below --log-dir, the one in --run-dir, or a given run directory or training state; "
        "`latest` requires a run to exist, `auto` starts one if none does",
    )
    add("--prolong", type=str | None, help="a shorter run of the same settings, with whose training state a new run begins")
    add(
        "--restart",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="start over in the run directory; the old run is renamed …-superseded-N",
    )
    add(
        "--adapter",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="train a sample-size adapter on the backbone of --checkpoint",
    )
    add("--adapter-samples", type=int | None, help="haplotypes of the adapter's input (default: the dataset's)")
    for name, field in Adapter.model_fields.items():
        flag = f"adapter_{name}" if name in ("bottleneck", "dropout") else name
        default = "the parent's" if name == "overwrite_bin0" else f"that of --resume-adapter, or {field.default}"
        _add_setting(parser, flag, field, default=default)
    add("--log-dir", type=str, default=".", help="runs are written to <log-dir>/lightning_logs/version_N")
    add("--run-dir", type=str | None, help="run directory to use instead; an unfinished run in it is continued")
    add(
        "--max-minutes",
        type=float | None,
        help="save a training state and exit with status 75 after this many minutes; run the same command to continue "
        "(with --resume, if it has no --run-dir)",
    )
    add("--out", type=str | None, help="publish the finished checkpoint to this file")
    add("--log-out", type=str | None, help="publish the training log of the finished run, training_log.csv, to this file")
    add("--print-config", type=bool, default=False, nargs="?", const=True, help="print all settings as YAML and exit")
    add("--lineage", type=str | None, help="digest of everything the checkpoint depends on, stored in it")
    add(
        "--settings-lineage",
        type=str | None,
        help="lineage for which the --config file was written; must equal --lineage",
    )
    add("--dataset-lineage", type=str | None, help="expected lineage of the dataset")
    add("--parent-lineage", type=str | None, help="expected lineage of the checkpoint to start from")
    add("--parent-sha256", type=str | None, help="expected digest of the file that training starts from, or was imported from")
    add("--soft-targets-lineage", type=str | None, help="expected lineage of the soft targets")
    add("--wait-for-lock", type=float, default=0.0, help="minutes to wait for another trainer that uses the run directory")
    for name, field in Architecture.model_fields.items():
        defaults = {"mask_singletons": "the preset's", "start_token_in_prefix": "the parent's"}
        _add_setting(parser, name, field, default=defaults.get(name, "the parent's, or the preset's"))
    for name, field in TrainingConfig.model_fields.items():
        _add_setting(parser, name, field)
    return parser


def _add_setting(parser: jsonargparse.ArgumentParser, name: str, field: FieldInfo, *, default: str | None = None) -> None:
    """Add the flag of a setting, with its type, choices and description.

    Parameters
    ----------
    parser : parser to add it to
    name : name of the flag, with underscores
    field : the setting, as defined in its section
    default : description of the default, if it is not the default of *field*
    """
    kind = field.annotation if field.annotation in (bool, int, float) else str
    text = (field.description or "").replace("`", "")
    options: dict = {"nargs": "?", "const": True} if kind is bool and default is None else {}
    if field.default == [] and name not in STRUCTURED:
        options = {"nargs": "*"}
    if choices := list_choices(field):
        options["metavar"] = f"{{{','.join(choices)}}}"
    if name == "precision":
        kind = str | bool | int  # YAML reads `no` and `16` as these
    if default is None:
        value = float(field.default) if kind is float else as_json(field.default)
        value = "[]" if value == [] and name in STRUCTURED else value
        accepted = kind if value is not None else kind | None
        parser.add_argument(f"--{name.replace('_', '-')}", type=accepted, default=value, help=text, **options)
    else:
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind | None, help=text, **options)


STRUCTURED = ("losses", "optimizer", "adaptive", "distill", "masked", "contrastive", "noise", "regions", "callbacks")
"""Settings that are mappings, or lists of them; as flags, they are given as YAML text."""


def check_numbers(args) -> None:
    """BadRequest for flags with values out of range, except settings of training, which check their own, and a bad --name."""
    settings = TrainingConfig.model_fields.keys()
    numbers = {
        name: kind for name, kind in FLAG_VALUES.items() if name not in settings and name not in ("gpus", "print_config")
    }
    check_flags(args, **numbers)
    name = args.name
    if name is not None and (not 0 < len(name) <= 100 or name[0] in ".-" or "/" in name or not name.isprintable()):
        raise BadRequest(
            "--name must have 1 to 100 printable characters, no '/', and not start with '.' or '-', because it is part of file "
            f"names, got {name[:100]!r}"
        )


def _as_words(key: str, value) -> list[str]:
    """A setting as command-line arguments; none for null."""
    flag = f"--{key.replace('_', '-')}"
    if value is None or value == []:
        return []
    value = as_json(value)
    return [flag, *map(str, value)] if isinstance(value, list | tuple) else [f"{flag}={value}"]


def with_config_files(
    argv: list[str], parser: jsonargparse.ArgumentParser, accepted: Mapping[str, Any] = FLAG_VALUES
) -> list[str]:
    """Replace `--config` files in *argv* by their settings as leading arguments, so that the command line takes precedence.

    A first argument that is not a flag is such a file, too. *accepted* are the types of flags, by name.

    Raises
    ------
    BadRequest
        For an unknown key in such a file, or an unknown flag, with the nearest name; and for all values that are out of range.
    """
    flags = {option for action in parser._actions for option in action.option_strings}
    if argv and not argv[0].startswith("-"):
        if Path(argv[0]).suffix not in (".yaml", ".yml"):
            raise BadRequest(f"the first argument must be a flag or a YAML file of settings, FILE.yaml, got {argv[0]!r}")
        argv = ["--config", *argv]
    files, others = take_config_files(argv)
    for word in others:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in flags:
            raise BadRequest(f"unknown flag {flag}{suggest_nearest(flag, flags)}")
    settings, problems = [], []
    for path in files:
        words = []
        for key, value in read_config_file(path, parser).items():
            nested = isinstance(value, dict) or (
                isinstance(value, list) and any(isinstance(item, list | dict) for item in value)
            )
            if nested and key not in STRUCTURED:
                raise BadRequest(f"{path}: {key} must be a value that its flag accepts, not a mapping or a list of lists")
            words += _as_words(key, value)
        problems += find_wrong_values(words, parser, dict(accepted), at=path)
        settings += words
    refuse(problems + find_wrong_values(others, parser, dict(accepted)))
    return settings + others


def parse_flags(argv: list[str], parser: jsonargparse.ArgumentParser, **more: Any):
    """Parse *argv* and its `--config` files, and check all values; *more* are the types of flags that *parser* has in addition.

    Raises
    ------
    BadRequest
        For anything that is not a valid flag or value.
    """
    words = with_config_files(argv, parser, FLAG_VALUES | more)
    try:
        args = parser.parse_args(words)
    except jsonargparse.ArgumentError as error:
        raise BadRequest(" ".join(str(error).split())) from None
    check_numbers(args)
    return args


def build_options(values: Mapping[str, Any]) -> TrainingOptions:
    """Build the options from parsed flags.

    Parameters
    ----------
    values : mapping
        The value of every flag by its name; other names are ignored.

    Raises
    ------
    BadRequest
        If a setting of `TrainingConfig` is out of its range.
    """
    options = {name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in OPTIONS}
    return TrainingOptions(**options, training=TrainingConfig(**{name: values[name] for name in TRAINING_SETTINGS}))


def read_options(argv: list[str]) -> TrainingOptions:
    """Read the options from a command line and its `--config` files."""
    return build_options(vars(parse_flags(argv, build_parser())))


def merge_options(config: str | Path | None, given: Mapping[str, Any]) -> TrainingOptions:
    """Read the options from a configuration file, and override them with those *given* in Python.

    Parameters
    ----------
    config : path-like, optional
        YAML file of settings, such as the config.yaml of a run directory.
    given : mapping
        Options by name; None means not given.

    Raises
    ------
    BadRequest
        For unknown names and keys, with the nearest one, and for values of the wrong type or out of range.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in (*OPTIONS, *TRAINING_SETTINGS):
            raise BadRequest(f"unknown option {name}{suggest_nearest(name, (*OPTIONS, *TRAINING_SETTINGS))}")
    parser = build_parser()
    add_verbosity_flags(parser)  # which a file may contain, too
    args = parse_flags([] if config is None else ["--config", str(config)], parser)
    if config is not None:
        set_verbosity(args)
    values = vars(args)
    options = build_options(values | {name: _check_type(name, value) for name, value in given.items()})
    check_numbers(options)
    return options


def _check_type(name: str, value: Any) -> Any:
    """Convert *value* to the type of the option *name*; BadRequest if that is not possible."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy scalar
        value = value.item()
    if name in ("simulate", "configfile", "gpus") and not isinstance(value, list | tuple | range):
        value = [value]
    if name == "configfile":
        value = [os.fspath(path) for path in value]
    if name in TRAINING_SETTINGS:  # which check themselves; a number is recorded as its flag would read it
        is_float = TrainingConfig.model_fields[name].annotation is float
        return float(value) if is_float and type(value) is int else value
    try:
        return TypeAdapter(TYPES[name]).validate_python(value)
    except ValidationError as error:
        raise BadRequest(f"{name} is not valid: {error.errors()[0]['msg']}, got {value!r}") from None
