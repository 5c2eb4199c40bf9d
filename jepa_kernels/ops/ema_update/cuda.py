"""CUDA C++ `ema_update`: csrc/ema_update/cuda.cu, given the table of chunks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.chunks import Groups, Lists, groups


def prepare(lists: Lists, known: Any = None) -> Groups:
    """The table of chunks."""
    return groups("ema_update", lists, known)


def run(prepared: Groups, momentum: Tensor, form: str) -> None:
    """One launch for each pair of online and shadow dtypes, usually one in all."""
    launch = extension.load().ema_update_run_cuda  # type: ignore[union-attr]
    for table, (_, online, shadow) in prepared:
        launch(table, online, shadow, momentum, form)


def forward(
    target: Sequence[Tensor], online: Sequence[Tensor], shadow: Sequence[Tensor], momentum: Tensor, form: str
) -> None:
    """`run` of lists that torch's dispatcher hands over."""
    run(prepare((target, online, shadow)), momentum, form)
