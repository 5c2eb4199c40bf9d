"""CUDA C++ `ema_update`: csrc/ema_update/cuda.cu, given the table of chunks."""

from collections.abc import Sequence

from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.ops.ema_update.chunks import groups


def forward(
    target: Sequence[Tensor], online: Sequence[Tensor], shadow: Sequence[Tensor], momentum: Tensor, form: str
) -> None:
    """One launch for each pair of online and shadow dtypes, usually one in all."""
    launch = extension.load().ema_update_forward_cuda  # type: ignore[union-attr]
    for group in groups(target, online, shadow):
        launch(group.table, group.online, group.shadow, momentum, form)
