"""Reading YAML that others wrote: keys given twice, knots of anchors, and files that are none are refused in one message."""

from pathlib import Path

import yaml

from cxt.errors import BadRequest

MAX_YAML_VALUES = 200_000
"""In a YAML file, those behind anchors counted each time they are used: a few nested anchors make billions of few lines."""


def _check_keys(node: yaml.MappingNode) -> None:
    """BadRequest if a mapping has a key twice, of which PyYAML would silently take the last."""
    seen = set()
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:str":
            if key.value in seen:
                line = key.start_mark.line + 1
                raise BadRequest(f"'{key.value}' is given twice in one mapping (line {line}); take one of the two away")
            seen.add(key.value)


def _values_in(node, counted: dict[int, int | None]) -> int:
    """Values that a composed YAML *node* stands for, those behind an anchor as often as it is used; checks its keys."""
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


def _parse_yaml(text: str):
    """What a YAML document says; BadRequest if its anchors contain themselves, or stand for more than can be meant."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values_in(node, {}) > MAX_YAML_VALUES:
            raise BadRequest(f"its anchors stand for more than {MAX_YAML_VALUES} values; write out what is meant")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def read_yaml(path) -> dict:
    """The mapping in a YAML file, an empty one if it holds comments only.

    Raises
    ------
    BadRequest
        If it holds something else, a key is given twice, or its anchors stand for more than 200 000 values.
    """
    try:
        value = _parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # no text, no dates, and knots
        if isinstance(error, BadRequest):
            raise BadRequest(f"{path}: {error}") from None
        raise BadRequest(f"{path} is not valid YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest(f"{path} holds no mapping")
    return value
