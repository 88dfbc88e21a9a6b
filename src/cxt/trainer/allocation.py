"""The end of a Slurm allocation, before which a trainer has to save and stop."""

import os
import re
import subprocess
import time

from cxt.console import get_logger

logger = get_logger(__name__)

LEAST_MARGIN = 120
"""Seconds that are kept for saving at the end of an allocation; of a short one, at most a third of what is left."""


def parse_time_left(text: str) -> int | None:
    """Seconds of Slurm's `[days-][[hours:]minutes:]seconds`; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _ask_time_left(job: str) -> int | None:
    """Seconds until Slurm ends a job; None if it has no limit or cannot be asked."""
    try:
        done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(f"note: squeue does not say when job {job} ends ({type(error).__name__}); training does not stop before")
        return None
    return parse_time_left(done.stdout)


def find_allocation_end() -> float | None:
    """Time of `time.monotonic` at which a trainer in a Slurm allocation has to save and stop; None outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or (left := _ask_time_left(job)) is None:
        return None
    margin = min(max(LEAST_MARGIN, left / 20), left / 3)
    logger.info(f"Slurm job {job} ends in {left / 60:.0f} min: training saves and stops {margin / 60:.1f} min before")
    return time.monotonic() + left - margin
