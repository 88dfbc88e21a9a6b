"""Safe reading of YAML: rejects duplicate keys, exponential anchors and non-YAML files."""

from pathlib import Path

import yaml

from cxt.errors import BadRequest

MAX_YAML_VALUES = 200_000
"""Largest number of values in a YAML file, counting aliases as often as they are used: a few nested ones expand to billions."""


def _check_keys(node: yaml.MappingNode) -> None:
    """BadRequest if a mapping has a duplicate key, of which PyYAML would silently use the last."""
    seen = set()
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:str":
            if key.value in seen:
                line = key.start_mark.line + 1
                raise BadRequest(f"'{key.value}' is given twice in one mapping (line {line}); remove one of them")
            seen.add(key.value)


def _values_in(node, counted: dict[int, int | None]) -> int:
    """Number of values in a composed YAML *node*, counting aliases as often as they are used; also checks its keys."""
    if id(node) not in counted:
        counted[id(node)] = None  # being counted
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [part for pair in children for part in pair]
        counted[id(node)] = 1 + sum(_values_in(child, counted) for child in children)
    elif counted[id(node)] is None:
        raise yaml.YAMLError("an anchor that contains itself")
    return counted[id(node)]


def _parse_document(text: str):
    """Parse a YAML document; raises if its anchors contain themselves or expand to too many values."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values_in(node, {}) > MAX_YAML_VALUES:
            raise BadRequest(f"its anchors expand to more than {MAX_YAML_VALUES} values; write the values out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def parse_yaml(text: str):
    """Parse a YAML document of any kind, such as the value of a flag.

    Raises
    ------
    BadRequest
        If it is not valid YAML, has duplicate keys, or its anchors expand to more than 200 000 values.
    """
    try:
        return _parse_document(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # wrong dates, too deeply nested
        if isinstance(error, BadRequest):
            raise
        text = str(error).replace('in "<unicode string>", ', "")
        raise BadRequest(f"it is not valid YAML: {text}") from None


def read_yaml(path) -> dict:
    """The mapping in a YAML file; empty if the file holds only comments.

    Raises
    ------
    BadRequest
        If the file holds anything else, has duplicate keys, or its anchors expand to more than 200 000 values.
    """
    try:
        value = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path}: it is not valid YAML: {error}") from None
    except BadRequest as error:
        raise BadRequest(f"{path}: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest(f"{path} does not contain a mapping")
    return value
