"""Descriptions of types for messages and documentation."""

import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from cxt.config.bounds import MAX_COUNT


class Expected(str):
    """Description of a type, in its metadata."""


def split_type(annotation: Any) -> tuple[Any, list]:
    """Split a type into the bare type and its metadata."""
    if get_origin(annotation) is Annotated:
        bare, *metadata = get_args(annotation)
        inner, more = split_type(bare)
        return inner, [
            *more,
            *(item for given in metadata for item in (given.metadata if isinstance(given, FieldInfo) else [given])),
        ]
    if isinstance(annotation, FieldInfo):
        inner, more = split_type(annotation.annotation)
        return inner, [*more, *annotation.metadata]
    return annotation, []


def list_union_members(annotation: Any) -> list:
    """The types of a union, without None; for any other type, the type alone."""
    bare, _ = split_type(annotation)
    if get_origin(bare) in (Union, types.UnionType):
        return [member for member in get_args(bare) if member is not type(None)]
    return [annotation]


def list_choices(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal type; empty for other types."""
    bare, _ = split_type(list_union_members(annotation)[0])
    return get_args(bare) if get_origin(bare) is Literal else ()


class Limits(NamedTuple):
    """Bounds of a number."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int | None = None


def get_limits(annotation: Any) -> Limits:
    """The bounds in the metadata of a number's type."""
    _, metadata = split_type(annotation)
    return Limits(**{
        name: getattr(item, name)
        for item in metadata
        if isinstance(item, annotated_types.Ge | annotated_types.Gt | annotated_types.Le | annotated_types.Lt
                      | annotated_types.MultipleOf)
        for name in Limits._fields if hasattr(item, name)
    })  # fmt: skip


def _number_in_words(noun: str, limits: Limits, *, show_max_count: bool) -> str:
    low = limits.ge if limits.gt is None else limits.gt
    high = limits.le if limits.lt is None else limits.lt
    if high is not None and high >= MAX_COUNT and not show_max_count:
        high = None
    article = "an" if noun[0] in "aeiou" else "a"
    if limits.multiple_of is not None:
        return f"a multiple of {limits.multiple_of} (at least {low})"
    if low is None:
        return f"{article} {noun}"
    if high is None:
        if low == 0:
            return f"a positive {noun}" if limits.ge is None else f"a non-negative {noun}"
        return f"a positive {noun}" if noun == "integer" and low == 1 else f"{article} {noun}, at least {low}"
    if noun == "integer":
        return f"an integer from {low} to {high}"
    return f"a number in {'[' if limits.gt is None else '('}{low}, {high}{']' if limits.lt is None else ')'}"


def describe_type(annotation: Any, *, show_max_count: bool = False) -> str:
    """Describe the values that a type accepts; *show_max_count* includes upper limits of 10^9 and more."""
    bare, metadata = split_type(annotation)
    for item in metadata:
        if isinstance(item, Expected):
            return str(item)
    first, *others = list_union_members(annotation)
    if others:
        word = "a list of distinct values" if get_origin(split_type(others[0])[0]) is list else describe_type(others[0])
        return f"{describe_type(first, show_max_count=show_max_count)}, or {word}"
    if first is not annotation:  # an optional type
        return describe_type(first, show_max_count=show_max_count)
    bare, _ = split_type(first)
    if get_origin(bare) is Literal:
        choices = get_args(bare)
        return f"'{choices[0]}'" if len(choices) == 1 else f"one of {', '.join(choices)}"
    if bare in (int, float):
        return _number_in_words("integer" if bare is int else "number", get_limits(first), show_max_count=show_max_count)
    if get_origin(bare) is list:
        return "a list"
    return {str: "text", bool: "true or false"}.get(bare, "a mapping")


def holds_text(annotation: Any) -> bool:
    """Whether a type accepts text, on its own or in a list."""
    bare, _ = split_type(annotation)
    if get_origin(bare) is list:
        return holds_text(get_args(bare)[0])
    inside = list_union_members(annotation)
    is_union = inside[0] is not annotation or len(inside) > 1  # also of a type and None
    return any(map(holds_text, inside)) if is_union else bare is str or get_origin(bare) is Literal
