"""What this machine and build can run: the report to paste into a bug report. No names of hosts, users or folders."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from jepa_kernels._core import extension
from jepa_kernels._core.info import kernels, why_not
from jepa_kernels._core.select import short

BESIDE = ("triton", "numpy", "safetensors", "transformers", "timm", "av", "gym-pusht", "minigrid", "pyyaml")
ENVIRONMENT = re.compile(
    "JEPA_|TRITON_|TORCH|PYTORCH_|OMP_|KMP_|GOMP_|MKL_|NCCL_|CUBLAS_|CUDA_(VISIBLE_DEVICES|LAUNCH_BLOCKING|MODULE_LOADING)"
)

# Of a file in a reason, such as a library that does not load; `and/or` is none.
FOLDER = re.compile(r"""(?<![^\s'"`(:=])/[^\s/][^:'"`\n]*/""")


def info() -> dict[str, object]:
    """Versions, processor, devices, build, environment, and for every op each backend with the reason it can't run.

    `build`: the compiled module's compiler, CUDA runtime and instruction set in use, or why there is none.
    `environment`: variables that change what runs; of those that hold a path, only that they do.
    `ops`: op -> backend -> None where it is ready, else why not. `dtypes`: op -> backend -> what it takes.
    """
    from jepa_kernels import __version__
    from jepa_kernels.ops import OPS

    module = extension.load()
    return {
        "jepa_kernels": __version__,
        "torch": torch.__version__,
        **{name: _version(name) for name in BESIDE},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _found("/proc/cpuinfo", r"model name\s*: (.+)") or platform.processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory": _found("/proc/meminfo", r"MemTotal:\s+(\d+ kB)"),
        "build": module.build_info() if isinstance(module, ModuleType) else _files_alone(module),
        "cuda": torch.version.cuda,
        "driver": _found("/proc/driver/nvidia/version", r"Kernel Module\D*([\d.]+)"),
        "devices": _devices(),
        "environment": _environment(),
        "ops": {op: {k.backend: _files_alone(why_not(k.backend)) for k in kernels(op)} for op in OPS},
        "dtypes": {op: {k.backend: [short(d) for d in k.dtypes] for k in kernels(op)} for op in OPS},
    }


def cores() -> int:
    """Cores that this process may use; all of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files_alone(reason: str | None) -> str | None:
    """With the names of files, without their folders."""
    return reason and FOLDER.sub("", reason)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _found(file: str, pattern: str) -> str | None:
    try:
        match = re.search(pattern, Path(file).read_text())
    except OSError:
        return None
    return match.group(1) if match else None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in found]


def _environment() -> dict[str, str]:
    chosen = {name: value for name, value in sorted(os.environ.items()) if ENVIRONMENT.match(name)}
    return {name: "(a path)" if "/" in value or "\\" in value else value for name, value in chosen.items()}


def text(report: dict[str, object]) -> str:
    """The report as lines; names of ops and backends stand where `explain` has them."""
    report = dict(report)
    ops, _ = report.pop("ops"), report.pop("dtypes")
    lines = [f"{key:<14}{_plain(value)}" for key, value in report.items() if value is not None]
    for op, backends in ops.items():  # type: ignore[attr-defined]
        rows = {**backends, "reference": None}.items()
        lines += ["", op, *(f"  {backend:<12}{why or 'ready'}" for backend, why in rows)]
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        value = [f"{name} {v}" if " " not in name and "_" not in name else f"{name}={v}" for name, v in value.items()]
    return "; ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
