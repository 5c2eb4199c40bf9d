"""CUDA C++ `ema_update`: csrc/ema_update/cuda.cu, given the table of chunks."""

from collections.abc import Sequence

from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.chunks import groups


def forward(
    target: Sequence[Tensor], online: Sequence[Tensor], shadow: Sequence[Tensor], momentum: Tensor, form: str
) -> None:
    """One launch for each pair of online and shadow dtypes, usually one in all."""
    launch = extension.load().ema_update_forward_cuda  # type: ignore[union-attr]
    for table, (_, online_dtype, shadow_dtype) in groups("ema_update", (target, online, shadow)):
        launch(table, online_dtype, shadow_dtype, momentum, form)
