"""Where numbers come from: the machine, the commit and the versions."""

import contextlib
import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from jepa_kernels import _C
from jepa_kernels.about import cores

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ("OMP_NUM_THREADS", "TORCH_", "TRITON_", "JEPA_", "KMP_", "GOMP_")


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


def _file(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
