"""grad_norm over the gradients of whole encoders."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.ops.bench_adamw_ema import deepened
from benchmarks.ops.bench_ema_update import encoder_shapes
from benchmarks.workload import Inputs, Workload, each, nbytes
from jepa_kernels.ops.grad_norm import cases


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    grads = inputs["grads"]
    return {
        "clip": lambda: torch.nn.utils.get_total_norm(grads),  # the first half of clip_grad_norm_
        "foreach": lambda: torch.stack(torch._foreach_norm(grads)).norm(),
    }


def moved(inputs: Inputs, stage: str) -> float:
    return nbytes(inputs["grads"])


def flops(inputs: Inputs, stage: str) -> float:
    return 2 * sum(g.numel() for g in inputs["grads"])


def workload(name: str, width: int, depth: int, **options: Any) -> Workload:
    made = cases.make(encoder_shapes(width, depth))
    return Workload(name, made, bytes=moved, flops=flops, rivals=rivals, traffic="read", **options)


def on_gpu(name: str, width: int, depth: int) -> Workload:
    one = workload(name, width, 1)

    def make(generator: torch.Generator) -> Inputs:
        return dict(grads=deepened(one.make(generator)["grads"], depth))

    return replace(one, make=make, small=one.make, devices=("cuda",))


WORKLOADS = (
    workload("vit_s16", 384, 12, smoke=True),
    workload("vit_b16", 768, 12),
    on_gpu("vit_h14", 1280, 32),
)


@each("grad_norm", WORKLOADS)
def test_grad_norm(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
