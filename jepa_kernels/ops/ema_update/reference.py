"""Specification of `ema_update`, in the published loops' own arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def forward(
    target: Sequence[Tensor],
    online: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    shadow: Sequence[Tensor] = (),
    form: str = "lerp",
) -> None:
    """target <- momentum * target + (1 - momentum) * online, in place."""
    for i, (t, o) in enumerate(zip(target, online, strict=True)):
        m, o = _scalar(momentum), o.to(t.dtype)
        if form == "ijepa":
            t.mul_(m).add_((1 - m) * o)
        elif form == "vjepa2":
            t.mul_(m).add_(o, alpha=1 - m)
        else:
            t.add_(o - t, alpha=1 - m)
        if shadow and shadow[i].numel() == t.numel():  # an empty one stands for none
            shadow[i].copy_(t)


def _scalar(momentum: float | Tensor) -> float:
    # The published loops multiply by a Python float; a 0-dim tensor would join type promotion instead.
    return momentum.item() if isinstance(momentum, Tensor) else momentum  # type: ignore[return-value]
