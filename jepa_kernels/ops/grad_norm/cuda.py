"""CUDA C++ `grad_norm`: csrc/grad_norm/cuda.cu, given the tables of chunks."""

from collections.abc import Sequence

from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.chunks import groups


def forward(grads: Sequence[Tensor]) -> Tensor:
    """A launch for each dtype of gradient, and one for the sum."""
    launch = extension.load().grad_norm_forward_cuda  # type: ignore[union-attr]
    return launch([(table, dtype) for table, (dtype,) in groups("grad_norm", (grads,), changing=True)])
