"""collapse_stats of an encoder's latents: every step of a run."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Inputs, Workload, each
from jepa_kernels.ops.collapse_stats import cases

ROWS = 1024  # at most, of the matrix product


def chain(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each number by itself."""
    x = z.flatten(0, -2).float()
    std = x.std(0, correction=0)
    unit = torch.nn.functional.normalize(x, dim=1).sum(0)
    return std.mean(), std.amin(), rank_of(x), (unit.square().sum() - len(x)) / (len(x) * (len(x) - 1))


def short(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The quicker forms of deviations and cosines: norms, and a product with their reciprocals."""
    x = z.flatten(0, -2).float()
    std = torch.linalg.vector_norm(x - x.mean(0), dim=0) / len(x) ** 0.5
    unit = x.norm(dim=1).clamp_min(1e-12).reciprocal() @ x
    return std.mean(), std.amin(), rank_of(x), (unit.square().sum() - len(x)) / (len(x) * (len(x) - 1))


def rank_of(x: Tensor) -> Tensor:
    chosen = x[torch.arange(min(len(x), ROWS)) * len(x) // min(len(x), ROWS)]
    covariance = torch.cov(chosen.T, correction=0)
    return covariance.trace().square() / covariance.square().sum()


def rivals(inputs: Inputs) -> dict[str, Any]:
    return {"eager": lambda: chain(inputs["z"]), "short": lambda: short(inputs["z"])}


def workload(name: str, *shape: int, **options: Any) -> Workload:
    return Workload(name, cases.embeddings(*shape), rivals=rivals, traffic="read", **options)


WORKLOADS = (
    workload("vit_s16_b64", 64, 196, 384),
    workload("vit_h14_b16", 16, 256, 1280, dtypes=("float32", "bfloat16"), devices=("cpu", "cuda")),
    workload("vit_s16_b4", 4, 196, 384, smoke=True),
)
SMALL = (workload("small", 4, 50, 96, dtypes=("float32", "bfloat16")),)


@each("collapse_stats", WORKLOADS)
def test_collapse_stats(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
