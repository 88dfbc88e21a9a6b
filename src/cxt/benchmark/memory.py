"""Measuring peak memory."""

import os
from collections.abc import Callable

import torch


def measure_peak_memory(work: Callable[[], object], device: str) -> int:
    """Peak memory of tensors during *work*, in bytes: on a GPU of all tensors, on a CPU of those that *work* allocates.

    On a CPU, the memory of the process is not a good measure, because freed memory stays with the process for a while.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
