"""C++ `ema_update`: csrc/ema_update/cpu.cpp, given what was read of the tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.chunks import Lists, read


def prepare(lists: Lists, known: Any) -> Any:
    """What is known of the tensors is all that the kernel needs."""
    return known


def run(known: Any, momentum: Tensor, form: str) -> None:
    """One pass over memory; threads share the parameters as one long axis."""
    extension.load().ema_update_run_cpu(known, momentum, form)  # type: ignore[union-attr]


def forward(
    target: Sequence[Tensor], online: Sequence[Tensor], shadow: Sequence[Tensor], momentum: Tensor, form: str
) -> None:
    """`run` of lists that torch's dispatcher hands over."""
    run(read((target, online, shadow), plain=False), momentum, form)
