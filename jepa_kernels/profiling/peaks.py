"""What this machine was seen to do at best: bandwidth in GB/s, arithmetic in GFLOP/s. The roofs of every roofline."""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from jepa_kernels._core import extension
from jepa_kernels.cost import Cost
from jepa_kernels.profiling.clock import Clock

GEMM = 2048  # rows, columns and depth of the matrix product; on a GPU 4 times that
LONG_ENOUGH_S = 0.02
BANDWIDTHS = ("copy_gbs", "read_gbs", "rmw_gbs")


class Floor(NamedTuple):
    """The least time that a call takes here, and the roof that says so: its unit and rate."""

    seconds: float
    of: str
    rate: float


def cpu(threads: int, quick: bool = False) -> dict[str, Any]:
    """Measured in C++; matrix products through torch.mm.

    copy_gbs is the better of plain and streaming stores, counting bytes read and written; rmw_gbs counts both too.
    """
    module: Any = extension.load()
    passes = 4 if quick else 10
    rates = {name: round(rate, 2) for name, rate in module.peaks_bandwidth(threads, passes).items()}
    return {
        "copy_gbs": max(rates["copy_plain_gbs"], rates["copy_streamed_gbs"]),
        **rates,
        "fma_gflops": {
            "float32": round(module.peaks_fma_gflops(False, threads, passes), 1),
            "bfloat16": round(module.peaks_fma_gflops(True, threads, passes), 1),
        },
        "gemm_gflops": {d: round(gemm_gflops(d, 2 if quick else 4), 1) for d in ("float32", "bfloat16")},
    }


def gemm_gflops(dtype: str, passes: int) -> float:
    """The rate of the largest product up to GEMM: where a dtype has no fast path, that one alone takes a minute."""
    size, seconds = GEMM // 16, 0.0
    while seconds < LONG_ENOUGH_S and size < GEMM:
        size *= 2
        seconds = _product_seconds(size, dtype, "cpu", 1)
    return 2 * size**3 / min(seconds, _product_seconds(size, dtype, "cpu", passes)) / 1e9


def _product_seconds(size: int, dtype: str, device: str, passes: int) -> float:
    draw = torch.Generator(device).manual_seed(0)  # nothing is drawn from the global state
    a, b = (torch.randn(size, size, generator=draw, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return _seconds(lambda: torch.mm(a, b), device, passes)


def by_torch(device: str, quick: bool = False) -> dict[str, Any]:
    """The same figures through torch: of a GPU, or of a processor without our C++; arithmetic is that of a product."""
    a, b = (torch.zeros(1 << (28 if device == "cuda" else 25), device=device) for _ in range(2))
    gigabytes, passes = a.numel() * a.element_size() / 1e9, 4 if quick else 10
    if device == "cuda":
        size, dtypes = 4 * GEMM, ("float32", "bfloat16", "float16")
        gemm = {d: round(2 * size**3 / _product_seconds(size, d, device, passes) / 1e9, 1) for d in dtypes}
    else:
        gemm = {d: round(gemm_gflops(d, 2), 1) for d in ("float32", "bfloat16")}
    return {
        "copy_gbs": round(2 * gigabytes / _seconds(lambda: b.copy_(a), device, passes), 1),
        "read_gbs": round(gigabytes / _seconds(a.sum, device, passes), 1),
        "rmw_gbs": round(2 * gigabytes / _seconds(lambda: a.mul_(0.5), device, passes), 1),
        "fma_gflops": gemm,
        "gemm_gflops": gemm,
    }


def _seconds(function: Callable[[], object], device: str, passes: int = 10) -> float:
    clock = Clock(device)
    if device == "cuda":
        function()
    return min(clock(function, 1) for _ in range(passes))


def measured(device: str, threads: int, quick: bool = False) -> dict[str, Any]:
    """Of a device as this process uses it, by what there is to measure it with."""
    with torch.no_grad():
        built = device == "cpu" and isinstance(extension.load(), ModuleType)
        return cpu(threads, quick) if built else by_torch(device, quick)


@lru_cache
def of(device: str, threads: int) -> dict[str, Any]:
    """Measured once a process, in about two seconds."""
    return measured(device, threads, quick=True)


def floor(cost: Cost, dtype: str, peaks: dict[str, Any]) -> Floor:
    """The greater of bytes at the bandwidth and FLOPs at the fastest arithmetic of the dtype that was seen."""
    memory = max(peaks[name] for name in BANDWIDTHS)
    arithmetic = max(peaks[kind].get(dtype) or peaks[kind]["float32"] for kind in ("fma_gflops", "gemm_gflops"))
    seconds = cost.bytes / memory / 1e9, cost.flops / arithmetic / 1e9
    return Floor(seconds[0], "GB/s", memory) if seconds[0] >= seconds[1] else Floor(seconds[1], "GFLOP/s", arithmetic)
