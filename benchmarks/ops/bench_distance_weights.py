"""distance_weights at V-JEPA 2.1's masks: clips of 8 x 16 x 16 patches, 256 of them context and 256 targets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Inputs, Workload, each
from jepa_kernels import patch_positions
from jepa_kernels.ops.distance_weights import cases

FLOPS_OF_A_PAIR = 7  # three multiply-adds and a comparison


def weights(context: Tensor, target: Tensor, scale: float) -> Tensor:
    return 1.0 / (torch.cdist(context, target).min(-1).values / scale).sqrt()


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    places = [patch_positions(inputs[name], inputs["grid"]) for name in ("context_ids", "target_ids")]
    return {"cdist": lambda: weights(*places, inputs["scale"])}


def moved(inputs: Inputs, stage: str) -> float:
    """Ids read, weights written."""
    return 12 * inputs["context_ids"].numel() + 8 * inputs["target_ids"].numel()


def flops(inputs: Inputs, stage: str) -> float:
    return FLOPS_OF_A_PAIR * inputs["context_ids"].numel() * inputs["target_ids"].shape[1]


WORKLOADS = (
    Workload(
        "vjepa21_16x256",
        cases.rectangular((8, 16, 16), 16, 256, 256),
        moved,
        flops,
        rivals,
        smoke=True,
        devices=("cpu", "cuda"),
    ),
    Workload("vjepa21_64_frames", cases.rectangular((32, 24, 24), 1, 4000, 8000), moved, flops, rivals),
)
SMALL = (Workload("small", cases.rectangular((4, 8, 8), 2, 60, 70), moved, flops),)


@each("distance_weights", WORKLOADS)
def test_distance_weights(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
