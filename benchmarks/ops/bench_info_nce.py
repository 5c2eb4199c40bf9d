"""info_nce at batches of contrastive pre-training, with a learned temperature."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workload import Inputs, Workload, each, nbytes
from jepa_kernels.ops.info_nce import cases

ALL = ("x", "y", "temperature")


def published(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    """The chain as CLIP writes it: the whole matrix, and a cross-entropy along each of its sides."""
    scores = F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).T / temperature
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def logsumexps(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    """The short form: rows are divided before the product, no side of the matrix is copied or normalised in memory."""
    scores = (F.normalize(x.float(), dim=-1) / temperature) @ F.normalize(y.float(), dim=-1).T
    return ((scores.logsumexp(0) + scores.logsumexp(1)) / 2 - scores.diagonal()).mean()


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    given = [inputs[name] for name in ALL]
    return {"published": lambda: published(*given), "logsumexp": lambda: logsumexps(*given)}


def moved(inputs: Inputs, stage: str) -> float:
    """Both sides; backward also writes their gradients."""
    return (2 if stage == "backward" else 1) * nbytes(inputs["x"], inputs["y"])


def workload(name: str, batch: int, channels: int, **options: Any) -> Workload:
    make = cases.pairs(batch, channels, temperature=0.07)
    return Workload(name, make, bytes=moved, rivals=rivals, grads=ALL, keep=("temperature",), traffic="read", **options)


WORKLOADS = (
    workload("b4096_e512", 4096, 512, small=cases.pairs(700, 512, temperature=0.07)),
    workload("b1024_e1536", 1024, 1536, dtypes=("float32", "bfloat16"), reference_timed=False),
    workload("b512_e256", 512, 256, smoke=True),
    workload("vl_jepa_b24k", 24_000, 1536, dtypes=("bfloat16",), devices=("cuda",), reference_timed=False,
             small=cases.pairs(2000, 1536, temperature=0.07)),
)  # fmt: skip
SMALL = (workload("small", 100, 96, dtypes=("float32", "bfloat16")),)


@each("info_nce", WORKLOADS)
def test_info_nce(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
