"""What is trained how: weight decay by kind of parameter, one step with clipping that non-finite gradients skip."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels import AdamWEMA
from jepa_kernels.nn import EMA
from jepa_kernels.optim.clip import clipped_scale, norm_of


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for everything but biases, vectors and numbers, as published (so the mask token is decayed).

    A model's `parameter_groups` says what is trained at another share of the learning rate, `lr_scale`.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = getattr(model, "parameter_groups", lambda lr: [{"params": list(names), "lr": lr}])
    found: list[dict[str, Any]] = []
    for part in own(1.0):
        trained = [p for p in part["params"] if p.requires_grad]
        exempt = {p for p in trained if p.dim() < 2 or names[p].endswith("bias")}
        decayed = [p for p in trained if p not in exempt]
        others = [p for p in trained if p in exempt]
        found.append({"params": decayed, "decayed": True, "lr_scale": part["lr"]})
        found.append({"params": others, "decayed": False, "weight_decay": 0.0, "lr_scale": part["lr"]})
    return found


def build(model: nn.Module) -> AdamWEMA:
    """Of everything that is trained; it also moves the model's target encoder, if there is one."""
    ema: EMA | None = getattr(model, "ema", None)
    if ema is None:
        return AdamWEMA(groups(model))
    return AdamWEMA(groups(model), ema.pairs(), shadow=(None, ema.shadow_copies()))


def step(optimizer: AdamWEMA, ema: EMA | None, momentum: float | None, most: float) -> tuple[Tensor, Tensor]:
    """One step; (the norm of all gradients, whether it is finite), without waiting for the device.

    Gradients are scaled down to the norm `most` on their way in (0: never), and set to None. Where the norm is not
    finite, weights, moments, step counts and targets stay as they are.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = norm_of(grads)
    finite = norm.isfinite()
    optimizer.grad_scale = clipped_scale(norm, most or None, None)  # type: ignore[attr-defined]
    optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
    with nullcontext() if ema is None else ema.moved_by(optimizer, _kept(momentum, finite)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def _kept(momentum: float | None, finite: Tensor) -> Tensor | None:
    """Of a step that is taken; 1 of one that is not. fp64, as exact as the number itself."""
    if momentum is None:
        return None
    taken, left = (finite.new_full((), value, dtype=torch.float64) for value in (momentum, 1.0))
    return torch.where(finite, taken, left)
