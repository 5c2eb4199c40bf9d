"""Joining attention over disjoint sets of keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_kernels._core.check import check_tensor, fail
from jepa_kernels._core.select import short

OP = "merge_attention"


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention of the same queries over disjoint sets of keys, as if over all of them at once.

    lse = log sum_p exp(lse_p),  out = sum_p exp(lse_p - lse) out_p

    outs: of each part, [T, H, D] or [B, H, N, D]; lses: fp32 [H, T] or [B, H, N], as `masked_attention_lse` gives them.
    For caches of keys and for keys spread over devices. A query that no part lets see a key: 0, and lse -inf.
    Computed in fp32; out in outs' dtype, lse in fp32. No gradient: that of the lses would be missing.
    Raises ValueError and TypeError for parts that do not match or that need a gradient.
    Source: Rabe and Staats (arXiv:2112.05682); Ring Attention (arXiv:2310.01889).
    """
    if isinstance(outs, Tensor) or isinstance(lses, Tensor):
        fail(OP, "outs and lses", "be lists of tensors", "a tensor", "pass one entry for each part", TypeError)
    if not outs or len(outs) != len(lses):
        fail(OP, "lses", "hold one tensor for each of outs, at least one", f"{len(outs)} and {len(lses)}", "pass pairs")
    rank = getattr(outs[0], "ndim", 0)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensor(OP, f"outs[{i}]", out, "B H N D" if rank == 4 else "T H D", device=outs[0].device)
        check_tensor(OP, f"lses[{i}]", lse, "B H N" if rank == 4 else "H T", dtypes=(torch.float32, torch.float64),
                     device=out.device)  # fmt: skip
        if out.requires_grad and torch.is_grad_enabled():
            remedy = "merge under torch.no_grad(), or attend to all keys at once"
            fail(OP, f"outs[{i}]", "need no gradient", "requires_grad=True", remedy)
        if out.shape != outs[0].shape:
            fail(OP, f"outs[{i}]", f"be like outs[0], {tuple(outs[0].shape)}", tuple(out.shape), "merge equal queries")
        if out.dtype != outs[0].dtype:
            fail(OP, f"outs[{i}]", f"be {short(outs[0].dtype)} like outs[0]", short(out.dtype), "cast them", TypeError)
        rows = out.shape[:3] if rank == 4 else (out.shape[1], out.shape[0])
        if lse.shape != rows:
            fail(OP, f"lses[{i}]", f"have shape {tuple(rows)}", tuple(lse.shape), "pass what masked_attention_lse gave")
    return _merge(torch.stack(list(outs)), torch.stack(list(lses)))


def _merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(0)
    weights = (lses - lse.nan_to_num(neginf=0.0)).exp()  # a row of -inf keeps weights of 0
    weights = (weights if outs.dim() == 5 else weights.transpose(1, 2))[..., None]
    return (outs.to(lses.dtype) * weights).sum(0).to(outs.dtype), lse
