"""Seconds per call of a function, on the CPU and on a GPU."""

import time
from collections.abc import Callable

import torch

Function = Callable[[], object]
L2_FLUSH_BYTES = 256 << 20
HEAD_START_CYCLES = 2_000_000  # 1 ms: the host is then ahead of the GPU, as it is in training


class Clock:
    """Seconds per call, on the CPU by the wall clock, on a GPU by events, after the cache was flushed and
    while the host is ahead: the time of the kernels, without that of their launches."""

    def __init__(self, device: str = "cpu"):
        self.cuda = device == "cuda"
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def __call__(self, function: Function, calls: int) -> float:
        if self.cuda:
            return self._events(function, calls)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    def _events(self, function: Function, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            self.flush.zero_()  # type: ignore[union-attr]
            torch.cuda._sleep(HEAD_START_CYCLES)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end)
        return total / calls / 1e3
