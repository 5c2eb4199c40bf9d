"""ema_update over whole encoders. The pattern for every op: workloads and rivals; no timing code."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import jepa_kernels as jk
from benchmarks.workload import Inputs, Workload, compiled, each

MOMENTUM = 0.996


def encoder_shapes(
    width: int, depth: int, patch: int = 16, tokens: int = 196, hidden: int | None = None
) -> list[tuple[int, ...]]:
    """The parameters of a ViT, in order. hidden: channels within the MLP; None: 4 * width."""
    hidden = hidden or 4 * width
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,),
             (hidden, width), (hidden,), (width, hidden), (width,)]  # fmt: skip
    return [(1, tokens, width), (width, 3, patch, patch), (width,), *(block * depth), (width,), (width,)]


TINY = ((64,),) * 1000  # all of it is host time
BLOCK = 1 << 20  # numbers that are drawn: the tensors repeat them


def lists(shapes: Sequence[tuple[int, ...]], shadow: bool) -> Callable[[torch.Generator], Inputs]:
    def make(generator: torch.Generator) -> Inputs:
        target, online = (drawn(shapes, generator) for _ in range(2))
        inputs: Inputs = dict(target=target, online=online, momentum=MOMENTUM)
        return {**inputs, "shadow": [torch.zeros(s, dtype=torch.bfloat16) for s in shapes]} if shadow else inputs

    return make


def drawn(shapes: Sequence[tuple[int, ...]], generator: torch.Generator) -> list[torch.Tensor]:
    """Normal numbers, at the speed of copies."""
    block = torch.randn(BLOCK, generator=generator)
    sizes = [math.prod(s) for s in shapes]
    return [block.repeat(-(-n // BLOCK))[:n].view(s) for n, s in zip(sizes, shapes, strict=True)]


def lerped(target: list[torch.Tensor], online: list[torch.Tensor], weight: float) -> None:
    torch._foreach_lerp_(target, online, weight)


def compiled_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """For one encoder: 149 parameters take ten seconds to compile, at any width."""
    target, online, m = inputs["target"], inputs["online"], inputs["momentum"]
    fast = compiled(lerped)
    without_grad = torch.no_grad()(lambda: fast(target, online, 1 - m))  # in one mode: each is compiled for anew
    return {**rivals(inputs), "compile": without_grad}


@torch.no_grad()
def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    target, online, m = inputs["target"], inputs["online"], inputs["momentum"]
    shadow = inputs.get("shadow")

    def copied(update: Callable[[], Any]) -> Callable[[], Any]:
        def both() -> None:
            update()
            torch._foreach_copy_(shadow, target)

        return both if shadow else update

    def loop() -> None:  # I-JEPA's train.py
        for k, q in zip(target, online, strict=True):
            k.mul_(m).add_((1.0 - m) * q)

    def foreach() -> None:  # V-JEPA 2's train.py
        torch._foreach_mul_(target, m)
        torch._foreach_add_(target, online, alpha=1 - m)

    def lerp() -> None:  # torch.optim.swa_utils, timm
        torch._foreach_lerp_(target, online, 1 - m)

    return {name: copied(update) for name, update in (("loop", loop), ("foreach", foreach), ("lerp", lerp))}


def tiny_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """And our own prepared table, which saves the checks; of aliases, for it makes its tensors quicker to read."""
    table = jk.EmaTable(*([t.detach() for t in inputs[name]] for name in ("target", "online")))
    return {**rivals(inputs), "table": lambda: table.update(inputs["momentum"])}


def workload(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    shadow: bool = False,
    rivals: Any = rivals,
    **options: Any,
) -> Workload:
    return Workload(
        name,
        lists(shapes, shadow),
        rivals=rivals,
        mutates=("target", "shadow") if shadow else ("target",),
        keep=("target", "online"),
        traffic="rmw",
        **options,
    )


def on_gpu(name: str, shapes: Sequence[tuple[int, ...]], shadow: bool = False) -> Workload:
    return workload(name, shapes, shadow, devices=("cuda",), small=lists(VIT_TI, shadow))


VIT_TI, VIT_S, VIT_B = (encoder_shapes(width, 12) for width in (192, 384, 768))
VIT_H = encoder_shapes(1280, 32, patch=14, tokens=256)
VIT_G = encoder_shapes(1408, 40, hidden=6144)
WORKLOADS = (
    workload("vit_ti16", VIT_TI),
    workload("vit_s16", VIT_S, smoke=True),
    workload("vit_b16", VIT_B, rivals=compiled_rivals, small=lists(VIT_TI, False), reference_timed=True),
    workload("vit_s16_bf16_shadow", VIT_S, shadow=True),
    workload("vit_b16_bf16_shadow", VIT_B, shadow=True, small=lists(VIT_TI, True), reference_timed=True),
    workload("tiny_1000", TINY, rivals=tiny_rivals, devices=("cpu", "cuda")),
    on_gpu("vit_h14", VIT_H),
    on_gpu("vit_h14_bf16_shadow", VIT_H, shadow=True),
    on_gpu("vit_g16", VIT_G),
    on_gpu("vit_g16_bf16_shadow", VIT_G, shadow=True),
)
SMALL = (workload("small", encoder_shapes(32, 1), shadow=True),)


@each("ema_update", WORKLOADS)
def test_ema_update(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
