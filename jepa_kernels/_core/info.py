"""What this machine and build can run: the report to paste into a bug report."""

import importlib
import platform
from types import ModuleType

import torch

from jepa_kernels._core import extension
from jepa_kernels._core.select import DEVICES, Kernel, short, unavailable


def kernels(op: str) -> tuple[Kernel, ...]:
    """The op's table."""
    return importlib.import_module(f"jepa_kernels.ops.{op}.op").KERNELS


def available_backends(op: str) -> tuple[str, ...]:
    """The backends that can run `op` on this machine, in order of preference; `reference` comes last."""
    from jepa_kernels.ops import OPS

    if op not in OPS:
        raise ValueError(f"available_backends: op must be one of {', '.join(OPS)}, got {op!r}; check the spelling")
    return (*(k.backend for k in kernels(op) if _runs(k.backend)), "reference")


def _runs(backend: str) -> bool:
    return any(
        unavailable(backend, device) is None
        for device in DEVICES[backend]
        if device == "cpu" or torch.cuda.is_available()
    )


def info() -> dict[str, object]:
    """Versions, processor, build, and for every op each backend with the reason it can't run, or None."""
    from jepa_kernels import __version__
    from jepa_kernels.ops import OPS

    module = extension.load()
    return {
        "jepa_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "build": module.build_info() if isinstance(module, ModuleType) else module,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ops": {op: {k.backend: _why(k.backend) for k in kernels(op)} for op in OPS},
        "dtypes": {op: {k.backend: [short(d) for d in k.dtypes] for k in kernels(op)} for op in OPS},
    }


def _why(backend: str) -> str | None:
    if _runs(backend):
        return None
    device = DEVICES[backend][0]
    return unavailable(backend, device) or f"no {device} device"
