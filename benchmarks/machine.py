"""Where numbers come from: the machine, its measured peaks, the commit and the versions."""

import contextlib
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from jepa_kernels import _C

ROOT = Path(__file__).resolve().parent.parent
GEMM = 2048  # rows, columns and depth of the matrix product
LONG_ENOUGH_S = 0.02
ENVIRONMENT = ("OMP_NUM_THREADS", "TORCH_", "TRITON_", "JEPA_", "KMP_", "GOMP_")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine(device: str, threads: int) -> dict[str, Any]:
    cpu = _file("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpu)
    memory = re.search(r"MemTotal:\s+(\d+)", _file("/proc/meminfo"))
    about: dict[str, Any] = {
        "cpu": found.group(1) if found else platform.processor(),
        "arch": platform.machine(),
        "cores": cores(),
        "threads": threads,
        "isa": _C.isa(),
        "l3": _file("/sys/devices/system/cpu/cpu0/cache/index3/size").strip() or None,
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
        "os": f"{platform.system()} {platform.release()}",
        "host": hashlib.sha256(platform.node().encode()).hexdigest()[:8],
        "load_before": os.getloadavg()[0],
        "gpu": None,
        "device": device,
        "env": {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)},
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        about["gpu"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "sms": p.multi_processor_count,
            "memory_bytes": p.total_memory,
        }
    return about


def line(about: dict[str, Any]) -> str:
    """The machine in one line."""
    gpu = f" · {about['gpu']['name']}" if about["gpu"] else ""
    return f"{about['cpu']} · {about['threads']} of {about['cores']} cores · {about['isa']}{gpu}"


def git() -> dict[str, Any]:
    """Of a copy without its repository: JEPA_COMMIT, the commit that it was taken from."""

    def run(*args: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            done = subprocess.run(["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True)
            return done.stdout.strip()
        return None

    changed = run("status", "--porcelain")
    return {
        "sha": run("rev-parse", "HEAD") or os.environ.get("JEPA_COMMIT"),
        "branch": run("rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "compiler": _C.build_info()["compiler"]}
    for name in ("jepa_kernels", "torch", "triton", "numpy", "pytest-benchmark"):
        try:
            found[name] = torch.__version__ if name == "torch" else metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    return found


def peaks(threads: int, quick: bool = False) -> dict[str, Any]:
    """Bandwidth in GB/s and arithmetic in GFLOP/s, measured in C++; matrix products through torch.mm.

    copy_gbs is the better of plain and streaming stores, counting bytes read and written; rmw_gbs counts both too.
    """
    passes = 4 if quick else 10
    rates = {name: round(rate, 2) for name, rate in _C.peaks_bandwidth(threads, passes).items()}
    return {
        "copy_gbs": max(rates["copy_plain_gbs"], rates["copy_streamed_gbs"]),
        **rates,
        "fma_gflops": {
            "float32": round(_C.peaks_fma_gflops(False, threads, passes), 1),
            "bfloat16": round(_C.peaks_fma_gflops(True, threads, passes), 1),
        },
        "gemm_gflops": {d: round(gemm_gflops(d, 2 if quick else 4), 1) for d in ("float32", "bfloat16")},
    }


def gemm_gflops(dtype: str, passes: int) -> float:
    """The rate of the largest product up to GEMM: where a dtype has no fast path, that one alone takes a minute."""
    size, seconds = GEMM // 16, 0.0
    while seconds < LONG_ENOUGH_S and size < GEMM:
        size *= 2
        seconds = _product_seconds(size, dtype, 1)
    return 2 * size**3 / min(seconds, _product_seconds(size, dtype, passes)) / 1e9


def _product_seconds(size: int, dtype: str, passes: int) -> float:
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    return min(timing.Clock()(lambda: torch.mm(a, b), 1) for _ in range(passes))


def gpu_peaks() -> dict[str, Any]:
    """The same figures of the GPU, through torch; its arithmetic peak is the rate of a large matrix product."""
    a, b = (torch.zeros(1 << 28, device="cuda") for _ in range(2))
    gigabytes = a.numel() * a.element_size() / 1e9
    gemm = {d: round(_gpu_rate(d), 1) for d in ("float32", "bfloat16", "float16")}
    return {
        "copy_gbs": round(2 * gigabytes / _gpu_seconds(lambda: b.copy_(a)), 1),
        "read_gbs": round(gigabytes / _gpu_seconds(a.sum), 1),
        "rmw_gbs": round(2 * gigabytes / _gpu_seconds(lambda: a.mul_(0.5)), 1),
        "fma_gflops": gemm,
        "gemm_gflops": gemm,
    }


def _gpu_rate(dtype: str) -> float:
    a, b = (torch.randn(4 * GEMM, 4 * GEMM, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    return 2 * (4 * GEMM) ** 3 / _gpu_seconds(lambda: torch.mm(a, b)) / 1e9


def _gpu_seconds(function: Callable[[], object], passes: int = 10) -> float:
    clock = timing.Clock("cuda")
    function()
    return min(clock(function, 1) for _ in range(passes))


def _file(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
