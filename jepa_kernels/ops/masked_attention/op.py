"""Public face of `masked_attention` and its forms."""

from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.autocast import autocast
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.flops import flop_formula
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.ops.masked_attention import limits, reference, sdpa
from jepa_kernels.ops.masked_attention.check import check_options, check_qkv, views_of
from jepa_kernels.ops.masked_attention.layout import empty_like, empty_lse, empty_qkv, views
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope

OP = "masked_attention"

KERNELS = (
    # Before triton: forward and backward together were faster on an H200 in every workload that this row takes
    # (docs/tuning/attention.md).
    Kernel("cuda", dtypes=(torch.bfloat16, torch.float16), limit=limits.hopper),
    Kernel("triton"),
    Kernel("cpu"),
    Kernel("sdpa", limit=limits.gives_no_lse, automatic=limits.only_without_grad),
)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None = None,
    *,
    k_packing: Packing | None = None,
    frame_size: int | None = None,
    key_ranges: Tensor | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend inside each sequence: out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j], over the keys j that i sees.

    Dense: q [B, H, N, D], k and v [B, Hk, M, D] -> [B, H, N, D], a view of contiguous [B, N, H, D].
    Packed: q [T, H, D], k and v [Tk, Hk, D] -> [T, H, D]. Sequence s of `packing` looks at all keys of sequence s of
        `k_packing` (None: the same packing) and at no others.

    q, k, v: fp32, bf16 or fp16, one dtype, any strides (views of a GEMM's qkv output are read in place). Hk divides
        H: query head h reads key head h // (H / Hk). D: a multiple of 8 in 8..128.
    frame_size: causal by frame. Of n queries and m keys of a sequence, query i stands at p = m - n + i (with a cache of
        keys the queries are the last tokens) and sees the first (p // frame_size + 1) * frame_size keys. Divides m
        (unchecked in compiled code, which reads no lengths).
    key_ranges: int32 [T, 2] packed, [N, 2] or [B, N, 2] dense, contiguous: query i sees the keys begin..end-1 of its
        sequence, begin and end in 0..m, in every head; with frame_size, only those that both let it see.
    rope: turns q and k by their positions on the way in, and rounds them to their dtype (see `Rope`).
    scale: > 0; None: D ** -0.5.

    A query that sees no key gives 0, with gradients 0. Keys that are hidden from some queries only must be finite.
    Rows past a packing's last sequence are never read; their outputs and gradients are 0. Products and softmax
    accumulate in fp32. Under autocast q, k and v are cast to its low type. A packed sequence gets the same bits as
    alone on the same backend (on Hopper the longest sequence decides which is taken); two runs, and any number of
    threads, give the same bits.
    Gradient: of q, k and v; the weights are computed again, so that nothing of size N x M is kept.
    Raises ValueError and TypeError for arguments that do not fit; ranges on a GPU are clamped instead.
    Source: Vaswani et al. (arXiv:1706.03762); memory-saving form by Rabe and Staats (arXiv:2112.05682) and
    FlashAttention (arXiv:2205.14135); frames as in V-JEPA 2-AC (arXiv:2506.09985).
    """
    q, k, v = autocast(q, k, v)
    check_qkv(OP, q, k, v, packing, k_packing)
    return _attend(q, k, v, packing, k_packing, frame_size, key_ranges, rope, scale, backend)[0]


def masked_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None = None,
    *,
    k_packing: Packing | None = None,
    frame_size: int | None = None,
    key_ranges: Tensor | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`masked_attention`, and lse[h, i] = log sum_j exp(scale * q[i] . k[j]): what `merge_attention` joins parts by.

    Returns (out, lse): lse fp32, natural logarithm, [H, T] packed or [B, H, N] dense; -inf where a query sees no key.
    Gradient: as of `masked_attention`; none through lse. Arguments and errors: as of `masked_attention`.
    """
    q, k, v = autocast(q, k, v)
    check_qkv("masked_attention_lse", q, k, v, packing, k_packing)
    return _attend(q, k, v, packing, k_packing, frame_size, key_ranges, rope, scale, backend, needs_lse=True)


def masked_attention_qkv(
    qkv: Tensor,
    packing: Packing | None = None,
    *,
    frame_size: int | None = None,
    key_ranges: Tensor | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`masked_attention` of the output of one qkv product, read in place; backward writes one d qkv.

    qkv: [T, 3, H, D] with `packing` -> [T, H, D]; [B, N, 3, H, D] without -> [B, H, N, D]. Saves the pass over memory
    with which autograd stacks three gradients. Other arguments, gradient and errors: as of `masked_attention`.
    """
    (qkv,) = autocast(qkv)
    q, k, v = views_of("masked_attention_qkv", qkv, packing)
    return _attend(q, k, v, packing, None, frame_size, key_ranges, rope, scale, backend, qkv=qkv)[0]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None,
    k_packing: Packing | None,
    frame_size: int | None,
    key_ranges: Tensor | None,
    rope: Rope | None,
    scale: float | None,
    backend: str | None,
    *,
    needs_lse: bool = False,
    qkv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked q, k and v; `qkv`: what they are views of, where one gradient is wanted."""
    if not (frame_size is None and key_ranges is None and rope is None and scale is None):
        check_options(OP, q, k, packing, k_packing, frame_size, key_ranges, rope, scale)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    lengths = _lengths(q, k, packing, k_packing)
    call = limits.Call(needs_grad, needs_lse, (q, k, v), lengths[-2:], (frame_size, key_ranges, rope))
    backend = select(OP, KERNELS, backend, q, call)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend in ("reference", "sdpa"):
        given: Any = dict(k_packing=k_packing, frame_size=frame_size, key_ranges=key_ranges, rope=rope, scale=scale)
        if backend == "sdpa":
            return sdpa.forward(q, k, v, packing, **given), q.new_empty(0)
        return reference.forward_lse(q, k, v, packing, **given)
    masks = _masks(q, frame_size, key_ranges, rope, packing is None)
    if qkv is not None:
        return _attention_qkv(qkv, *lengths, *masks, scale, backend)
    return _attention(q, k, v, *lengths, *masks, scale, backend)


def _lengths(q: Tensor, k: Tensor, packing: Packing | None, k_packing: Packing | None) -> tuple[Any, ...]:
    """cu_seqlens, k_cu_seqlens, tiles, k_tiles, max_queries, max_keys of the schema."""
    if packing is None:
        return None, None, None, None, q.shape[2], k.shape[2]
    keys = packing if k_packing is None else k_packing
    return packing.cu_seqlens, keys.cu_seqlens, packing.tiles, keys.tiles, packing.max_seqlen, keys.max_seqlen


def _masks(
    q: Tensor, frame_size: int | None, key_ranges: Tensor | None, rope: Rope | None, dense: bool
) -> tuple[Any, ...]:
    """frame_size, key_ranges, turns, k_turns, half of the schema."""
    if key_ranges is None and rope is None:
        return int(frame_size or 0), None, None, None, False
    turns, k_turns = (None, None) if rope is None else rope.turns(q.shape[-1])
    if dense:
        key_ranges, turns, k_turns = (
            x if x is None or x.dim() == rank else x.expand(q.shape[0], *x.shape)
            for x, rank in ((key_ranges, 3), (turns, 4), (k_turns, 4))
        )
    return int(frame_size or 0), key_ranges, turns, k_turns, rope is not None and rope.half


OPTIONS = (
    "Tensor? cu_seqlens, Tensor? k_cu_seqlens, Tensor? tiles, Tensor? k_tiles, SymInt max_queries, SymInt max_keys,"
    " SymInt frame_size, Tensor? key_ranges, Tensor? turns, Tensor? k_turns, bool half, float scale"
)
FORWARD = f"(Tensor q, Tensor k, Tensor v, {OPTIONS}, str backend) -> (Tensor out, Tensor lse)"
FORWARD_QKV = f"(Tensor qkv, {OPTIONS}, str backend) -> (Tensor out, Tensor lse)"
BACKWARD = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {OPTIONS}, bool stacked, str backend) -> Tensor[]"
)


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_like(q), empty_lse(q)


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    stacked = rest[-2] if isinstance(rest[-1], str) else rest[-1]
    return [empty_qkv(q)] if stacked else [empty_like(x) for x in (q, k, v)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    options = inputs[-13:-1]
    ctx.backend = inputs[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in options]
    ctx.tensors = [i for i, x in enumerate(options) if isinstance(x, Tensor)]
    ctx.save_for_backward(*inputs[:-13], *output, *(options[i] for i in ctx.tensors))


def _restored(ctx: Any) -> tuple[tuple[Tensor, ...], list[Any]]:
    """(the inputs, out and lse), options: as `_setup` saw them."""
    options, saved = list(ctx.numbers), ctx.saved_tensors
    own = len(saved) - len(ctx.tensors)
    for i, x in zip(ctx.tensors, saved[own:], strict=True):
        options[i] = x
    return saved[:own], options


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved, options = _restored(ctx)
    return (*_backward(grad, *saved, *options, False, ctx.backend), *(None,) * 13)


def _gradient_qkv(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (qkv, out, lse), options = _restored(ctx)
    return (*_backward(grad, *views(qkv), out, lse, *options, True, ctx.backend), *(None,) * 13)


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", BACKWARD, _backward_fake)


def _forward_qkv(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _forward(*views(qkv), *rest)


def _fake_qkv(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(views(qkv)[0])


_attention = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
_attention_qkv = differentiable(f"{OP}_qkv", _forward_qkv, FORWARD_QKV, _fake_qkv, _setup, _gradient_qkv)


def _forward_flops(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> int:
    return 2 * 2 * _pairs(q, k, *options) * q.shape[1] * q.shape[-1]


def _backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any) -> int:
    return 2 * 5 * _pairs(q, k, *options) * q.shape[1] * q.shape[-1]


def _pairs(q: Tensor, k: Tensor, cu: Tensor | None, k_cu: Tensor | None, *options: Any) -> int:
    """Of a query and a key of one sequence, hidden ones too. Counting may wait for the device."""
    if cu is None or k_cu is None:
        return q.shape[0] * q.shape[2] * k.shape[2]
    if type(cu) is not Tensor or cu.is_meta:  # no values: at most
        return q.shape[0] * options[3]
    return int((cu.diff().long() * k_cu.diff()).sum())


flop_formula(f"{OP}_forward", _forward_flops)
flop_formula(f"{OP}_backward", _backward_flops)
flop_formula(OP, _forward_flops)
flop_formula(f"{OP}_qkv", lambda qkv, *rest: _forward_flops(*views(qkv), *rest))
