"""Peak memory of one call, counted from the allocator's own events: resident size is far too coarse."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from jepa_kernels import _C


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes that the call holds at any moment beyond what was allocated before it.

    On a CPU torch tells of its own; the most in blocks of ours is added to that, as if both were at one moment.
    What waits in blocks between calls (jepa_kernels.empty_cache) is not counted, nor is what malloc keeps for torch.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _C.reset_most_held()
    before = _C.block_bytes()["held"]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    in_blocks = _C.block_bytes()["most_held"] - before
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak + in_blocks


def peaks_and_seconds(
    functions: dict[str, Callable[[], object]], device: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Of one call each, which also warms what is slow enough to be called a few times only."""
    peaks, seconds = {}, {}
    for name, function in functions.items():
        started = time.perf_counter()
        peaks[name] = peak_bytes(function, device)
        seconds[name] = time.perf_counter() - started
    return peaks, seconds
