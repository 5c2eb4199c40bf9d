"""Public face of `gather_tokens`."""

from typing import Any

from torch import Tensor

from jepa_kernels._core.check import check_tensor
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.kept import check_kept
from jepa_kernels.ops.gather_tokens import reference
from jepa_kernels.packing import Packing

OP = "gather_tokens"

KERNELS = (Kernel("triton"), Kernel("cpu"))


def gather_tokens(x: Tensor, ids: Tensor, packing: Packing | None = None, *, backend: str | None = None) -> Tensor:
    """Take the tokens that `ids` name from each image.

    Rectangular: out[m, k] = x[m % B, ids[m, k]]. Packed: out[t] = x[s % B, ids[t]] for token t of sequence s.

    x: [B, N, E], fp32, bf16 or fp16, any strides.
    ids: int64 in [0, N), increasing within each row: [M, K] with M = masks * B (mask-major), or [T] with a packing
        of masks * B sequences.

    Returns [M, K, E] or [T, E], contiguous, in x's dtype; rows past the packing's last sequence are 0.
    Gradient: of x; a token chosen by several masks gets the sum in fp32, in the order of the masks.
    Raises ValueError and TypeError for arguments that do not fit. Source: `apply_masks` of I-JEPA
    (arXiv:2301.08243) and V-JEPA (arXiv:2404.08471).
    """
    _check(x, ids, packing)
    backend = select(OP, KERNELS, backend, x)
    if backend == "reference":
        return reference.forward(x, ids, packing)
    return _gather(x, ids, None if packing is None else packing.cu_seqlens, backend)


def _check(x: Tensor, ids: Tensor, packing: Packing | None) -> None:
    check_tensor(OP, "x", x, "B N E")
    images, count, _ = x.shape
    check_kept(OP, ids, packing, images, count, x)


FORWARD = "(Tensor x, Tensor ids, Tensor? cu_seqlens, str backend) -> Tensor"


def _fake(x: Tensor, ids: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(*ids.shape, x.shape[2])


def _backward_fake(
    grad: Tensor, ids: Tensor, cu_seqlens: Tensor | None, batch: int, count: int, backend: str
) -> Tensor:
    return grad.new_empty(batch, count, grad.shape[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(ids, cu_seqlens)
    ctx.batch, ctx.count = x.shape[:2]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    ids, cu_seqlens = ctx.saved_tensors
    return _backward(grad, ids, cu_seqlens, ctx.batch, ctx.count, ctx.backend), None, None, None


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(
    OP,
    "backward",
    "(Tensor grad, Tensor ids, Tensor? cu_seqlens, SymInt batch, SymInt count, str backend) -> Tensor",
    _backward_fake,
)
_gather = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
