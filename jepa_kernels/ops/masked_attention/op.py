"""Public face of `masked_attention`."""

from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.autocast import autocast
from jepa_kernels._core.check import check_number, check_packing, check_tensor, fail
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import Kernel, select, short
from jepa_kernels.ops.masked_attention import reference, sdpa
from jepa_kernels.packing import Packing

OP = "masked_attention"


def _only_without_grad(needs_grad: bool) -> str | None:
    return "its backward may add in any order: taken only when named" if needs_grad else None


KERNELS = (
    Kernel("cpu"),
    Kernel("sdpa", automatic=_only_without_grad),
)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None = None,
    *,
    k_packing: Packing | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend inside each sequence: out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j].

    Dense: q [B, H, N, D], k and v [B, Hk, M, D] -> [B, H, N, D], a view of contiguous [B, N, H, D].
    Packed: q [T, H, D], k and v [Tk, Hk, D] -> [T, H, D]. Sequence s of `packing` looks at all keys of sequence s of
        `k_packing` (None: the same packing) and at no others.

    q, k, v: fp32, bf16 or fp16, one dtype, any strides (views of a GEMM's qkv output are read in place). Hk divides
        H: query head h reads key head h // (H / Hk). D: a multiple of 8 in 8..128.
    scale: > 0; None: D ** -0.5.

    A sequence without keys gives 0, with gradients 0. Rows past a packing's last sequence are never read; their
    outputs and gradients are 0. Products and softmax accumulate in fp32. Under autocast q, k and v are cast to its
    low type. A packed sequence gets the same bits as alone; two runs, and any number of threads, give the same bits.
    Gradient: of q, k and v; the weights are computed again, so that nothing of size N x M is kept.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: Vaswani et al. (arXiv:1706.03762); memory-saving form by Rabe and Staats (arXiv:2112.05682) and
    FlashAttention (arXiv:2205.14135).
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, packing, k_packing, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    backend = select(OP, KERNELS, backend, q, needs_grad)
    if backend == "reference":
        return reference.forward(q, k, v, packing, k_packing=k_packing, scale=scale)
    if backend == "sdpa":
        return sdpa.forward(q, k, v, packing, k_packing, scale)
    cu_seqlens = None if packing is None else packing.cu_seqlens
    k_cu_seqlens = cu_seqlens if k_packing is None else k_packing.cu_seqlens
    return _attention(q, k, v, cu_seqlens, k_cu_seqlens, scale, backend)


def _check(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, k_packing: Packing | None, scale: float | None
) -> None:
    check_packing(OP, packing)
    check_packing(OP, k_packing, "k_packing")
    dense = packing is None
    check_tensor(OP, "q", q, "B H N D" if dense else "T H D")
    device, dtype, keys = q.device, q.dtype, "B Hk M D" if dense else "Tk Hk D"
    for name, x in (("k", k), ("v", v)):
        check_tensor(OP, name, x, keys, device=device)
        if x.dtype != dtype:
            fail(OP, name, f"be of dtype {short(dtype)} like q", short(x.dtype), "cast all three alike", TypeError)
    q_shape, k_shape = q.shape, k.shape
    heads, key_heads, width = q_shape[1], k_shape[1], q_shape[-1]
    if width % 8 or not 8 <= width <= 128:
        fail(OP, "q", "have a head dim D that is a multiple of 8 in 8..128", width, "pad the heads with zeros")
    if k_shape[-1] != width:
        fail(OP, "k", f"have a head dim of {width} like q", k_shape[-1], "project q and k to one width")
    if v.shape != k_shape:
        fail(OP, "v", f"have shape {tuple(k_shape)} like k", tuple(v.shape), "pass a value for every key")
    if dense and k_shape[0] != q_shape[0]:
        fail(OP, "k", f"hold {q_shape[0]} sequences like q", k_shape[0], "expand it over the batch")
    if heads % key_heads if key_heads else heads:
        fail(OP, "k", f"have a number of heads that divides q's {heads}", key_heads, "repeat or drop heads")
    if scale is not None:
        check_number(OP, "scale", scale)
        if not 0 < scale < float("inf"):
            fail(OP, "scale", "be finite and greater than 0", scale, "leave it out for D ** -0.5")
    _check_packings(q, k, packing, k_packing)


def _check_packings(q: Tensor, k: Tensor, packing: Packing | None, k_packing: Packing | None) -> None:
    if packing is None:
        if k_packing is not None:
            fail(OP, "packing", "be given with k_packing", "None", "pass the packing of q", TypeError)
        return
    key_packing = packing if k_packing is None else k_packing
    for name, x, its in (("q", q, packing), ("k", k, key_packing)):
        if its.tokens != x.shape[0]:
            remedy = "pack it with the same lengths" if name == "q" else "pass k_packing where lengths differ"
            fail(OP, name, f"hold {its.tokens} rows like its packing", x.shape[0], remedy)
        if its.cu_seqlens.device != x.device:
            argument = "packing" if name == "q" else "k_packing"
            fail(OP, argument, f"be on {x.device}", its.cu_seqlens.device, "build it there, or use .to(device)")
    if key_packing.sequences != packing.sequences:
        fail(OP, "k_packing", f"hold {packing.sequences} sequences like packing", key_packing.sequences,
             "give every sequence its keys, or none by a length of 0")  # fmt: skip


FORWARD = "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? k_cu_seqlens, float scale, str backend) -> Tensor"
BACKWARD = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? k_cu_seqlens, float scale, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


def _empty_like(x: Tensor) -> Tensor:
    """[T, H, D], or a [B, H, N, D] view of contiguous [B, N, H, D]: the layout of every output and gradient."""
    if x.dim() == 3:
        return x.new_empty(x.shape)
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return _empty_like(q)


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None, None)


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", BACKWARD, _backward_fake)
_attention = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
