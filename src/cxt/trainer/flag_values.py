"""The values that the trainer's flags accept, checked word by word before the flags are parsed.

jsonargparse would refuse a value of the wrong type, too, but with the usage of all flags and the names of Python's types. Here
a wrong value is refused in the words of the configuration: `--beta1 must be a number in [0, 1), got 1.5`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jsonargparse
import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from cxt.config.bounds import (
    NUMBER,
    BasePairs,
    Devices,
    Flag,
    Index,
    Machines,
    NonNegative,
    NonNegativeInteger,
    Positive,
    PositiveInteger,
    Samples,
)
from cxt.config.network import Adapter, Architecture, Lora
from cxt.config.problems import explain_value
from cxt.config.training import TrainingConfig
from cxt.config.type_descriptions import Expected, list_choices, split_type


def _annotate(field: FieldInfo) -> Any:
    """The type of a setting with its bounds."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _list_scalars() -> dict[str, Any]:
    """{flag's name: type} of all settings of networks and training that are numbers, choices, or true or false."""
    named = dict(Architecture.model_fields)
    named |= {f"adapter_{name}" if name in ("bottleneck", "dropout") else name: f for name, f in Adapter.model_fields.items()}
    named |= {f"lora_{name}": field for name, field in Lora.model_fields.items()}
    named |= TrainingConfig.model_fields
    return {
        name: _annotate(field)
        for name, field in named.items()
        if split_type(field)[0] in (int, float, bool) or list_choices(field)
    }


Accelerator = Literal["auto", "cpu", "gpu", "mps"]

DeviceCount = Annotated[
    Devices, BeforeValidator(lambda value: 1 if value == "all" else value), Expected("an integer from 0 to 1024, or `all`")
]
"""A number of GPUs, or all there are."""

OPTION_VALUES: dict[str, Any] = {
    "windows": PositiveInteger, "window_size": BasePairs, "samples": Samples, "eval_samples": NonNegativeInteger,
    "eval_max_batches": NonNegativeInteger, "max_steps": PositiveInteger, "gpus": Index, "devices": DeviceCount,
    "nodes": Machines, "accelerator": Accelerator, "restart": Flag, "adapter": Flag, "adapter_samples": Samples,
    "max_minutes": Positive, "print_config": Flag, "wait_for_lock": NonNegative,
}  # fmt: skip
"""Accepted values of options that are not settings of a network, an adapter, LoRA or training; of `gpus`, of each."""

FLAG_VALUES = _list_scalars() | OPTION_VALUES
"""Accepted values of all flags that are numbers, choices, or true or false."""


def find_wrong_values(words: list[str], parser: jsonargparse.ArgumentParser, accepted: dict[str, Any], *, at="--") -> list[str]:
    """Messages about the values in *words* that their flags do not accept.

    Parameters
    ----------
    words : list of str
        Arguments, as `--lr 0.1` or `--lr=0.1`.
    parser : ArgumentParser
        Has all flags; those whose default is None also accept `null`.
    accepted : dict
        {name of a flag, with underscores: type}; other flags are not checked.
    at : str
        Written before a flag's name in messages; `--`, or the file that *words* come from.
    """
    defaults = {action.dest: action.default for action in parser._actions}
    problems = []
    for name, text in _pair_words(words):
        if name not in accepted:
            continue
        value = _read_word(text)
        if value is None and defaults.get(name) is None:
            continue
        try:
            TypeAdapter(accepted[name]).validate_python(value, context={"from_file": True})
        except ValidationError:
            shown = f"--{name.replace('_', '-')}" if at == "--" else f"{at}: {name}"
            problems.append(explain_value(shown, accepted[name], value).replace("got None", "got null"))
    return problems


def _pair_words(words: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of every value; a flag without a value gives none, and one with a list several."""
    name = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, text = word.removeprefix("--").partition("=")
            name = flag.replace("-", "_")
            if equals:
                yield name, text
        elif word.startswith("-") and not NUMBER.fullmatch(word):  # a flag of one letter
            name = ""
        elif name:
            yield name, word


def _read_word(text: str) -> Any:
    """A word as YAML reads it, also a number such as 1e-8; the word itself if it is no YAML."""
    if NUMBER.fullmatch(text):
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
