"""CUDA C++ `adamw_ema`: csrc/adamw_ema/cuda.cu, given the table of chunks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.chunks import groups

Tensors = Sequence[Tensor]


def forward(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, targets: Tensors,
    online_shadow: Tensors, target_shadow: Tensors, *rest: Any, known: Any = None,
) -> None:  # fmt: skip
    """One launch for tensors of the same dtypes that lack the same ones: usually one in all.

    known: what `chunks.read` told of them.
    """
    launch = extension.load().adamw_ema_forward_cuda  # type: ignore[union-attr]
    lists = (params, grads, exp_avgs, exp_avg_sqs, targets, online_shadow, target_shadow, steps)
    found = groups("adamw_ema", lists, known, changing=True)
    for table, (_, grad, _, _, _, online_copy, target_copy, _) in found:
        launch(table, grad, online_copy, target_copy, *rest)
