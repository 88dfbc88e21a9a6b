"""Finished evaluations, kept so that the same bytes are not evaluated twice.

Snakemake deletes the outputs of a job before it runs it again, also when the checkpoint turns out to be the same as before:
after a checkpoint was deleted, for example, or when a configuration is changed and changed back.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cxt.io import atomic_write, digest, file_sha256

FIGURES = ("-tracks.png", "-scatter.png", "-calibration.png")
"""Ends of the names of an evaluation's figures."""


def finished_directory(directory, *, lineage: str, checkpoints: Sequence, device: str, ensemble: str | None = None) -> Path:
    """Where the evaluation of one checkpoint's bytes, or those of the members of an ensemble, is kept.

    Parameters
    ----------
    directory : path-like
        Where all are kept.
    lineage : str
        Lineage of the evaluation: simulations, mask and settings.
    checkpoints : sequence of path-like
        The evaluated files.
    device : str
        Kind of device that decodes, `cpu` or `cuda`; they differ by rounding.
    ensemble : str, optional
        Name of the ensemble.
    """
    digests = [file_sha256(checkpoint) for checkpoint in checkpoints]
    identity = digest([lineage, digests[0] if ensemble is None else digests, device])
    return Path(directory) / f"{ensemble or Path(checkpoints[0]).stem}-{identity}"


def publish_finished(directory: Path, *, out, figures) -> bool:
    """Write the results kept in *directory* to *out* and the prefix *figures*; return False if there are none."""
    if not directory.is_dir():
        return False
    for end in FIGURES:
        atomic_write(f"{figures}{end}", (directory / f"figures{end}").read_bytes())
    atomic_write(out, (directory / "metrics.json").read_bytes())
    return True


def keep_finished(directory: Path, *, out, figures) -> None:
    """Keep the results *out* and those with the prefix *figures* in *directory*."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        temporary.chmod(0o755)  # as other directories of results
        shutil.copyfile(out, temporary / "metrics.json")
        for end in FIGURES:
            shutil.copyfile(f"{figures}{end}", temporary / f"figures{end}")
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
