"""linear at the shapes of ViTs and of a planner's predictor: rows of a batch by the weights of one layer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.workload import Inputs, Workload, each
from jepa_kernels.ops.linear.cases import EVERY, layer


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """PyTorch's layer, MKL's product on CPUs, and forward oneDNN's, which PyTorch holds too and has no gradient of."""
    x, weight, bias = (inputs[name] for name in EVERY)
    found = {"mkl": lambda: F.linear(x, weight, bias)}
    if not weight.requires_grad:
        found["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def workload(name: str, rows: int, depth: int, width: int, **options: Any) -> Workload:
    """reference_timed: it is MKL's product."""
    make = layer(rows, depth, width=width)
    return Workload(name, make, rivals=rivals, grads=EVERY, reference_timed=False, **options)


WORKLOADS = (
    workload("vit_s_fc1", 4096, 384, 1536, smoke=True),
    workload("vit_l_fc1", 2048, 1024, 4096),
    workload("vit_l_fc2", 2048, 4096, 1024),
    workload("planner_qkv", 1056, 384, 1152),
)
SMALL = (workload("small", 130, 96, 100),)


@each("linear", WORKLOADS)
def test_linear(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
