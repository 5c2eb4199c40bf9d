"""linear at the shapes of ViTs and of a planner's predictor: rows of a batch by the weights of one layer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.workload import Inputs, Workload, each
from jepa_kernels.ops.linear.cases import EVERY, layer


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """PyTorch's layer, MKL's product on CPUs, and forward oneDNN's, which PyTorch holds too and has no gradient of.

    Both with the GELU behind it: PyTorch's own, and oneDNN's in the product's pass.
    """
    x, weight, bias = (inputs[name] for name in EVERY)
    gelu = "activation" in inputs
    found = {"mkl": (lambda: F.gelu(F.linear(x, weight, bias))) if gelu else lambda: F.linear(x, weight, bias)}
    if not weight.requires_grad:
        behind = ("gelu", [], "none") if gelu else ("none", [], "")
        found["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, *behind)
    return found


def workload(name: str, rows: int, depth: int, width: int, gelu: bool = False, **options: Any) -> Workload:
    """reference_timed: it is MKL's product."""
    make = layer(rows, depth, width=width, **({"activation": "gelu"} if gelu else {}))
    return Workload(name, make, rivals=rivals, grads=EVERY, reference_timed=False, **options)


WORKLOADS = (
    workload("vit_s_fc1", 4096, 384, 1536, smoke=True),
    workload("vit_s_gelu", 4096, 384, 1536, gelu=True),
    workload("vit_l_fc1", 2048, 1024, 4096),
    workload("vit_l_fc2", 2048, 4096, 1024),
    workload("planner_qkv", 1056, 384, 1152),
)
SMALL = (workload("small", 130, 96, 100),)


@each("linear", WORKLOADS)
def test_linear(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
