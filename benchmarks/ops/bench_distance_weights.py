"""distance_weights at V-JEPA 2.1's masks: clips of 8 x 16 x 16 patches, 256 of them context and 256 targets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Inputs, Workload, each
from jepa_kernels import patch_positions
from jepa_kernels.ops.distance_weights import cases


def weights(nearest: Tensor, scale: float) -> Tensor:
    return 1.0 / (nearest / scale).sqrt()


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """amin is the quicker form: min finds the places of the nearest too."""
    places = [patch_positions(inputs[name], inputs["grid"]) for name in ("context_ids", "target_ids")]
    return {
        "cdist": lambda: weights(torch.cdist(*places).min(-1).values, inputs["scale"]),
        "amin": lambda: weights(torch.cdist(*places).amin(-1), inputs["scale"]),
    }


WORKLOADS = (
    Workload(
        "vjepa21_16x256",
        cases.rectangular((8, 16, 16), 16, 256, 256),
        rivals=rivals,
        smoke=True,
        devices=("cpu", "cuda"),
    ),
    Workload("vjepa21_64_frames", cases.rectangular((32, 24, 24), 1, 4000, 8000), rivals=rivals),
)
SMALL = (Workload("small", cases.rectangular((4, 8, 8), 2, 60, 70)),)


@each("distance_weights", WORKLOADS)
def test_distance_weights(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
