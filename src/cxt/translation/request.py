"""What a translation was asked for, checked before work starts."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from cxt.checkpoints.load import checkpoint_directories, find_checkpoint
from cxt.config.learning import choose_reading
from cxt.errors import BadRequest
from cxt.io import canonical_json
from cxt.model.inputs import reads_missingness
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import check_seed
from cxt.translation.calibration import Method

CALIBRATIONS = ("auto", "none", "diversity", "gamma")

MASK_MARKS = ("accessible", "inaccessible")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that the tracks depend on, apart from the bytes of the files.

    The fields are the parameters of `cxt.translate`.
    """

    input: str
    model: str
    regions: tuple[str, ...] = ()
    samples: tuple[str, ...] | str | None = None
    populations: str | None = None
    pairs: str = "within-individual"
    assume_phased: bool = False
    mask: str | None = None
    mask_marks: Literal["accessible", "inaccessible"] | None = None
    ancestral: str = "auto"
    mutation_rate: float | None = None
    recombination_rate: float | None = None
    generation_time: float | None = None
    calibration: str = "auto"
    reading: str | None = None
    replicates: int = 15
    panels: int = 1
    min_accessible: float = 0.25
    max_gap: int | None = None
    flank: int | None = None
    seed: int = 0

    def check(self) -> None:
        """BadRequest for a setting that is not valid, or two that do not go together."""
        check_seed(self.seed)
        for name in ("mutation_rate", "generation_time"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise BadRequest(f"{name} must be a positive number, got {value!r}")
        if self.mutation_rate is not None and self.mutation_rate > 1e-3:
            raise BadRequest(f"mutation_rate must be per base pair and generation, such as 1.25e-8, got {self.mutation_rate:g}")
        if self.recombination_rate is not None and not 0 <= self.recombination_rate <= 0.5:
            raise BadRequest(
                f"recombination_rate must be from 0 to 0.5 per base pair and generation, got {self.recombination_rate}"
            )
        for name in ("replicates", "panels"):
            if getattr(self, name) < 1:
                raise BadRequest(f"{name} must be a positive whole number, got {getattr(self, name)}")
        if not 0 <= self.min_accessible <= 1:
            raise BadRequest(f"min_accessible must be from 0 to 1, got {self.min_accessible}")
        if self.max_gap is not None and self.max_gap < 0:
            raise BadRequest(f"max_gap must be at least 0 bp, got {self.max_gap}")
        if self.calibration not in CALIBRATIONS:
            raise BadRequest(f"calibration must be one of {', '.join(CALIBRATIONS)}, got '{self.calibration}'")
        if self.calibration in ("diversity", "gamma") and self.mutation_rate is None:
            raise BadRequest(f"calibration '{self.calibration}' needs the mutation rate: give mutation_rate, too")
        if self.generation_time is not None and self.mutation_rate is None:
            raise BadRequest(
                "generation_time converts generations to years, which needs times on the scale of your species: give "
                "mutation_rate, too"
            )
        if self.mask is not None and self.mask_marks not in MASK_MARKS:
            raise BadRequest(
                f"mask {self.mask}: say what its intervals (or true values) mean: mask_marks must be one of "
                f"{', '.join(MASK_MARKS)}{'' if self.mask_marks is None else f', got {self.mask_marks!r}'}"
            )
        if self.mask is None and self.mask_marks is not None:
            raise BadRequest("mask_marks cannot be used without mask")

    def choose_calibration(self, model: CoalescenceModel) -> Method:
        """The method of calibration. `auto`: none for a network that is given the mutation rate, and else by diversity."""
        if self.calibration != "auto":
            return self.calibration  # pyright: ignore[reportReturnType]
        return "none" if self.mutation_rate is None or model.config.reads_rates else "diversity"

    def identify(self, checkpoint_sha256: str) -> str:
        """Canonical JSON of the settings and of the files: two requests with the same text have the same tracks."""
        values = dataclasses.asdict(self) | {"checkpoint": checkpoint_sha256}
        for key in ("input", "populations", "mask"):
            if values[key] is not None:
                values[f"{key}_file"] = describe_file(values[key])
        return canonical_json(values)


def describe_file(path) -> list:
    """Absolute path, size and time of change of a file, or of the newest file in a directory."""
    path = Path(path)
    files = [path] if not path.is_dir() else [Path(root, name) for root, _, names in os.walk(path) for name in names]
    states = [file.stat() for file in files]
    return [str(path.absolute()), sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)]


def check_model(model: CoalescenceModel, request: Request, *, name) -> None:
    """BadRequest if the network cannot be read as requested."""
    choose_reading(model.objective, request.reading, name=f"checkpoint {name}")


def check_haplotypes(model: CoalescenceModel, found: int, *, where: str, name) -> None:
    """BadRequest if there are fewer haplotypes than the network reads; the message names a checkpoint that reads fewer."""
    if found >= model.samples:
        return
    others = []
    for other, samples in list_checkpoints():
        if samples <= found and other != str(name):
            others.append(f"{other} ({samples})")
    advice = (
        f"use a checkpoint that reads fewer: {', '.join(others)}"
        if others
        else f"none of the checkpoints here reads {found} or fewer; train one: a dataset with `samples: {found}`, and a model "
        "with `adapter: {}` and `checkpoint:` this one"
    )
    raise BadRequest(f"checkpoint {name} reads {model.samples} haplotypes, but {where} has {found}; {advice}")


def list_checkpoints() -> list[tuple[str, int]]:
    """Name, and number of haplotypes, of each checkpoint that `cxt.load_model` finds by its name."""
    from cxt.checkpoints.file import read_checkpoint

    found: dict[str, int] = {}
    for directory in checkpoint_directories():
        for path in sorted(directory.glob("*.ckpt")):
            if path.stem not in found:
                try:
                    checkpoint = read_checkpoint(find_checkpoint(path))
                except BadRequest:
                    continue  # damaged, or no checkpoint: no candidate
                samples = checkpoint.model.samples if checkpoint.adapter is None else checkpoint.adapter.samples
                found[path.stem] = samples
    return sorted(found.items(), key=lambda item: -item[1])


def describe_time_scale(model: CoalescenceModel, request: Request, method: Method) -> str:
    """Say what the times of the output rest on."""
    if request.mutation_rate is None:
        return "generations at the mutation rates of the training scenarios (no mutation rate was given)"
    by = {
        "none": "given to the network" if model.config.reads_rates else "not used (calibration: none)",
        "diversity": "each pair's times are multiplied so that they imply the differences observed on the contig",
        "gamma": "each pair's times are multiplied by a draw given the differences observed on the contig",
    }[method]
    if method != "none" and model.config.reads_rates:
        by = f"given to the network, and {by}"
    return f"generations at a mutation rate of {request.mutation_rate:g} per bp and generation: {by}"


def needs_padding(model: CoalescenceModel, windows: int) -> bool:
    """Whether a contig of *windows* windows is shorter than what the network reads."""
    return windows < model.config.windows


def check_short_contig(model: CoalescenceModel, *, contig: str, windows: int, name) -> None:
    """BadRequest for a contig that is shorter than what the network reads, unless it reads missingness."""
    config = model.config
    if needs_padding(model, windows) and not reads_missingness(model):
        raise BadRequest(
            f"contig {contig} has {windows} windows of {config.window_size} bp, but checkpoint {name} reads {config.windows}; "
            "use a checkpoint that reads missing data, which may read beyond the end of a contig, or leave the contig out"
        )
