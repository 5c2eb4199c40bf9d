"""Public face of `rope` and of its form for queries and keys together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import check_tensor, fail
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import Kernel, select, short
from jepa_kernels.ops.rope import reference
from jepa_kernels.ops.rope.reference import tokens_first
from jepa_kernels.rotary import Rope, rope_of, width_of

OP = "rope"
MAX_WIDTH = 256

KERNELS = (Kernel("cuda"), Kernel("triton"), Kernel("cpu"))


def rope(
    x: Tensor,
    positions: Tensor | Rope,
    *,
    pairing: str = "interleaved",
    theta: float = 10000.0,
    frequencies: Tensor | None = None,
    angle_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Turn pairs of channels by angles that grow with the token's position: rotary position embedding.

    y[i] = x[i] cos(p w[f(i)]) + x'[i] sin(p w[f(i)]) for the A = 2 ((D // a) // 2) channels of each axis, in fp32,
    rounded to x's dtype; the rest is copied. x', f, w and the pairings are those of `Rope`.

    x: [T, H, D], or [B, H, N, D] -> a view of contiguous [B, N, H, D]; fp32, bf16 or fp16, any strides, D in 2 a..256.
        The result is a fresh tensor.
    positions: [T, a], or [N, a] or [B, N, a], 1 to 3 axes, integers or fractions; or a `Rope`, whose table of cosines
        and sines is computed once for all calls, and whose options then stand for those here.
    pairing, theta, frequencies, angle_dtype: as of `Rope`. A bf16 module of the published code is reproduced by its
        own frequencies and angle_dtype=torch.bfloat16; training under autocast by its frequencies alone.

    Under autocast x stays as it is. Gradient: of x, by the transposed turn; none of positions.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: RoFormer (arXiv:2104.09864); V-JEPA 2 (arXiv:2506.09985) section 2; V-JEPA 2.1 (arXiv:2603.14482).
    """
    turning = rope_of(OP, positions, pairing=pairing, theta=theta, frequencies=frequencies, angle_dtype=angle_dtype)
    if not _usual(x, x, turning.positions, turning.positions):
        _check_rows(OP, "x", x, turning.positions)
    backend = select(OP, KERNELS, backend, x)
    if backend == "reference":
        return reference.forward(x, turning)
    turns, _ = turning.turns(x.shape[-1])
    turned, _ = _rope(tokens_first(x), None, _of_rows(turns, x), None, turning.half, backend)
    return tokens_first(turned)


def rope_qk(
    q: Tensor,
    k: Tensor,
    positions: Tensor | Rope,
    *,
    k_positions: Tensor | None = None,
    pairing: str = "interleaved",
    theta: float = 10000.0,
    frequencies: Tensor | None = None,
    angle_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` of queries and keys in one pass over memory, read where a qkv product left them.

    q: [T, H, D] or [B, H, N, D]. k: [Tk, Hk, D] or [B, Hk, M, D], of q's dtype, with any number of heads. Views of
        one [T, 3, H, D] or [B, N, 3, H, D] are read in place.
    positions: of q, and of k too where k_positions is None. Other arguments, results, gradients and errors: as of
        `rope`.

    On one backend masked_attention(q, k, v, rope=r) has the bits of masked_attention(*rope_qk(q, k, r), v); for "half"
    on Triton, where D is a power of two.
    """
    op = "rope_qk"
    turning = rope_of(
        op, positions, k_positions, pairing=pairing, theta=theta, frequencies=frequencies, angle_dtype=angle_dtype
    )
    places = turning.positions if turning.k_positions is None else turning.k_positions
    if not _usual(q, k, turning.positions, places):
        _check_rows(op, "q", q, turning.positions)
        _check_rows(op, "k", k, places)
        _check_pair(op, q, k)
    backend = select(OP, KERNELS, backend, q)
    if backend == "reference":
        return reference.forward_qk(q, k, turning)
    turns, k_turns = turning.turns(q.shape[-1])
    turned, k_turned = _rope(
        tokens_first(q), tokens_first(k), _of_rows(turns, q), _of_rows(k_turns, k), turning.half, backend
    )
    return tokens_first(turned), tokens_first(k_turned)


def _usual(q: Tensor, k: Tensor, positions: Tensor, k_positions: Tensor) -> bool:
    width = width_of(q, k, positions, k_positions)
    return width is not None and 2 * positions.shape[-1] <= width <= MAX_WIDTH


def _check_rows(op: str, name: str, x: Tensor, positions: Tensor) -> None:
    dense = getattr(x, "ndim", 0) == 4
    check_tensor(op, name, x, "B H N D" if dense else "T H D")
    shape, (*places, axes) = x.shape, positions.shape
    tokens = [shape[0], shape[2]][2 - len(places) :] if dense else [shape[0]]
    if places != tokens:
        fail(op, "positions" if name != "k" else "k_positions", f"be of {name}'s tokens {tuple(tokens)}",
             tuple(places), "pass a position for every token")  # fmt: skip
    if positions.device != x.device:
        fail(op, "positions", f"be on {x.device} like {name}", positions.device, "move it with .to(device)")
    if not 2 * axes <= shape[-1] <= MAX_WIDTH:
        wanted = f"have a head dim D in {2 * axes}..{MAX_WIDTH} for {axes} axes"
        fail(op, name, wanted, shape[-1], "give every axis a pair of channels")


def _check_pair(op: str, q: Tensor, k: Tensor) -> None:
    if k.dtype != q.dtype:
        fail(op, "k", f"be of dtype {short(q.dtype)} like q", short(k.dtype), "cast both alike", TypeError)
    shape, own = q.shape, k.shape
    if len(own) != len(shape) or own[-1] != shape[-1] or (len(shape) == 4 and own[0] != shape[0]):
        fail(op, "k", f"fit q's shape {tuple(shape)} but for tokens and heads", tuple(own), "reshape it")


def _of_rows(turns: Tensor, x: Tensor) -> Tensor:
    """[T, 2, R], or [B, N, 2, R]."""
    return turns if turns.dim() == x.dim() else turns.expand(x.shape[0], *turns.shape)


ROWS = "Tensor turns, Tensor? k_turns, bool half, str backend) -> (Tensor q, Tensor k)"
FORWARD = f"(Tensor q, Tensor? k, {ROWS}"
BACKWARD = f"(Tensor grad, Tensor? k_grad, {ROWS}"


def _fake(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, turns, k_turns, ctx.half, ctx.backend = inputs
    if k is None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(turns, k_turns)


def _gradient(ctx: Any, grad: Tensor | None, k_grad: Tensor | None) -> Sequence[Tensor | None]:
    turns, k_turns = ctx.saved_tensors
    if grad is not None and k_grad is not None:
        return (*_backward(grad, k_grad, turns, k_turns, ctx.half, ctx.backend), *(None,) * 4)
    dq, dk = (
        None if g is None else _backward(g, None, t, None, ctx.half, ctx.backend)[0]
        for g, t in ((grad, turns), (k_grad, k_turns))
    )
    return (dq, dk, *(None,) * 4)


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", BACKWARD, _fake)
_rope = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
