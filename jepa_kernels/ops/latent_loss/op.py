"""Public face of `latent_loss`."""

import math
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import (
    INT64,
    check_ids,
    check_number,
    check_packing,
    check_placed,
    check_tensor,
    fail,
    sizes_of,
)
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import FLOATS, Kernel, select, short
from jepa_kernels.ops.latent_loss import reference
from jepa_kernels.packing import Packing

OP = "latent_loss"
KINDS = ("smooth_l1", "l1", "l2")
REDUCTIONS = ("mask", "token")

MIN_BETA, MAX_BETA = 1e-30, 1e30  # it and its inverse are fp32 numbers
WEIGHTS = (torch.float32, torch.float64)


def _limit(call: tuple[torch.dtype, Tensor | None, reference.Norm | None]) -> str | None:
    target, weight, norm = call
    if target not in FLOATS:
        return f"takes targets of {', '.join(map(short, FLOATS))}, got {short(target)}"
    if weight is not None and weight.dtype != torch.float32:
        return f"takes weights of float32, got {short(weight.dtype)}"
    if norm is not None and not (norm[0].dtype in FLOATS and norm[1].dtype in FLOATS):
        return f"takes a norm of {', '.join(map(short, FLOATS))}, got {short(norm[0].dtype)} and {short(norm[1].dtype)}"
    return None


KERNELS = (Kernel("triton", limit=_limit), Kernel("cpu", limit=_limit))


def latent_loss(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    *,
    packing: Packing | None = None,
    kind: str = "smooth_l1",
    beta: float = 1.0,
    power: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-5,
    norm: reference.Norm | None = None,
    levels: int = 1,
    weight: Tensor | None = None,
    reduction: str = "mask",
    backend: str | None = None,
) -> Tensor:
    """Compare predictions with the target latents they stand for: gather, layer norms, distance and mean in one pass.

    y = target[m % B, ids[m, k]], or with norm = (gain, bias, e): (y - mean y) / sqrt(var y + e) * gain + bias
    t = (y - mean y) / sqrt(var y + eps), or y itself where normalize is False; d = pred - t
    smooth_l1: d^2 / (2 beta) where |d| < beta, else |d| - beta / 2; l1: |d|^power / power; l2: d^2

    pred: [M, K, E] with M = masks * B (mask-major), or packed [T, E]; fp32, bf16 or fp16, any strides. Several targets
        of one context are as many masks: the predictions of target j of image b are row j * B + b.
    target: [B, N, E], fp32, bf16 or fp16 (its own dtype), any strides; only the rows that ids name are read.
    ids: int64 in [0, N), increasing in each row: [M, K], or [T] with a packing of masks * B sequences. None: pred is
        [M, N, E] and every token counts.
    beta: 1e-30 to 1e30, in units of the normalised target. power: >= 1, of l1 only; 1 and 2 cost no power.
    normalize: False compares with y itself. eps: > 0, finite.
    norm: the encoder's last layer norm, whose input target then is: weight and bias [E], any floating dtype, and eps.
    levels: E holds this many latents of equal width side by side, those of several layers; each is normalised by
        itself, first by norm with its share of weight and bias, then without affine.
    weight: fp32 [M, K] or [T], of any strides, multiplies each token's loss; the mean still divides by the count.
    reduction: "mask" is the mean over the tokens of each mask, then over the masks that have tokens (as published);
        "token" the mean over all tokens. No tokens: 0.

    Returns an fp32 scalar, also under autocast: statistics are never lowered. Gradient: of pred only, in its dtype;
    target and norm are taken as constants, a weight that requires grad is refused. NaN and infinities propagate.
    The forward pass writes the gradient for a loss of gradient 1; backward scales it. In bf16 a scale that is no power
    of two rounds a second time: off by up to 2^-7 in all, not 2^-8, and for l1 by the same for a whole mask.
    Summed in a fixed order: the same bits on every run and for any number of threads.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: I-JEPA (arXiv:2301.08243) section 3; V-JEPA (arXiv:2404.08471) section 3 for l1; V-JEPA 2.1
    (arXiv:2603.14482) for levels and weights of context tokens (`distance_weights`).
    """
    channels = _check(pred, target, ids, packing, weight)
    _check_distance(kind, beta, power, eps, reduction)
    if not isinstance(normalize, bool):
        fail(OP, "normalize", "be a bool", type(normalize).__name__, "pass True or False", TypeError)
    _check_norm(pred, channels, norm, levels)
    backend = select(OP, KERNELS, backend, pred, (target.dtype, weight, norm))
    if backend == "reference":
        return reference.forward(
            pred,
            target,
            ids,
            packing=packing,
            kind=kind,
            beta=beta,
            power=power,
            normalize=normalize,
            eps=eps,
            norm=norm,
            levels=levels,
            weight=weight,
            reduction=reduction,
        )
    cu_seqlens = None if packing is None else packing.cu_seqlens
    with_grad = torch.is_grad_enabled() and pred.requires_grad
    gain, shift, norm_eps = (None, None, 0.0) if norm is None else norm
    loss, _ = _loss(
        pred, _constant(target), ids, cu_seqlens, kind, beta, normalize, eps, reduction, power, levels,
        _constant(gain), _constant(shift), norm_eps, weight, with_grad, backend,
    )  # fmt: skip
    return loss


def _constant(x: Any) -> Any:
    return x.detach() if x is not None and x.requires_grad else x


DENSE = sizes_of("M K E f", "B N E g", "M K int64|None contiguous", "M K float32|float64|None")
PACKED = sizes_of("S+1 int32", "T E f", "B N E g", "T int64|None contiguous", "T float32|float64|None")


def _check(pred: Tensor, target: Tensor, ids: Tensor | None, packing: Packing | None, weight: Tensor | None) -> int:
    """The number of channels."""
    check_packing(OP, packing)
    cu_seqlens = None if packing is None else packing.cu_seqlens
    sizes = DENSE(pred, target, ids, weight) if packing is None else PACKED(cu_seqlens, pred, target, ids, weight)
    rows, tokens, channels, images, count = sizes or _check_each(pred, target, ids, packing, weight)
    if ids is None and packing is not None:
        fail(OP, "ids", "be given with a packing", "None", "pass the packed ids [T]", TypeError)
    if ids is None and tokens != count:
        fail(OP, "pred", f"hold {count} tokens like target", tokens, "pass ids for a subset")
    if packing is not None and packing.tokens != tokens:
        fail(OP, "pred", f"hold packing.tokens = {packing.tokens} rows", tokens, "pack it with the same lengths")
    if rows % images if images else rows:
        name = "pred" if packing is None else "packing"
        fail(OP, name, f"hold a multiple of the {images} images", rows, "order rows mask-major: s = mask * B + b")
    if weight is not None and weight.requires_grad:
        fail(OP, "weight", "not require grad", "requires_grad=True", "pass weight.detach(): it gets no gradient")
    if ids is not None:
        check_ids(OP, ids, count, cu_seqlens)
    return channels


def _check_each(
    pred: Tensor, target: Tensor, ids: Tensor | None, packing: Packing | None, weight: Tensor | None
) -> tuple[int, ...]:
    """The numbers of masks' rows or sequences, of tokens in one of them or all, of channels, images and patches."""
    check_tensor(OP, "pred", pred, "M K E" if packing is None else "T E")
    check_tensor(OP, "target", target, "B N E", device=pred.device)
    shape, (images, count, channels) = tuple(pred.shape), target.shape  # a slice of torch.Size is a slow one
    if shape[-1] != channels:
        fail(OP, "target", f"have {shape[-1]} channels like pred", channels, "pass latents of one width")
    each = "M K" if packing is None else "T"
    if ids is not None:
        check_tensor(OP, "ids", ids, each, dtypes=INT64, device=pred.device)
        if ids.shape != shape[:-1]:
            fail(OP, "ids", f"have shape {shape[:-1]} like pred", tuple(ids.shape), "pass one id a token")
        if not ids.is_contiguous():
            fail(OP, "ids", "be contiguous", f"strides {ids.stride()}", "call .contiguous()")
    if weight is not None:
        check_tensor(OP, "weight", weight, each, dtypes=WEIGHTS, device=pred.device)
        if weight.shape != shape[:-1]:
            fail(OP, "weight", f"have shape {shape[:-1]} like pred", tuple(weight.shape), "pass one a token")
    if packing is not None:
        check_placed(OP, "packing", packing, pred.device)
        return packing.sequences, shape[0], channels, images, count
    return *shape, images, count


def _check_distance(kind: str, beta: float, power: float, eps: float, reduction: str) -> None:
    numbers = type(beta) is type(power) is type(eps) is float and power == 1.0
    if numbers and MIN_BETA <= beta <= MAX_BETA and 0 < eps < math.inf and kind in KINDS and reduction in REDUCTIONS:
        return  # most calls
    if kind not in KINDS:
        fail(OP, "kind", f"be one of {', '.join(KINDS)}", repr(kind), "leave it out for smooth_l1")
    if reduction not in REDUCTIONS:
        fail(OP, "reduction", f"be one of {', '.join(REDUCTIONS)}", repr(reduction), "leave it out for mask")
    check_number(OP, "beta", beta)
    check_number(OP, "power", power)
    check_number(OP, "eps", eps)
    if not beta >= MIN_BETA:
        fail(OP, "beta", f"be at least {MIN_BETA}", beta, "use kind='l1' for beta = 0")
    if beta > MAX_BETA:
        fail(OP, "beta", f"be at most {MAX_BETA}", beta, "use kind='l2', scaled by 1 / (2 beta)")
    if not 1 <= power < math.inf:
        fail(OP, "power", "be at least 1 and finite", power, "use 1 for the absolute difference")
    if power != 1 and kind != "l1":
        fail(OP, "power", f"be 1 with kind {kind!r}", power, "use kind='l1', |d|^power / power")
    if not 0 < eps < math.inf:
        fail(OP, "eps", "be greater than 0 and finite", eps, "use 1e-5")


NORM = sizes_of("...", "E f", "E g")


def _check_norm(pred: Tensor, channels: int, norm: Any, levels: int) -> None:
    if norm is None and type(levels) is int and levels == 1:
        return
    if not isinstance(levels, int):
        fail(OP, "levels", "be an integer", type(levels).__name__, "pass how many latents lie side by side", TypeError)
    if levels < 1 or channels % levels:
        fail(OP, "levels", f"be at least 1 and divide the {channels} channels", levels, "leave it out for one latent")
    if norm is None:
        return
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        actual = f"{len(norm)} values" if isinstance(norm, (tuple, list)) else type(norm).__name__
        fail(OP, "norm", "be (weight, bias, eps)", actual, "pass (n.weight, n.bias, n.eps) of a LayerNorm n", TypeError)
    if NORM(pred, norm[0], norm[1]) != (channels,):
        _check_gain("norm weight", norm[0], pred, channels)
        _check_gain("norm bias", norm[1], pred, channels)
    check_number(OP, "norm eps", norm[2])
    if not 0 < norm[2] < math.inf:
        fail(OP, "norm eps", "be greater than 0 and finite", norm[2], "use the encoder's, 1e-6")


def _check_gain(name: str, x: Tensor, pred: Tensor, channels: int) -> None:
    check_tensor(OP, name, x, "E", device=pred.device)
    if x.shape[0] != channels:
        fail(OP, name, f"have {channels} channels like pred", x.shape[0], "concatenate those of all levels")


FORWARD = (
    "(Tensor pred, Tensor target, Tensor? ids, Tensor? cu_seqlens, str kind, float beta, bool normalize, float eps,"
    " str reduction, float power, SymInt levels, Tensor? gain, Tensor? shift, float norm_eps, Tensor? weight,"
    " bool with_grad, str backend) -> (Tensor loss, Tensor unit)"
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
    return (_dpred(grad, unit, ctx.half, ctx.backend), *(None,) * 16)


# Whether the running backward was given retain_graph=True.
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


def _dpred(grad: Tensor | None, unit: Tensor, half: bool, backend: str) -> Tensor | None:
    if grad is None:
        return None
    # loss.backward() itself, where reading the scalar is no device sync: what the forward pass wrote is the gradient.
    # Given away, as its owner may change it: only where no later backward can ask for it again.
    if type(grad) is Tensor and grad.is_cpu and not half and not _graph_is_kept() and float(grad) == 1.0:
        return unit
    return _backward(grad, unit, half, backend)


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", "(Tensor grad, Tensor unit, bool half, str backend) -> Tensor", _backward_fake)
_loss = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
