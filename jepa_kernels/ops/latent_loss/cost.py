"""Bytes and FLOPs of `latent_loss`."""

from typing import Any

from torch import Tensor

from jepa_kernels.cost import Cost, distinct, elements, nbytes

FORWARD_OPS, GRADIENT_OPS = 11, 2  # per element: layer norm 7, difference, distance and sum 4; clamp and scale 2


def forward(
    pred: Any, target: Any, ids: Tensor | None, cu_seqlens: Tensor | None, kind: str, beta: float, normalize: bool,
    eps: float, reduction: str, power: float, levels: int, gain: Any, shift: Any, norm_eps: float, weight: Any,
    with_grad: bool,
) -> Cost:  # fmt: skip
    """Predictions and each target that any mask names read once; under grad a gradient as large is written."""
    row, size = target.shape[2] * target.dtype.itemsize, pred.dtype.itemsize
    named = target.shape[0] * target.shape[1] if ids is None else distinct(ids, cu_seqlens, target.shape[0])
    unit = elements(pred) * (4 if str(pred.dtype) == "torch.float16" else size) if with_grad else 0
    read = elements(pred) * size + named * row + nbytes(ids, gain, shift, weight)
    return Cost(read + unit, elements(pred) * (FORWARD_OPS + GRADIENT_OPS * with_grad))


def backward(grad: Any, unit: Any, half: bool) -> Cost:
    """What the forward pass wrote read, and scaled."""
    return Cost(elements(unit) * (unit.dtype.itemsize + (2 if half else unit.dtype.itemsize)), elements(unit))
