"""Types of settings and flags: numbers with bounds, text, lists.

They are strict (True is not a number, 1.5 not an integer), but text in a configuration file that spells a number is converted.
"""

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WrapValidator

from cxt.seeds import LARGEST_SEED

MOST = 10**9
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


_integer, _float = BeforeValidator(_parse_integer), WrapValidator(_check_float)

Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True), BeforeValidator(_parse_flag)]

PositiveInteger = Annotated[int, Field(strict=True, ge=1, le=MOST), _integer]
NonNegativeInteger = Annotated[int, Field(strict=True, ge=0, le=MOST), _integer]
Index = Annotated[int, Field(strict=True, ge=0, le=2 * 10**9), _integer]
Seed = Annotated[int, Field(strict=True, ge=0, le=LARGEST_SEED), _integer]
Samples = Annotated[int, Field(strict=True, ge=2, le=60_000), _integer]
BasePairs = Annotated[int, Field(strict=True, ge=1, le=10**10), _integer]
Threads = Annotated[int, Field(strict=True, ge=1, le=1024), _integer]  # OpenMP aborts the process long before 100 000
Workers = Annotated[int, Field(strict=True, ge=0, le=256), _integer]
Devices = Annotated[int, Field(strict=True, ge=0, le=1024), _integer]
Machines = Annotated[int, Field(strict=True, ge=1, le=10_000), _integer]

Number = Annotated[float, Field(strict=True, allow_inf_nan=False), _float]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0), _float]
NonNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0), _float]
Fraction = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1), _float]
PositiveRate = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=0.5), _float]
Rate = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=0.5), _float]

T = TypeVar("T")
Different = Annotated[list[T], Field(strict=True, json_schema_extra={"uniqueItems": True}), AfterValidator(_check_different)]
"""A list in which no value is repeated."""

NonEmpty = Annotated[
    list[T], Field(strict=True, min_length=1, json_schema_extra={"uniqueItems": True}), AfterValidator(_check_different)
]
"""The same, with at least one value."""
