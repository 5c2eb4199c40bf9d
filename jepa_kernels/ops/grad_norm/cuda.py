"""CUDA C++ `grad_norm`: csrc/grad_norm/cuda.cu, given the tables of chunks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.chunks import groups


def forward(grads: Sequence[Tensor], known: Any = None) -> Tensor:
    """A launch for each dtype of gradient, and one for the sum. known: what `chunks.read` told of them."""
    launch = extension.load().grad_norm_forward_cuda  # type: ignore[union-attr]
    found = groups("grad_norm", (grads,), known, changing=True)
    return launch([(table, dtype) for table, (dtype,) in found])
