"""Types of settings and flags: numbers with bounds, text, lists.

They are strict (True is not a number, 1.5 not an integer), but text in a configuration file that spells a number is converted.
"""

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WrapValidator

from cxt.random_seeds import LARGEST_SEED

MAX_COUNT = 10**9
"""Largest count of anything without a tighter limit; it only keeps products of counts from overflowing."""

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _parse_number(value: Any, info: ValidationInfo) -> Any:
    """Convert text of a configuration file that spells a number; return any other *value* unchanged.

    YAML reads `1e-8` as text, and so does Snakemake every value in `--config 'training={devices: 2}'`.
    """
    if info.context and isinstance(value, str) and NUMBER.fullmatch(value):
        return int(value) if value.lstrip("+-").isdigit() else float(value)
    return value


def _parse_integer(value: Any, info: ValidationInfo) -> Any:
    """The same, and convert whole floats of a file, such as 1.0e+2, to integers."""
    value = _parse_number(value, info)
    return int(value) if info.context and isinstance(value, float) and value.is_integer() else value


def _parse_flag(value: Any, info: ValidationInfo) -> Any:
    """The same for the texts true and false."""
    if info.context and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def _check_float(value: Any, handler, info: ValidationInfo) -> Any:
    """Check *value* as a float but keep integers, because lineages are digests of what the user wrote."""
    value = _parse_number(value, info)
    handler(value)
    return value


def _check_different(values: list) -> list:
    if any(value in values[:place] for place, value in enumerate(values)):
        raise ValueError("values are repeated")
    return values


integer_validator, float_validator = BeforeValidator(_parse_integer), WrapValidator(_check_float)

Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True), BeforeValidator(_parse_flag)]

PositiveInteger = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT), integer_validator]
NonNegativeInteger = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT), integer_validator]
Index = Annotated[int, Field(strict=True, ge=0, le=2 * 10**9), integer_validator]
Seed = Annotated[int, Field(strict=True, ge=0, le=LARGEST_SEED), integer_validator]
Samples = Annotated[int, Field(strict=True, ge=2, le=60_000), integer_validator]
BasePairs = Annotated[int, Field(strict=True, ge=1, le=10**10), integer_validator]
Threads = Annotated[int, Field(strict=True, ge=1, le=1024), integer_validator]  # OpenMP aborts the process long before 100 000
Workers = Annotated[int, Field(strict=True, ge=0, le=256), integer_validator]
Devices = Annotated[int, Field(strict=True, ge=0, le=1024), integer_validator]
Machines = Annotated[int, Field(strict=True, ge=1, le=10_000), integer_validator]

Number = Annotated[float, Field(strict=True, allow_inf_nan=False), float_validator]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0), float_validator]
NonNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0), float_validator]
Fraction = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1), float_validator]
FactorUpToOne = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1), float_validator]
ShareUpToOne = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1), float_validator]
PositiveRate = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=0.5), float_validator]
Rate = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=0.5), float_validator]

T = TypeVar("T")
Different = Annotated[list[T], Field(strict=True, json_schema_extra={"uniqueItems": True}), AfterValidator(_check_different)]
"""A list in which no value is repeated."""

NonEmpty = Annotated[
    list[T], Field(strict=True, min_length=1, json_schema_extra={"uniqueItems": True}), AfterValidator(_check_different)
]
"""The same, with at least one value."""
