"""References generated from the sections: config/README.md for people, config/config.schema.json for editors."""

import inspect
import json
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from cxt.config.configuration import Cluster, Configuration, Evaluation, Model, Resources
from cxt.config.datasets import Dataset, Mask
from cxt.config.learning import Adaptive, Contrast, Distillation, LossName, LossTerm, Masking, Noise, Optimizer, OptimizerName
from cxt.config.network import Adapter, Architecture, Lora
from cxt.config.regions import Regions
from cxt.config.scenarios import KIND_SECTIONS
from cxt.config.section import Section
from cxt.config.training import TrainingOverrides, TrainingSection
from cxt.config.translation import TranslationEntry
from cxt.config.type_descriptions import describe_type

INTRODUCTION = """\
# The configuration

`config.yaml` is the default, at laptop scale. `paper.yaml` is an overlay with the published scale; `paper_script.yaml` is
another one, to use on top of it, with what the published script specified but did not apply. `examples/` has examples of custom
scenarios. Use an overlay with `snakemake --configfile my.yaml …`: it is merged into the default key by key, lists are replaced
as a whole, and `null` removes a key or an entry. Put names that YAML does not read as text, such as `no` or `2024`, in quotes.

Editors with a YAML language server check and complete a file that begins with
`# yaml-language-server: $schema=config.schema.json` (the path is relative to the file).

This page is generated from the sections in `src/cxt/config` by `cxt schema > config/README.md`, and `config.schema.json` by
`cxt schema --json`."""

TITLES: dict[str, type[Section]] = {
    "Top level": Configuration,
    **{f"`scenarios.<name>` with `kind: {kind}`": section for kind, section in KIND_SECTIONS.items()},
    "`datasets.<name>`": Dataset,
    "`datasets.<name>.mask`": Mask,
    "`models.<name>`": Model,
    "`models.<name>.architecture`": Architecture,
    "`models.<name>.adapter`": Adapter,
    "`models.<name>.lora`": Lora,
    "`training`, and `models.<name>.training`": TrainingSection,
    "`training.losses`, each term": LossTerm,
    "`training.optimizer`": Optimizer,
    "`training.adaptive`": Adaptive,
    "`training.distill`": Distillation,
    "`training.noise`": Noise,
    "`training.regions`": Regions,
    "`training.masked`": Masking,
    "`training.contrastive`": Contrast,
    "`models.<name>.resources`": Resources,
    "`cluster`": Cluster,
    "`evaluation`": Evaluation,
    "`translate.<name>`": TranslationEntry,
}


def _in_one_line(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split())


def _default_in_words(section: type[Section], field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Optimizer):
        return f"`{field.default.name}`"
    if section.only_given or field.default is None or isinstance(field.default, Section):
        return ""
    return f"`{json.dumps(_as_plain(field.default))}`"


def _as_plain(default: Any) -> Any:
    """A default as it would be written in a file: sections by what differs from their own defaults."""
    if isinstance(default, Section):
        return default.model_dump(exclude_unset=True)
    return [_as_plain(item) for item in default] if isinstance(default, list) else default


def _order(item: tuple[str, FieldInfo]) -> tuple[bool, bool]:
    name, field = item
    return name != "kind", not field.is_required()


def tabulate(section: type[Section]) -> str:
    """A Markdown table of a section's keys, required ones first."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    fields = section.model_fields.items()
    for name, field in fields if section is Configuration else sorted(fields, key=_order):
        default = _default_in_words(section, field)
        rows.append(f"| `{name}` | {describe_type(field)} | {default} | {_in_one_line(field.description)} |")
    return "\n".join(rows)


def render_reference() -> str:
    """config/README.md: every key with its type, default and meaning."""
    parts = [INTRODUCTION]
    for title, section in TITLES.items():
        parts.append(f"## {title}")
        if section is not Configuration:
            parts.append("\n\n".join(map(_in_one_line, inspect.cleandoc(section.__doc__ or "").split("\n\n"))))
        parts.append(tabulate(section))
    return "\n\n".join(parts) + "\n"


class _PlainDefaults(GenerateJsonSchema):
    """Keeps defaults as they are written in the sections: pydantic would turn 3 into 3.0."""

    def encode_default(self, dft: Any) -> Any:
        return dft.resolved() if isinstance(dft, Section) else _as_plain(dft)


def _for_overlays(node: Any) -> Any:
    """Relax a JSON Schema for overlays: nothing is required, and `null` removes a key or an entry."""
    if isinstance(node, list):
        return [_for_overlays(child) for child in node]
    if not isinstance(node, dict):
        return node
    result = {}
    for key, value in node.items():
        if key in ("required", "discriminator") or (key == "title" and isinstance(value, str)):
            continue
        if key in ("properties", "patternProperties"):
            result[key] = {name: _nullable(_for_overlays(child)) for name, child in value.items()}
            result.setdefault("additionalProperties", False)
        elif key == "$defs":
            result[key] = {name: _for_overlays(child) for name, child in value.items()}
        elif key == "additionalProperties" and isinstance(value, dict):
            result[key] = _nullable(_for_overlays(value))
        elif key == "oneOf":  # an overlay's scenario without `kind` may match several kinds
            result["anyOf"] = _for_overlays(value)
        elif key == "description":
            result[key] = _in_one_line(value)
        else:
            result[key] = value if key in ("default", "enum", "const") else _for_overlays(value)
    return result


def _nullable(node: dict) -> dict:
    null = {"type": "null"}
    if "anyOf" in node:
        return node if null in node["anyOf"] else node | {"anyOf": [*node["anyOf"], null]}
    about = {key: node[key] for key in ("description", "default") if key in node}
    return about | {"anyOf": [{key: value for key, value in node.items() if key not in about}, null]}


def json_schema() -> str:
    """config/config.schema.json, which editors use to check configuration files."""
    schema = _for_overlays(Configuration.model_json_schema(schema_generator=_PlainDefaults))
    for section in (Architecture, TrainingOverrides):
        for node in schema["$defs"][section.__name__]["properties"].values():
            node.pop("default", None)
    for section in (TrainingSection, TrainingOverrides):
        for name, names in (("losses", LossName), ("optimizer", OptimizerName)):  # a name alone is accepted, too
            schema["$defs"][section.__name__]["properties"][name]["anyOf"].append({"enum": list(get_args(names))})
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "cxt configuration"} | schema
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
