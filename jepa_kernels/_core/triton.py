"""Whether Triton kernels can run here, found out without importing Triton at start-up."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def interpreting() -> bool:
    """True where Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def reason(device_type: str) -> str | None:
    """Why Triton kernels can't run on tensors of this device type; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and not interpreting():
        return "Triton takes CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    return None


def capability() -> int:
    """10 * major + minor of the current device; in the interpreter, of an H100."""
    if interpreting():
        return 90
    from triton.runtime import driver

    return int(driver.active.get_current_target().arch)


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device: inside this context that is x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def rows_of(x: Tensor) -> tuple[int | None, int, int, int]:
    """(length, strides of run, row and channel) of rows [.., length, E]; no length where rows lie evenly."""
    even = x.dim() == 2 or x.stride(0) == x.shape[1] * x.stride(1)
    return None if even else max(x.shape[-2], 1), x.stride(0), x.stride(-2), x.stride(-1)
