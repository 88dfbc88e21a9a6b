"""Messages about everything that is wrong with a configuration or with settings, from pydantic's validation errors."""

import datetime
import math
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cxt.config.bounds import MAX_COUNT, NUMBER
from cxt.config.type_descriptions import describe_type, holds_text, list_choices, list_union_members, split_type
from cxt.errors import BadRequest, suggest_nearest


def refuse(problems: list[str]) -> None:
    """Raise one BadRequest with all *problems*, if there are any."""
    if problems:
        raise BadRequest("\n  ".join(["not a valid request:", *problems] if len(problems) > 1 else problems))


def _shorten_repr(value: Any) -> str:
    """*value* for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _advise_quotes(value: Any) -> str:
    """Advice on a name that YAML does not read as text."""
    if isinstance(value, list):
        value = next((item for item in value if not isinstance(item, str)), "")
    if isinstance(value, bool | int | float | datetime.date):
        return f" (YAML reads no, on, 2024 and the like as {type(value).__name__}: put the name in quotes)"
    return ""


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _parse_number_text(annotation: Any, value: Any) -> Any:
    """*value* as it was interpreted: text of a file that spells a number is converted where a number is accepted."""
    kinds = {split_type(member)[0] for member in list_union_members(annotation)}
    if isinstance(value, str) and kinds & {int, float} and NUMBER.fullmatch(value):
        return int(value) if value.lstrip("+-").isdigit() else float(value)
    return value


class _Place(NamedTuple):
    """Where a problem is: its path, the value there, the accepted type, and whether it is the name of an entry.

    *section* is the one whose key it is, and *outer* that around it.
    """

    path: str
    value: Any
    annotation: Any
    is_name: bool
    section: type[BaseModel] | None
    outer: type[BaseModel] | None = None


MISSING: Any = object()


def _find_key(values: Any, part: Any) -> Any:
    """The key for a part of pydantic's location, which is text or an integer: 0 for False."""
    return next((key for key in values if key == part or str(key) == str(part)), part) if isinstance(values, dict) else part


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _place(section: type[BaseModel], loc: tuple, value: Any, at: str) -> _Place:
    """Follow pydantic's location of a problem to the key in the file."""
    annotation: Any = section
    path = at
    outer: type[BaseModel] | None = None
    parts = list(loc)
    while parts:
        sections = [kind for member in list_union_members(annotation) if _is_section(kind := split_type(member)[0])]
        bare = split_type(list_union_members(annotation)[0])[0]
        part = _find_key(value, parts[0])
        if len(sections) > 1:  # a union of kinds, where the part of the location is the kind
            by_kind = {get_args(split_type(kind.model_fields["kind"])[0])[0]: kind for kind in sections}
            annotation = by_kind[parts[0]]
            parts.pop(0)
        elif sections:
            known = sections[0].model_fields.get(part)
            path = f"{path}.{part}" if path else str(part)
            if known is None:
                return _Place(path, value, None, False, sections[0], outer)
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
            annotation, outer = known, sections[0]
            parts.pop(0)
        elif get_origin(bare) is dict:
            outer = None  # its keys are names
            if parts[1:] == ["[key]"]:
                return _Place(path, part, get_args(bare)[0], True, None)
            path = f"{path}.{part}" if path else str(part)
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
            annotation = get_args(bare)[1]
            parts.pop(0)
        elif get_origin(bare) is list and _is_section(split_type(get_args(bare)[0])[0]) and isinstance(parts[0], int):
            path = f"{path}.{parts[0]}"
            value = value[parts[0]] if isinstance(value, list) and parts[0] < len(value) else MISSING
            annotation = get_args(bare)[0]
            parts.pop(0)
        else:
            break
    owner = split_type(list_union_members(annotation)[0])[0]
    return _Place(path, value, annotation, False, owner if _is_section(owner) else None)


NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+]{0,99}$"
"""Names of a scenario, dataset, model, ensemble or translation."""

NAME_ADVICE = (
    "a name must start with a letter or digit and contain only letters, digits, '_', '.' and '+', at most 100 characters"
)


def explain(section: type[BaseModel], error: ValidationError, values: Any, at: str) -> list[str]:
    """Describe everything that is wrong, one line for each key."""
    return list(dict.fromkeys(_explain_detail(section, detail, values, at) for detail in error.errors(include_url=False)))


def _explain_detail(section: type[BaseModel], detail: Any, values: Any, at: str) -> str:
    """Describe one of pydantic's errors in the *values* of a section."""
    kind, loc = detail["type"], detail["loc"]
    place = _place(section, loc[:-1] if kind == "missing" else loc, values, at)
    path = place.path or "config"
    if place.value is MISSING:  # a validator has changed the value before
        place = place._replace(value=detail["input"])
    if kind == "missing":
        assert place.section is not None
        return f"{path}: `{loc[-1]}` is missing ({place.section.model_fields[str(loc[-1])].description})"
    if kind in ("extra_forbidden", "invalid_key"):
        assert place.section is not None
        advice = _advise_quotes(loc[-1]) or _say_where(place) or suggest_nearest(str(loc[-1]), place.section.model_fields)
        return f"{place.path}: unknown key{advice}"
    if place.is_name and not isinstance(place.value, str):
        return f"{path}: the name {place.value!r} must be text{_advise_quotes(place.value)}"
    if place.is_name:
        return f"{path}: {_shorten_repr(place.value)}: {NAME_ADVICE}"
    if kind == "union_tag_invalid" and isinstance(place.value["kind"], str):
        kinds = detail["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{path}.kind: unknown kind '{place.value['kind']}'{suggest_nearest(place.value['kind'], kinds)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        kinds = [get_args(split_type(member.model_fields["kind"])[0])[0] for member in list_union_members(place.annotation)]
        return f"{path}: `kind` must be one of {', '.join(sorted(kinds))}"
    if kind == "value_error" and isinstance(detail["ctx"]["error"], BadRequest):
        return f"{path}: {detail['ctx']['error']}" if place.path else str(detail["ctx"]["error"])
    if place.path.endswith(".name") and isinstance(place.value, str):
        return f"unknown {place.path} '{place.value}'{suggest_nearest(place.value, list_choices(place.annotation))}"
    return _must_be(path, place, _parse_number_text(place.annotation, place.value))


def _list_subsections(section: type[BaseModel], key: str) -> list[str]:
    """The keys of *section* whose values are sections with a *key*."""
    found = []
    for name, field in section.model_fields.items():
        kinds = [split_type(member)[0] for member in list_union_members(field)]
        if any(_is_section(kind) and key in kind.model_fields for kind in kinds):
            found.append(f"`{name}`")
    return found


def _say_where(place: _Place) -> str:
    """In which section near by an unknown key is known, as the end of a message; empty if in none."""
    *_, inner, key = [None, *place.path.split(".")]
    assert place.section is not None
    if below := _list_subsections(place.section, key):
        return f"; it is a key of {' and '.join(below)}"
    if place.outer is None:
        return ""
    if key in place.outer.model_fields:
        return f"; it belongs beside `{inner}`, not in it"
    beside = _list_subsections(place.outer, key)
    return f"; it is a key of {' and '.join(beside)}, beside `{inner}`" if beside else ""


def _must_be(name: str, place: _Place, value: Any) -> str:
    """Describe a wrong *value*, as `"lr must be a positive number, got -1"`."""
    quotes = _advise_quotes(_parse_number_text(place.annotation, place.value)) if holds_text(place.annotation) else ""
    return f"{name} must be {_expected(place)}, got {_shorten_repr(value)}{quotes or _did_you_mean(place.annotation, value)}"


def _did_you_mean(annotation: Any, value: Any) -> str:
    """The choice that a misspelt word is similar to, if there is one; the message lists all of them already."""
    choices = list_choices(annotation) if isinstance(value, str) else ()
    nearest = suggest_nearest(value, choices) if choices else ""
    return nearest if nearest.startswith("; did you mean") else ""


def _expected(place: _Place) -> str:
    value = _parse_number_text(place.annotation, place.value)
    is_large = isinstance(value, int | float) and value > MAX_COUNT
    words = describe_type(place.annotation, show_max_count=is_large)
    if not _is_finite(value):
        words = words.replace("a ", "a finite ", 1) if isinstance(value, float) else f"{words}, with finite values"
    return words


def explain_settings(section: type[BaseModel], error: ValidationError, values: dict) -> list[str]:
    """Describe everything that is wrong with the keyword arguments of a settings object."""
    lines: dict[str, None] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "value_error" and not detail["loc"]:
            lines[str(detail["ctx"]["error"])] = None
            continue
        name = str(detail["loc"][0])
        is_explained = detail["type"] == "value_error" and isinstance(detail["ctx"]["error"], BadRequest)
        if len(detail["loc"]) > 1 or is_explained:
            lines[_explain_detail(section, detail, values, "")] = None
        elif name not in section.model_fields:
            lines[f"unknown setting '{name}'{suggest_nearest(name, section.model_fields)}"] = None
        else:
            lines[explain_value(name, section.model_fields[name], values[name])] = None
    return list(lines)


def explain_value(name: str, annotation: Any, value: Any) -> str:
    """Describe a wrong value of *name*, as `"lr must be a positive number, got -1"`."""
    bare, _ = split_type(annotation)
    if get_origin(bare) is Literal and isinstance(value, str):
        return f"unknown {name} '{value}'{suggest_nearest(value, get_args(bare))}"
    return _must_be(name, _Place(name, value, annotation, False, None), value)
