"""C++ `grad_norm`: csrc/grad_norm/cpu.cpp, given what was read of the gradients."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.chunks import read


def forward(grads: Sequence[Tensor], known: Any = None) -> Tensor:
    """Threads take blocks of elements; one adds what they found. known: what `chunks.read` told of the gradients."""
    launch = extension.load().grad_norm_run_cpu  # type: ignore[union-attr]
    return launch(read([grads], plain=False) if known is None else known, grads[0])
