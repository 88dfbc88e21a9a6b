"""JSON as every reader understands it: what is not a finite number is null, where Python alone would write NaN."""

import json
import math


def without_nan(value):
    """*value* with None for each float that is NaN or infinite, at any depth of mappings, lists and tuples."""
    if isinstance(value, dict):
        return {key: without_nan(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value, *, indent: int | None = 1, sort_keys: bool = False) -> str:
    """*value* as strict JSON with a newline at its end; NaN and infinities become null."""
    return json.dumps(without_nan(value), indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n"
