"""Checks of a translation against its checkpoint and its data."""

import os
from pathlib import Path

import cxt
from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.load import checkpoint_directories
from cxt.config.translation import Translation
from cxt.errors import BadRequest
from cxt.io import canonical_json
from cxt.model.inputs import reads_missingness
from cxt.model.transformer import CoalescenceModel
from cxt.translation.calibration import Method

FILES = ("input", "populations", "mask", "samples", "pairs", "ancestral")
"""Settings that are files, or may be."""


def choose_calibration(request: Translation, model: CoalescenceModel) -> Method:
    """The method of calibration. `auto`: none for a network that is given the mutation rate, and else by diversity."""
    if request.calibration != "auto":
        return request.calibration
    return "none" if request.mutation_rate is None or model.config.reads_rates else "diversity"


def identify(request: Translation, checkpoint_sha256: str) -> str:
    """Canonical JSON of the settings and of the state of the files: two requests with the same text have the same tracks."""
    values = request.resolved() | {"checkpoint": checkpoint_sha256, "version": cxt.__version__}
    for key in FILES:
        if isinstance(path := values.get(key), str) and os.path.exists(path):
            values[f"{key} file"] = describe_file(path)
    return canonical_json(values)


def describe_file(path) -> list:
    """Absolute path, size and time of change of a file, or of the newest file in a directory."""
    path = Path(path)
    files = [path] if not path.is_dir() else [Path(root, name) for root, _, names in os.walk(path) for name in names]
    states = [file.stat() for file in files]
    return [str(path.absolute()), sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)]


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
    """Name, and number of haplotypes, of each checkpoint that `cxt.load_model` finds by its name; the largest first."""
    found: dict[str, int] = {}
    for path in (path for directory in checkpoint_directories() for path in sorted(directory.glob("*.ckpt"))):
        try:
            checkpoint = read_checkpoint(path)
        except BadRequest:
            continue  # damaged, or something else: no candidate
        samples = (checkpoint.model if checkpoint.adapter is None else checkpoint.adapter).samples
        found.setdefault(path.stem, samples)
    return sorted(found.items(), key=lambda item: -item[1])


def describe_time_scale(model: CoalescenceModel, request: Translation, method: Method) -> str:
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


def check_short_contig(model: CoalescenceModel, *, contig: str, windows: int, name) -> None:
    """BadRequest for a contig that is shorter than what the network reads, unless it reads missingness."""
    if windows < model.shortest_region and not reads_missingness(model):
        fewest = f"at least {model.shortest_region}" if model.shortest_region < model.config.windows else model.config.windows
        raise BadRequest(
            f"contig {contig} has {windows} windows of {model.config.window_size} bp, but checkpoint {name} reads {fewest}; "
            "use a checkpoint that reads missing data, which may read beyond the end of a contig, or leave the contig out"
        )


def count_read_windows(model: CoalescenceModel, windows: int) -> int:
    """Windows of a contig of *windows* windows that the network reads at once.

    A network that reads missingness reads beyond the end of a short contig, where all is missing.
    """
    return model.config.windows if reads_missingness(model) else min(model.config.windows, windows)
