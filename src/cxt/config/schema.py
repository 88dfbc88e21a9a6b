"""Check a configuration against the JSON Schema, fill in its defaults, and write its documentation.

`cxt schema > config/README.md` regenerates the reference of all keys.
"""

import datetime
import functools
import math
import re
from pathlib import Path

import jsonschema
import yaml

from cxt.errors import BadRequest, suggest_nearest

REPOSITORY = Path(__file__).resolve().parents[3]
SCHEMA_PATH = REPOSITORY / "workflow" / "schemas" / "config.schema.yaml"


@functools.cache
def load_schema() -> dict:
    """The configuration's schema, as a dict."""
    if not SCHEMA_PATH.exists():
        raise BadRequest(f"{SCHEMA_PATH} is not there: install cxt from its repository (`pip install -e .`)")
    return yaml.safe_load(SCHEMA_PATH.read_text(encoding="utf-8"))


def _resolve(node: dict) -> dict:
    """*node* with its `$ref` replaced by what it points to; keys beside the reference win."""
    while "$ref" in node:
        target = load_schema()
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target | {key: value for key, value in node.items() if key != "$ref"}
    return node


def _variant(node: dict, value: dict, path: str, errors: list[str]) -> dict | None:
    """The member of a discriminated `oneOf` that *value* asks for."""
    key = node["discriminator"]
    variants = {}
    for member in node["oneOf"]:
        member = _resolve(member)
        variants[member["properties"][key]["const"]] = member
    chosen = value.get(key) if isinstance(value, dict) else None
    if not isinstance(chosen, str):
        errors.append(f"{path}: has no `{key}`, expected one of {', '.join(sorted(variants))}")
        return None
    if chosen not in variants:
        errors.append(f"{path}.{key}: unknown {key} '{chosen}'{suggest_nearest(chosen, variants)}")
        return None
    return variants[chosen]


def _expected(node: dict) -> str:
    """What *node* accepts, in words."""
    if "expected" in node:
        return node["expected"]
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    if "const" in node:
        return repr(node["const"])
    words = {
        "integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
        "array": "a list", "object": "a mapping",
    }[node["type"]]  # fmt: skip
    limits = {
        "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
        "multipleOf": "a multiple of", "minItems": "with at least",
    }  # fmt: skip
    return " ".join([words, *(f"{text} {node[key]}" for key, text in limits.items() if key in node)])


def _is_list_of_mappings(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _types(node: dict) -> set[str]:
    """The types that *node* accepts, with those of what is in a list or a mapping."""
    node = _resolve(node)
    inside = [*node.get("oneOf", []), *node.get("properties", {}).values()]
    inside += [node[key] for key in ("items", "additionalProperties") if isinstance(node.get(key), dict)]
    own = {node["type"]} if "type" in node else set()
    return own.union(*map(_types, inside))


def _from_text(value, types: set[str]):
    """*value* with numbers and true or false in the place of text that says so, where *types* has them and no text.

    YAML reads `1e-8` as text, and so does Snakemake everything in `--config 'training={devices: 2}'`.
    """
    if isinstance(value, list):
        return [_from_text(item, types) for item in value]
    if isinstance(value, dict):
        return {key: _from_text(child, types) for key, child in value.items()}
    if not isinstance(value, str) or "string" in types:
        return value
    if types & {"integer", "number"} and NUMBER.fullmatch(value):
        return int(value) if value.lstrip("+-").isdigit() else float(value)
    if "boolean" in types and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def _found(value) -> str:
    """*value* as a message shows it: what is long is cut."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _quotes(value) -> str:
    """Advice for a name that YAML took for something else."""
    if isinstance(value, list):
        value = next((item for item in value if not isinstance(item, str)), "")
    if isinstance(value, bool | int | float | datetime.date):
        return f" (YAML reads no, on, 2024 and the like as {type(value).__name__}: put the name in quotes)"
    return ""


def _all_finite(value) -> bool:
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _complete(value, node: dict, path: str, errors: list[str], defaults: bool):
    node = _resolve(node)
    defaults = defaults and not node.get("withoutDefaults", False)
    if "discriminator" in node:
        node = _variant(node, value, path, errors)
        if node is None:
            return value
    if node.get("type") != "object":
        types = _types(node)
        value = _from_text(value, types)
        if node.get("type") == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1.0e+2
        if not node.get("mayBeInfinite") and not _all_finite(value):
            errors.append(f"{path}: found {_found(value)}, expected {_expected(node)}, and finite")
            return value
        error = jsonschema.Draft202012Validator({**node, "$defs": load_schema()["$defs"]})
        found = next(error.iter_errors(value), None)
        if found is not None:
            hint = _quotes(value) if "string" in types else ""
            errors.append(f"{path}: found {_found(value)}, expected {_expected(node)}{hint}")
        return value
    if not isinstance(value, dict):
        errors.append(f"{path}: found {_found(value)}, expected a mapping")
        return value
    properties = node.get("properties", {})
    open_to = node.get("additionalProperties")
    pattern = node.get("propertyNames")
    result = {}
    for key, child in value.items():
        where = f"{path}.{key}" if path else str(key)
        if key in properties:
            result[key] = _complete(child, properties[key], where, errors, defaults)
        elif isinstance(open_to, dict):
            if not isinstance(key, str):
                errors.append(f"{where}: found {key!r} as a name, expected text{_quotes(key)}")
            elif pattern and not jsonschema.Draft202012Validator(pattern).is_valid(key):
                errors.append(
                    f"{path}: {_found(key)}: a name may hold letters, digits, '_', '.', '+' (100 in all), and starts with a "
                    "letter or digit"
                )
            result[key] = _complete(child, open_to, where, errors, defaults)
        else:
            errors.append(f"{where}: unknown key{_quotes(key) or suggest_nearest(key, properties)}")
    rows = value.get("combinations")
    given = set.intersection(*(set(row) for row in rows)) if _is_list_of_mappings(rows) else set()
    for key in node.get("required", []):
        if key not in value and key not in given:
            errors.append(f"{path or 'config'}: `{key}` is missing ({_resolve(properties[key])['description']})")
    if defaults:
        for key, child in properties.items():
            child = _resolve(child)
            if key in result:
                continue
            if "default" in child:
                result[key] = child["default"]
            elif child.get("type") == "object" and not path:  # the sections; deeper objects are options in themselves
                result[key] = _complete({}, child, key, errors, defaults)
    return result


def complete(config: dict) -> dict:
    """*config* checked against the schema, with every default filled in.

    Raises
    ------
    BadRequest
        Names every unknown key (with the nearest valid one), missing key and wrong value at once.
    """
    errors: list[str] = []
    result = _complete(config, load_schema(), "", errors, True)
    if errors:
        raise BadRequest("the configuration is not valid:\n  " + "\n  ".join(errors))
    return result


def complete_part(value: dict, definition: str, *, leave_out=(), at: str) -> dict:
    """*value* checked against one definition of the schema, such as `dataset`, with its defaults filled in.

    Keys in *leave_out* are unknown here. *at* says in messages where the value came from.
    """
    node = load_schema()["$defs"][definition]
    node = node | {
        "properties": {key: child for key, child in node["properties"].items() if key not in leave_out},
        "required": [key for key in node.get("required", []) if key not in leave_out],
    }
    errors: list[str] = []
    result = _complete(value, node, at, errors, True)
    if errors:
        raise BadRequest("\n  ".join(["not a valid request:", *errors]))
    return result


def defaults_of(name: str) -> dict:
    """The defaults of the definition *name*, such as `training`."""
    return {
        key: _resolve(child)["default"]
        for key, child in load_schema()["$defs"][name]["properties"].items()
        if "default" in _resolve(child)
    }


def _rows(node: dict) -> list[str]:
    required = node.get("required", [])
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, child in node["properties"].items():
        child = _resolve(child)
        default = "required" if key in required else (f"`{child['default']}`" if "default" in child else "")
        rows.append(f"| `{key}` | {_expected(child)} | {default} | {child['description']} |")
    return rows


def document() -> str:
    """config/README.md: every key with its type, default and meaning."""
    schema = load_schema()
    out = [
        "# The configuration",
        "",
        "`config.yaml` is the default, at laptop scale; `paper.yaml` is an overlay with the published scale, and",
        "`paper_script.yaml` a second one, over that, with what the published script asked for but did not get. `examples/`",
        "has scenarios of your own. Use an overlay with `snakemake --configfile my.yaml …`: it is merged over the default key",
        "by key, lists are replaced whole, and `null` removes a key or an entry. A name that YAML takes for something else,",
        "such as `no` or `2024`, is put in quotes.",
        "",
        "This page is generated from `workflow/schemas/config.schema.yaml` by `cxt schema > config/README.md`.",
        "",
        "## Top level",
        "",
        *_rows(schema),
    ]
    titles = {
        "constant": "`scenarios.<name>` with `kind: constant`",
        "sawtooth": "`scenarios.<name>` with `kind: sawtooth`",
        "island": "`scenarios.<name>` with `kind: island`",
        "hard_sweep": "`scenarios.<name>` with `kind: hard_sweep`",
        "stdpopsim": "`scenarios.<name>` with `kind: stdpopsim`",
        "demes": "`scenarios.<name>` with `kind: demes`",
        "msprime": "`scenarios.<name>` with `kind: msprime`",
        "dataset": "`datasets.<name>`",
        "model": "`models.<name>`",
        "architecture": "`models.<name>.architecture`",
        "adapter": "`models.<name>.adapter`",
        "training": "`training`, and `models.<name>.training`",
        "evaluation": "`evaluation`",
    }
    for name, title in titles.items():
        node = schema["$defs"][name]
        out += ["", f"## {title}", ""]
        if "description" in node:
            out += [node["description"], ""]
        out += _rows(node)
        if name == "dataset":
            out += ["", "### `datasets.<name>.mask`", "", node["properties"]["mask"]["description"], ""]
            out += _rows(node["properties"]["mask"])
    return "\n".join(out) + "\n"
