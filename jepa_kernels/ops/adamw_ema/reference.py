"""Specification of `adamw_ema`: AdamW as its paper states it, then the EMA, then the rounded copies."""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]
Scalar = float | Tensor


@torch.no_grad()
def forward(
    params: Sequence[Tensor],
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    targets: Tensors | None = None,
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Scalar = 0.01,
    momentum: Scalar = 1.0,
    online_shadow: Tensors | None = None,
    target_shadow: Tensors | None = None,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of every parameter, in place. An entry that is None takes no part."""
    lr, weight_decay, momentum = (_number(x) for x in (lr, weight_decay, momentum))
    scale = (-1 if maximize else 1) * (1.0 if grad_scale is None else _number(grad_scale))
    finite = found_inf is None or _number(found_inf) == 0
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is not None and finite:
            m, v, step = exp_avgs[i], exp_avg_sqs[i], steps[i]
            _adamw(p, grad.to(p.dtype) / scale, m, v, step, lr, betas, eps, weight_decay)  # type: ignore[arg-type]
        _copy(online_shadow, i, p)
        k = targets[i] if targets else None
        if k is not None:
            k.add_(p - k, alpha=1 - momentum)
            _copy(target_shadow, i, k)


def _adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    step += 1
    t = step.item()
    p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    size, correction = lr / (1 - betas[0] ** t), (1 - betas[1] ** t) ** 0.5
    p.addcdiv_(m, (v.sqrt() / correction).add_(eps), value=-size)


def _copy(shadow: Tensors | None, i: int, x: Tensor) -> None:
    copy = shadow[i] if shadow else None
    if copy is not None:
        copy.copy_(x)


def _number(x: Scalar) -> float:
    return x.item() if isinstance(x, Tensor) else x
