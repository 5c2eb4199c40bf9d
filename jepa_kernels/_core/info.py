"""Which backends this machine and build can run."""

import importlib

import torch

from jepa_kernels._core.select import DEVICES, Kernel, unavailable


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


def why_not(backend: str) -> str | None:
    """Why a backend can't run on any device of this machine; None where it can."""
    if _runs(backend):
        return None
    device = DEVICES[backend][0]
    return unavailable(backend, device) or f"no {device} device"
