"""gather_tokens: latents of the target blocks, and the predictor's positions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Inputs, Workload, each
from jepa_kernels.ops.gather_tokens import cases


def images_and_rows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Image of each id, and its row of x.flatten(0, 1)."""
    batch, count = inputs["x"].shape[:2]
    ids, packing = inputs["ids"], inputs.get("packing")
    if packing is not None:
        image = packing.sequence_of_token() % batch
    else:
        image = (torch.arange(len(ids), device=ids.device) % batch)[:, None]
    return image, image * count + ids


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    x, ids = inputs["x"], inputs["ids"]
    image, rows = images_and_rows(inputs)
    flat, shape = rows.flatten(), (*ids.shape, x.shape[2])
    found = {
        "index": lambda: x[image, ids],
        "index_select": lambda: x.flatten(0, 1).index_select(0, flat).view(shape),
        "embedding": lambda: F.embedding(flat, x.flatten(0, 1)).view(shape),
    }
    if "packing" not in inputs:
        masks = ids.split(x.shape[0])
        found["repeat"] = lambda: repeat(x, masks)
        found["expand"] = lambda: expand(x, masks)
    return found


def repeat(x: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """The published form: one gather per mask, its index repeated for every channel, in memory."""
    return torch.cat([x.gather(1, ids[..., None].repeat(1, 1, x.shape[2])) for ids in masks])


def expand(x: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """The same without the copies of the index."""
    return torch.cat([x.gather(1, ids[..., None].expand(-1, -1, x.shape[2])) for ids in masks])


def workload(name: str, make: Any, grads: tuple[str, ...] = ("x",), **options: Any) -> Workload:
    return Workload(name, make, rivals=rivals, grads=grads, **options)


LENGTHS = [33, 54, 40, 35, 48, 36, 42, 45] * 16

WORKLOADS = (
    workload(
        "ijepa_vit_h14_b32",
        cases.rectangular(32, 256, 1280, 4, 40),
        dtypes=("float32", "bfloat16"),
        compile=("forward",),
    ),
    workload("ijepa_vit_h14_b32_packed", cases.packed(32, 256, 1280, LENGTHS)),
    workload(
        "ijepa_vit_h14_b128",
        cases.rectangular(128, 256, 1280, 4, 42),
        small=cases.rectangular(2, 256, 1280, 4, 42),
        dtypes=("bfloat16",),
        devices=("cuda",),
    ),
    workload("positions_vit_s16_b8", cases.rectangular(1, 196, 384, 32, 33), grads=(), smoke=True),
)
SMALL = (workload("small", cases.packed(4, 64, 96, (20, 31, 10, 17)), dtypes=("float32", "bfloat16")),)


@each("gather_tokens", WORKLOADS)
def test_gather_tokens(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
