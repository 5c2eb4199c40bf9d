"""sigreg at LeJEPA's sizes: 1024 slices and 17 knots of 512 embeddings, of one view and of eight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Inputs, Workload, compiled, each, nbytes
from jepa_kernels.ops.sigreg import cases


def published(z: Tensor, slices: int, directions: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """The lejepa package's chain: angles, cosines and sines of every row, slice and knot in memory."""
    t = torch.linspace(0, t_max, knots, device=z.device)
    phi = torch.exp(-0.5 * t * t)
    weights = torch.full_like(t, 2 * t_max / (knots - 1))
    weights[0] = weights[-1] = t_max / (knots - 1)
    angles = (z.float() @ directions.T)[..., None] * t
    error = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    return (error @ (weights * phi) * z.shape[-2]).mean()


def step(z: Tensor, slices: int, directions: Tensor) -> Tensor:
    """The chain in training: directions are drawn anew. For parity it goes on with ours, as many."""
    drawn = torch.randn(slices, z.shape[-1], device=z.device)
    drawn /= drawn.norm(dim=-1, keepdim=True)
    return published(z, slices, directions)


def eager_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    return {"published": chain_of(inputs, step)}


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The compiled chain is given its directions."""
    return {**eager_rivals(inputs), "compile": chain_of(inputs, compiled(published))}


def chain_of(inputs: Inputs, chain: Any) -> Callable[[], Any]:
    from jepa_kernels.ops.sigreg.reference import directions

    z, slices = inputs["z"], inputs["slices"]
    drawn = directions(z.shape[-1], slices, inputs.get("step", 0), inputs.get("seed", 0), z.device)
    return lambda: chain(z, slices, drawn)


def moved(inputs: Inputs, stage: str) -> float:
    """Embeddings, and their gradient; directions are a function of two numbers."""
    return nbytes(inputs["z"]) * (3 if stage == "backward" else 1)


def workload(name: str, make: Any, rivals: Any = rivals, **options: Any) -> Workload:
    return Workload(name, make, bytes=moved, rivals=rivals, grads=("z",), reference_timed=False, **options)


WORKLOADS = (
    workload("n512_e512_k1024", cases.embeddings(512, 512, slices=1024), small=cases.embeddings(128, 512, slices=128)),
    workload(
        "views8_n64_e64_k1024",  # of `python -m jepa_kernels train lejepa`
        cases.embeddings(8, 64, 64, slices=1024),
        small=cases.embeddings(8, 64, 64, slices=128),
    ),
    workload("views2_n512_e512_k256", cases.embeddings(2, 512, 512, slices=256)),
    workload("n4096_e512_k1000", cases.embeddings(4096, 512, slices=1000), devices=("cuda",)),
    workload("n128_e256_k128", cases.embeddings(128, 256, slices=128), eager_rivals, smoke=True),
)
SMALL = (workload("small", cases.embeddings(64, 64, slices=64)),)


@each("sigreg", WORKLOADS)
def test_sigreg(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
