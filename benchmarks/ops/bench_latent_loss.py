"""latent_loss at the targets of I-JEPA's ViT-H/14 (4 masks), V-JEPA 2's ViT-g (the encoder's norm folded in) and 2.1.

The floor is what must move: predictions and chosen targets read, the gradient written. Batch 128 is published for
I-JEPA; of V-JEPA 2, as many clips as leave room for the chain that is timed against ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workload import Inputs, Workload, compiled, each, nbytes
from jepa_kernels.ops.latent_loss import cases

FORWARD_OPS, BACKWARD_OPS = 11, 2  # per element: layer norm 7, difference, distance and sum 4; clamp and scale 2


def published(pred: Tensor, target: Tensor, masks: list[Tensor]) -> Tensor:
    """I-JEPA's chain: norm of every target, a gather with an index per channel, then the loss; fp32 as in autocast."""
    normed = F.layer_norm(target.float(), target.shape[-1:])
    chosen = [normed.gather(1, ids[..., None].repeat(1, 1, normed.shape[-1])) for ids in masks]
    return F.smooth_l1_loss(pred.float(), torch.cat(chosen))


def rows_at(target: Tensor, rows: Tensor) -> Tensor:
    """index_select: quicker than indexing."""
    return target.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1).float()


def gather_first(pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    chosen = rows_at(target, rows)
    return F.smooth_l1_loss(pred.float(), F.layer_norm(chosen, chosen.shape[-1:]))


def gather_first_packed(pred: Tensor, target: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    chosen = rows_at(target, rows)
    distance = F.smooth_l1_loss(pred.float(), F.layer_norm(chosen, chosen.shape[-1:]), reduction="none")
    return distance.mean(-1) @ weights


def published_video(pred: Tensor, target: Tensor, masks: list[Tensor], norm: tuple[Tensor, Tensor, float]) -> Tensor:
    """V-JEPA 2's chain: both norms of every token, in fp32 as in autocast, a gather, |d|^1 / 1 a mask."""
    gain, bias, eps = norm
    normed = F.layer_norm(target.float(), target.shape[-1:], gain.float(), bias.float(), eps)
    normed = F.layer_norm(normed, normed.shape[-1:])
    chosen = [normed.gather(1, ids[..., None].repeat(1, 1, normed.shape[-1])) for ids in masks]
    pairs = zip(pred.float().split(len(target)), chosen, strict=True)
    return sum(torch.mean(torch.abs(x - y) ** 1.0) / 1.0 for x, y in pairs) / len(masks)


def gather_first_video(pred: Tensor, target: Tensor, rows: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
    gain, bias, eps = norm
    chosen = rows_at(target, rows)
    once = F.layer_norm(chosen, chosen.shape[-1:], gain.float(), bias.float(), eps)
    return F.l1_loss(pred.float(), F.layer_norm(once, once.shape[-1:]))


def target_rows(inputs: Inputs) -> Tensor:
    """Row of target.flatten(0, 1) that each prediction is held against."""
    images, count = inputs["target"].shape[:2]
    ids, packing = inputs["ids"], inputs.get("packing")
    if packing is not None:
        return packing.sequence_of_token() % images * count + ids
    return (torch.arange(len(ids), device=ids.device) % images)[:, None] * count + ids


def eager_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    pred, target, rows = inputs["pred"], inputs["target"], target_rows(inputs)
    masks = list(inputs["ids"].split(target.shape[0]))
    return {
        "published": lambda: published(pred, target, masks),
        "gather_first": lambda: gather_first(pred, target, rows),
    }


def rectangular_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    pred, target, rows = inputs["pred"], inputs["target"], target_rows(inputs)
    found = eager_rivals(inputs)
    if pred.dtype == torch.float32:  # compiling takes many seconds
        fast = compiled(gather_first)
        found["compile"] = lambda: fast(pred, target, rows)
    return found


def video_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    pred, target, norm, rows = inputs["pred"], inputs["target"], inputs["norm"], target_rows(inputs)
    masks = list(inputs["ids"].split(target.shape[0]))
    found = {"published": lambda: published_video(pred, target, masks, norm)}
    if pred.dtype == torch.float32:
        fast = compiled(gather_first_video)
        found["compile"] = lambda: fast(pred, target, rows, norm)
    return found


def packed_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    pred, target, rows, packing = inputs["pred"], inputs["target"], target_rows(inputs), inputs["packing"]
    mask = packing.sequence_of_token() // target.shape[0]
    tokens = mask.bincount()
    weights = 1.0 / (tokens[mask] * len(tokens))
    return {"gather_first": lambda: gather_first_packed(pred, target, rows, weights)}


def moved(inputs: Inputs, stage: str) -> float:
    """Predictions, and each target row that any mask names; backward also writes the gradient."""
    pred, target = inputs["pred"], inputs["target"]
    row_bytes = target.shape[2] * target.element_size()
    passes = 2 if stage == "backward" else 1
    return passes * nbytes(pred) + nbytes(inputs["ids"]) + target_rows(inputs).unique().numel() * row_bytes


def flops(inputs: Inputs, stage: str) -> float:
    return inputs["pred"].numel() * (FORWARD_OPS + (BACKWARD_OPS if stage == "backward" else 0))


def workload(name: str, make: Any, rivals: Any, **options: Any) -> Workload:
    return Workload(name, make, bytes=moved, flops=flops, rivals=rivals, grads=("pred",), **options)


LENGTHS = [33, 54, 40, 35, 48, 36, 42, 45] * 16  # tokens of 4 masks of 32 images: the sizes that I-JEPA's blocks take

WORKLOADS = (
    workload("ijepa_vit_h14_b32", cases.rectangular(32, 256, 1280, 4, 40), rectangular_rivals,
             dtypes=("float32", "bfloat16")),
    workload("ijepa_vit_h14_b128", cases.rectangular(128, 256, 1280, 4, 40), rectangular_rivals,
             small=cases.rectangular(32, 256, 1280, 4, 40), dtypes=("float32", "bfloat16")),
    workload("ijepa_vit_h14_b128_42", cases.rectangular(128, 256, 1280, 4, 42), rectangular_rivals,
             small=cases.rectangular(2, 256, 1280, 4, 42), dtypes=("bfloat16",), devices=("cuda",)),
    workload("vjepa2_vit_g_b24", cases.normed(cases.rectangular(24, 2048, 1408, 2, 972, kind="l1")), video_rivals,
             small=cases.normed(cases.rectangular(1, 2048, 1408, 2, 972, kind="l1")), dtypes=("bfloat16",),
             devices=("cuda",)),
    workload("vjepa2_vit_g_b8", cases.normed(cases.rectangular(8, 2048, 1408, 2, 972, kind="l1")), video_rivals,
             small=cases.normed(cases.rectangular(1, 2048, 1408, 2, 972, kind="l1")), dtypes=("float32", "bfloat16")),
    workload("ijepa_vit_h14_b32_packed", cases.packed(32, 256, 1280, LENGTHS), packed_rivals),
    workload("ijepa_vit_s16_b8", cases.rectangular(8, 196, 384, 4, 33), eager_rivals, smoke=True),
)  # fmt: skip
SMALL = (workload("small", cases.rectangular(2, 64, 96, 2, 17), eager_rivals, dtypes=("float32", "bfloat16")),)


@each("latent_loss", WORKLOADS)
def test_latent_loss(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
