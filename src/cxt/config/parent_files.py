"""Checkpoint files that a configuration names as parents or teachers of its models, in place of another model.

The configuration knows of such a file what its children inherit. Reading it needs torch, so that whoever resolves a
configuration passes the function that does (`cxt.checkpoints.parents.read_parent_file`).
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from cxt.config.collected import ProblemCollector, prefix_errors
from cxt.config.network import AdapterConfig, ModelConfig, TrainedModel
from cxt.lineage import RESULTS

SUFFIX = ".ckpt"

SECTION = "parent_files"
"""Section of a resolved configuration that describes the files, by their paths; there is none if no model names a file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParentFile:
    """What children inherit from a checkpoint file, and what they are checked against.

    Attributes
    ----------
    path : str
        The file or run directory as the configuration names it.
    file : str
        The file that holds the weights.
    sha256 : str
        Its digest, which is part of the lineages of its children.
    name : str
        Name of the model in it; for a file of the original package, of the architecture, since lineages must not depend on
        the name of a file.
    published : bool
        Whether it is a file of the original package.
    network, adapter : ModelConfig, AdapterConfig or None
        Its network and, if it has one, its adapter.
    scales : list of int
        Widths of its feature windows.
    objective : str
        What it was trained to predict.
    """

    path: str
    file: str
    sha256: str
    name: str
    published: bool
    network: ModelConfig
    adapter: AdapterConfig | None
    scales: list[int]
    objective: str

    @property
    def label(self) -> str:
        """Name of its copy below `results/parents/`, by its content."""
        name = re.sub(r"[^A-Za-z0-9_.+]", "_", self.name)[:60]
        return f"{name.lstrip('._+') or 'checkpoint'}-{self.sha256[:12]}"

    @property
    def trained_model(self) -> TrainedModel:
        """The properties that its children are checked against."""
        return TrainedModel(
            name=self.path,
            network=self.network,
            dataset=self.path,
            scales=self.scales,
            samples=self.network.samples if self.adapter is None else self.adapter.samples,
            has_missingness=not self.network.mask_singletons,
            has_adapter=self.adapter is not None,
        )

    def to_json(self) -> dict[str, Any]:
        """The description as JSON-able values."""
        adapter = None if self.adapter is None else self.adapter.model_dump()
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"network": self.network.model_dump(), "adapter": adapter}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ParentFile":
        """The inverse of `to_json`."""
        adapter = None if values["adapter"] is None else AdapterConfig(**values["adapter"])
        return cls(**values | {"network": ModelConfig(**values["network"]), "adapter": adapter})

    def describe(self) -> str:
        """Describe the file in a line."""
        network, kind = self.network, "published " if self.published else ""
        adapter = "" if self.adapter is None else f", adapter for {self.adapter.samples}"
        return (
            f"{self.path} ({kind}'{self.name}': {network.layers} blocks of width {network.width}, {network.windows} windows of "
            f"{network.window_size} bp, {network.samples} haplotypes{adapter}; sha256 {self.sha256[:12]})"
        )


def is_path(value: str) -> bool:
    """Whether the parent or teacher of a model is given by a path, and not by the name of another model."""
    return "/" in value or value.endswith(SUFFIX)


def fill_parent_files(config: dict, keys: Iterable[str], read: Callable[[str], ParentFile] | None) -> None:
    """Describe the files that models name as parents or teachers, in the section `SECTION` of the configuration.

    Parameters
    ----------
    config : the configuration, modified in place
    keys : keys of a model that may name a file
    read : reads a file; without it, files are refused

    Raises
    ------
    BadRequest
        Naming, for every file that is missing or cannot be a parent, the key that names it.
    """
    problems = ProblemCollector()
    made = {os.path.abspath(f"{RESULTS}/{name}{SUFFIX}"): name for name in config["models"]}
    for name, model in config["models"].items():
        for key in keys:
            path = model.get(key)
            if path is None or not is_path(path) or path in config.get(SECTION, {}):
                continue
            at = f"models.{name}.{key}"
            if (other := made.get(os.path.abspath(path))) is not None:
                problems.add(f"{at}: {path} is made by this configuration; name the model: `{key}: {other}`")
                continue
            if read is None:
                raise RuntimeError(f"{at} is a file, but the configuration was read without a function that reads it")
            with problems.collect(), prefix_errors(at):
                config.setdefault(SECTION, {})[path] = read(path).to_json()
    problems.refuse()


def list_parent_files(config: dict) -> list[ParentFile]:
    """The files that models of a resolved configuration start or learn from."""
    return [ParentFile.from_json(values) for values in config.get(SECTION, {}).values()]
