"""assemble_tokens: the predictor's sequences of V-JEPA 2 (both masks, RoPE) and of I-JEPA (four masks, positions)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Inputs, Workload, each
from jepa_kernels.ops.assemble_tokens import cases


def take(x: Tensor, ids: Tensor) -> Tensor:
    """As published: the index repeated for every channel, in memory."""
    return x.gather(1, ids[..., None].repeat(1, 1, x.shape[-1]))


def sorted_and_back(context: Tensor, token: Tensor, context_ids: Tensor, target_ids: Tensor, count: int) -> Tensor:
    """V-JEPA 2: a token for every patch, gathered; concatenated; sorted by id, which its last layer undoes."""
    tokens = token.repeat_interleave(len(target_ids) // len(token), 0)[:, None].repeat(1, count, 1)
    x = torch.cat([context, take(tokens, target_ids).to(context.dtype)], 1)
    order = torch.cat([context_ids, target_ids], 1).argsort(1)
    return take(take(x, order), order.argsort(1))


def repeated(context: Tensor, token: Tensor, context_ids: Tensor, target_ids: Tensor, pos: Tensor) -> Tensor:
    """I-JEPA: a position table for every image, gathered; tokens and contexts repeated; concatenated."""
    context = context + take(pos.repeat(len(context), 1, 1), context_ids)
    places = take(pos.repeat(len(target_ids), 1, 1), target_ids)
    target = token.repeat(len(target_ids), target_ids.shape[1], 1) + places
    return torch.cat([context.repeat(len(target_ids) // len(context), 1, 1), target], 1)


def cat(context: Tensor, token: Tensor, context_ids: Any, target_ids: Tensor, pos: Tensor | None) -> Tensor:
    """The short form: nothing repeated that need not be."""
    sequences, places = target_ids.shape
    target = token.repeat_interleave(sequences // len(token), 0)[:, None].expand(-1, places, -1)
    if pos is not None:
        context, target = context + F.embedding(context_ids, pos), target + F.embedding(target_ids, pos)
    return torch.cat([context.repeat(sequences // len(context), 1, 1), target], 1).to(context.dtype)


class Copied(torch.autograd.Function):
    """Contexts and targets copied to their rows, which are distinct: the backward only reads."""

    @staticmethod
    def forward(ctx: Any, context: Tensor, target: Tensor, context_rows: Tensor, target_rows: Tensor) -> Tensor:
        x = context.new_empty((context_rows.numel() + len(target), target.shape[1]))
        x.index_copy_(0, target_rows, target)
        for rows in context_rows:
            x.index_copy_(0, rows, context)
        ctx.save_for_backward(context_rows, target_rows)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        context_rows, target_rows = ctx.saved_tensors
        d_context = grad.index_select(0, context_rows[0])
        for rows in context_rows[1:]:
            d_context += grad.index_select(0, rows)
        return d_context, grad.index_select(0, target_rows), None, None


def rows_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The row of every context token for each mask [masks, Tc], and of every target token [Tt]."""
    contexts, targets, packing = (inputs[n].cu_seqlens.long() for n in ("context_packing", "target_packing", "packing"))
    device = packing.device

    def rows(start: Tensor, cu: Tensor) -> Tensor:
        owner = torch.repeat_interleave(cu.diff())
        return start[owner] + torch.arange(len(owner), device=device) - cu[owner]

    kept, masks = contexts.diff(), (len(targets) - 1) // (len(contexts) - 1)
    starts = packing[:-1].view(masks, -1)
    return torch.stack([rows(start, contexts) for start in starts]), rows(packing[:-1] + kept.repeat(masks), targets)


def copied(inputs: Inputs) -> Callable[[], Any]:
    context_rows, target_rows = rows_of(inputs)
    dtype, pos = inputs["context"].dtype, inputs["pos_embed"]

    def run() -> Tensor:
        context = inputs["context"] + pos.index_select(0, inputs["context_ids"])
        target = inputs["mask_token"] + pos.index_select(0, inputs["target_ids"])
        return Copied.apply(context.to(dtype), target.to(dtype), context_rows, target_rows)

    return run


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    if inputs.get("packing") is not None:
        return {"index_copy": copied(inputs)}
    context, token, pos, targets = (inputs[n] for n in ("context", "mask_token", "pos_embed", "target_ids"))
    if pos is None:
        ids = torch.arange(context.shape[1], device=context.device).expand(context.shape[:2])
        found = {"published": lambda: sorted_and_back(context, token, ids, targets, PATCHES)}
    else:
        ids = inputs["context_ids"]
        found = {"published": lambda: repeated(context, token, ids, targets, pos)}
    return {**found, "cat": lambda: cat(context, token, ids, targets, pos)}


def workload(name: str, make: Any, **options: Any) -> Workload:
    grads = ("context", "mask_token")
    return Workload(name, make, rivals=rivals, grads=grads, **options)


PATCHES = 2048  # 16 frames of 256 x 256 in tubelets of 2 x 16 x 16
CONTEXTS = [42, 66, 84, 96, 101, 111, 117, 123] * 4  # patches kept of 256: the sizes that I-JEPA's contexts take
TARGETS = [33, 54, 40, 35, 48, 36, 42, 45] * 16

WORKLOADS = (
    workload("vjepa2_both_masks_b8", cases.rectangular(16, 508, 1, 972, 384, PATCHES, pos=False, groups=2),
             dtypes=("float32", "bfloat16")),
    workload("vjepa2_both_masks_b24", cases.rectangular(48, 508, 1, 972, 384, PATCHES, pos=False, groups=2),
             small=cases.rectangular(2, 508, 1, 972, 384, PATCHES, pos=False, groups=2), dtypes=("bfloat16",),
             devices=("cuda",)),
    workload("ijepa_b32", cases.rectangular(32, 70, 4, 42, 384, 256), smoke=True),
    workload("ijepa_b32_packed", cases.packed(CONTEXTS, TARGETS, 384, count=256)),
)  # fmt: skip
SMALL = (workload("small", cases.packed((20, 31), (40, 50), 96, count=64), dtypes=("float32", "bfloat16")),)


@each("assemble_tokens", WORKLOADS)
def test_assemble_tokens(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
