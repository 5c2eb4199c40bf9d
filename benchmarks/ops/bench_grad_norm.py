"""grad_norm over the gradients of whole encoders."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ops.bench_adamw_ema import deepened
from benchmarks.ops.bench_ema_update import encoder_shapes
from benchmarks.workload import Inputs, Workload, each
from jepa_kernels.ops.grad_norm import cases


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    grads = inputs["grads"]
    return {
        "clip": lambda: torch.nn.utils.get_total_norm(grads),  # the first half of clip_grad_norm_
        "foreach": lambda: torch.stack(torch._foreach_norm(grads)).norm(),
    }


def workload(name: str, width: int, depth: int, **options: Any) -> Workload:
    """Every block has the gradients of one, on which parity is checked."""
    one = cases.make(encoder_shapes(width, 1))

    def make(generator: torch.Generator) -> Inputs:
        return dict(grads=deepened(one(generator)["grads"], depth))

    return Workload(name, make, rivals=rivals, traffic="read", small=one, **options)


WORKLOADS = (
    workload("vit_s16", 384, 12, smoke=True, reference_timed=True),
    workload("vit_b16", 768, 12, reference_timed=True),
    workload("vit_h14", 1280, 32, devices=("cuda",)),
)
SMALL = (workload("small", 32, 1),)


@each("grad_norm", WORKLOADS)
def test_grad_norm(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
