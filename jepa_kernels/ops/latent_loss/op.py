"""Public face of `latent_loss`."""

from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import INT64, check_ids, check_number, check_packing, check_tensor, fail
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import FLOATS, Kernel, select, short
from jepa_kernels.ops.latent_loss import reference
from jepa_kernels.packing import Packing

OP = "latent_loss"
KINDS = ("smooth_l1", "l1", "l2")
REDUCTIONS = ("mask", "token")

MIN_BETA = 1e-30  # its inverse is an fp32 number


def _limit(target: torch.dtype) -> str | None:
    return None if target in FLOATS else f"takes targets of {', '.join(map(short, FLOATS))}, got {short(target)}"


KERNELS = (Kernel("triton", limit=_limit), Kernel("cpu", limit=_limit))


def latent_loss(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    *,
    packing: Packing | None = None,
    kind: str = "smooth_l1",
    beta: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-5,
    reduction: str = "mask",
    backend: str | None = None,
) -> Tensor:
    """Compare predictions with the target latents they stand for: gather, layer norm, distance and mean in one pass.

    t = (y - mean y) / sqrt(var y + eps), y = target[m % B, ids[m, k]] (packed: image s % B of sequence s)
    smooth_l1: d^2 / (2 beta) where |d| < beta, else |d| - beta / 2; l1: |d|; l2: d^2, with d = pred - t

    pred: [M, K, E] with M = masks * B (mask-major), or packed [T, E]; fp32, bf16 or fp16, any strides.
    target: [B, N, E], fp32, bf16 or fp16 (its own dtype), any strides; only the rows that ids name are read.
    ids: int64 in [0, N), increasing in each row: [M, K], or [T] with a packing of masks * B sequences. None: pred is
        [M, N, E] and every token counts.
    beta: >= 1e-30, in units of the normalised target. eps: > 0. normalize: False compares with y itself.
    reduction: "mask" is the mean over the tokens of each mask, then over the masks that have tokens (as published);
        "token" the mean over all tokens. No tokens: 0.

    Returns an fp32 scalar, also under autocast: statistics are never lowered. Gradient: of pred only, in its dtype.
    The forward pass writes it for a unit gradient; backward scales it. Summed in a fixed order: the same bits on
    every run and for any number of threads.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: I-JEPA (arXiv:2301.08243) section 3; V-JEPA (arXiv:2404.08471) section 3 for l1.
    """
    _check(pred, target, ids, packing, kind, beta, eps, reduction)
    backend = select(OP, KERNELS, backend, pred, target.dtype)
    if backend == "reference":
        return reference.forward(
            pred,
            target,
            ids,
            packing=packing,
            kind=kind,
            beta=beta,
            normalize=normalize,
            eps=eps,
            reduction=reduction,
        )
    cu_seqlens = None if packing is None else packing.cu_seqlens
    with_grad = torch.is_grad_enabled() and pred.requires_grad
    target = target.detach() if target.requires_grad else target
    loss, _ = _loss(pred, target, ids, cu_seqlens, kind, beta, normalize, eps, reduction, with_grad, backend)
    return loss


def _check(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    packing: Packing | None,
    kind: str,
    beta: float,
    eps: float,
    reduction: str,
) -> None:
    check_packing(OP, packing)
    check_tensor(OP, "pred", pred, "M K E" if packing is None else "T E")
    check_tensor(OP, "target", target, "B N E", device=pred.device)
    shape, (images, count, channels) = pred.shape, target.shape
    if shape[-1] != channels:
        fail(OP, "target", f"have {shape[-1]} channels like pred", channels, "pass latents of one width")
    if kind not in KINDS:
        fail(OP, "kind", f"be one of {', '.join(KINDS)}", repr(kind), "leave it out for smooth_l1")
    if reduction not in REDUCTIONS:
        fail(OP, "reduction", f"be one of {', '.join(REDUCTIONS)}", repr(reduction), "leave it out for mask")
    check_number(OP, "beta", beta)
    check_number(OP, "eps", eps)
    if not beta >= MIN_BETA:
        fail(OP, "beta", f"be at least {MIN_BETA}", beta, "use kind='l1' for beta = 0")
    if not eps > 0:
        fail(OP, "eps", "be greater than 0", eps, "use 1e-5")
    _check_rows(shape, images, count, pred.device, ids, packing)


def _check_rows(
    shape: torch.Size, images: int, count: int, device: torch.device, ids: Tensor | None, packing: Packing | None
) -> None:
    """Of pred's rows: `shape` is pred's."""
    if ids is None:
        if packing is not None:
            fail(OP, "ids", "be given with a packing", "None", "pass the packed ids [T]", TypeError)
        if shape[1] != count:
            fail(OP, "pred", f"hold {count} tokens like target", shape[1], "pass ids for a subset")
    else:
        check_tensor(OP, "ids", ids, "M K" if packing is None else "T", dtypes=INT64, device=device)
        if ids.shape != shape[:-1]:
            fail(OP, "ids", f"have shape {tuple(shape[:-1])} like pred", tuple(ids.shape), "pass one id a token")
        if not ids.is_contiguous():
            fail(OP, "ids", "be contiguous", f"strides {ids.stride()}", "call .contiguous()")
    rows, cu_seqlens = shape[0], None
    if packing is not None:
        if packing.tokens != rows:
            fail(OP, "pred", f"hold packing.tokens = {packing.tokens} rows", rows, "pack it with the same lengths")
        rows, cu_seqlens = packing.sequences, packing.cu_seqlens
        if cu_seqlens.device != device:
            fail(OP, "packing", f"be on {device}", cu_seqlens.device, "build it there, or use .to(device)")
    if rows % images if images else rows:
        name = "pred" if packing is None else "packing"
        fail(OP, name, f"hold a multiple of the {images} images", rows, "order rows mask-major: s = mask * B + b")
    if ids is not None:
        check_ids(OP, ids, count, cu_seqlens)


FORWARD = (
    "(Tensor pred, Tensor target, Tensor? ids, Tensor? cu_seqlens, str kind, float beta, bool normalize, float eps,"
    " str reduction, bool with_grad, str backend) -> (Tensor loss, Tensor unit)"
)


def _unit_dtype(pred: torch.dtype) -> torch.dtype:
    """The type the unit gradient is kept in: 1 / count underflows in fp16."""
    return torch.float32 if pred == torch.float16 else pred


def _fake(pred: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    with_grad = rest[-2]
    unit = pred.new_empty(pred.shape if with_grad else 0, dtype=_unit_dtype(pred.dtype))
    return pred.new_empty((), dtype=torch.float32), unit


def _backward_fake(grad: Tensor, unit: Tensor, half: bool, backend: str) -> Tensor:
    return unit.new_empty(unit.shape, dtype=torch.float16 if half else unit.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.half, ctx.backend = inputs[0].dtype == torch.float16, inputs[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (unit,) = ctx.saved_tensors
    return (_dpred(grad, unit, ctx.half, ctx.backend), *(None,) * 10)


# Whether the running backward was given retain_graph=True.
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


def _dpred(grad: Tensor | None, unit: Tensor, half: bool, backend: str) -> Tensor | None:
    if grad is None:
        return None
    # loss.backward() itself, where reading the scalar is no device sync: what the forward pass wrote is the gradient.
    # Given away, as its owner may change it: only where no later backward can ask for it again.
    if type(grad) is Tensor and grad.device.type == "cpu" and not half and not _graph_is_kept() and float(grad) == 1.0:
        return unit
    return _backward(grad, unit, half, backend)


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", "(Tensor grad, Tensor unit, bool half, str backend) -> Tensor", _backward_fake)
_loss = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
