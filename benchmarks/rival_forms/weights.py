"""Updates of weights: EMA loops, AdamW, and both together."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.rival_forms.form import Form, Run

MOMENTUM = 0.996


def weights(small: bool, width: int, depth: int, device: str) -> list[Tensor]:
    """The parameters of a ViT, fp32."""
    width, depth = (128, 4) if small else (width, depth)
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,),
             (4 * width, width), (4 * width,), (width, 4 * width), (width,)]  # fmt: skip
    return [torch.randn(shape, device=device) * 0.02 for shape in block * depth]


def optimizer(params: list[Tensor], **options: Any) -> Run:
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return torch.optim.AdamW(params, lr=1e-4, **options).step


@torch.no_grad()
def loop(target: list[Tensor], online: list[Tensor]) -> None:  # I-JEPA's train.py
    for k, q in zip(target, online, strict=True):
        k.mul_(MOMENTUM).add_((1.0 - MOMENTUM) * q)


@torch.no_grad()
def foreach(target: list[Tensor], online: list[Tensor]) -> None:  # V-JEPA 2's train.py
    torch._foreach_mul_(target, MOMENTUM)
    torch._foreach_add_(target, online, alpha=1 - MOMENTUM)


@torch.no_grad()
def lerp(target: list[Tensor], online: list[Tensor]) -> None:  # torch.optim.swa_utils, timm
    torch._foreach_lerp_(target, online, 1 - MOMENTUM)


def weight_updates(small: bool) -> Iterator[Form]:
    for workload, width, depth in (("vit_l16", 1024, 24), ("vit_h14", 1280, 32)):
        count = sum(p.numel() for p in weights(small, width, depth, "meta"))

        def pair(device: str, width: int = width, depth: int = depth) -> tuple[list[Tensor], list[Tensor]]:
            return weights(small, width, depth, device), weights(small, width, depth, device)

        for update in (loop, foreach, lerp):

            def make(device, dtype, update=update, pair=pair):
                target, online = pair(device)
                return lambda: update(target, online)

            yield Form(update.__name__, f"ema_{workload}", make, bytes=12 * count, flops=3 * count, fp32=True)

        def shadowed(device, dtype, pair=pair):
            target, online = pair(device)
            shadow = [t.bfloat16() for t in target]

            def run() -> None:
                lerp(target, online)
                torch._foreach_copy_(shadow, target)

            return run

        yield Form("lerp_copy", f"ema_{workload}_bf16_shadow", shadowed, bytes=14 * count, flops=3 * count, fp32=True)
        for name, options in (("adamw_fused", {"fused": True}), ("adamw_foreach", {"foreach": True})):

            def adamw(device, dtype, options=options, pair=pair):
                return optimizer([p.requires_grad_() for p in pair(device)[0]], **options)

            yield Form(name, f"adamw_{workload}", adamw, bytes=28 * count, flops=12 * count, fp32=True)

        def adamw_ema(device, dtype, pair=pair):
            target, online = pair(device)
            adam = optimizer([p.requires_grad_() for p in online], fused=True)

            def run() -> None:
                adam()
                lerp(target, online)

            return run

        # The floor is one pass: what a fused update could reach.
        yield Form(
            "adamw_fused_lerp", f"adamw_ema_{workload}", adamw_ema, bytes=36 * count, flops=15 * count, fp32=True
        )
