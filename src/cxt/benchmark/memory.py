"""How much memory a piece of work takes at its peak."""

import os
from collections.abc import Callable

import torch


def measure_peak_memory(work: Callable[[], object], device: str) -> int:
    """Bytes of tensors at the peak of *work*: on a GPU of all that are held, on a CPU of those that *work* makes.

    The process's own memory tells little on a CPU: what is freed stays with the process for a while.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
