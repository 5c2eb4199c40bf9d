"""Specification of `latent_loss`: gather, layer norms, compare, average."""

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_kernels.packing import Packing

Norm = tuple[Tensor, Tensor, float]  # weight, bias, eps


def forward(
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
    norm: Norm | None = None,
    levels: int = 1,
    weight: Tensor | None = None,
    reduction: str = "mask",
) -> Tensor:
    """The loss, a scalar in fp32 (float64 for float64 inputs)."""
    wide = torch.float64 if pred.dtype == torch.float64 else torch.float32
    images, channels = target.shape[0], target.shape[2]
    weight = pred.new_ones(pred.shape[:-1], dtype=wide) if weight is None else weight.to(wide)
    if packing is None or ids is None:  # packed calls always have ids
        rows = pred.shape[0]
        masks = rows // images if images else 0
        image = torch.arange(rows, device=pred.device) % max(images, 1)
        chosen = target[image] if ids is None else target[image[:, None], ids]
        group = (torch.arange(rows, device=pred.device) // max(images, 1))[:, None].expand(pred.shape[:2])
    else:
        masks = packing.sequences // images if images else 0
        sequence = packing.sequence_of_token()
        inside = sequence < packing.sequences
        pred = torch.where(inside[:, None], pred, pred.new_zeros(()))
        weight = torch.where(inside, weight, 0)
        chosen = target[torch.where(inside, sequence % max(images, 1), 0), torch.where(inside, ids, 0)]
        group = torch.where(inside, sequence // max(images, 1), masks)
    chosen = _latents(chosen.detach().to(wide), norm, normalize, eps, levels)
    per_token = _distance(pred.to(wide), chosen, kind, beta, power).sum(-1) * weight
    return _average(per_token.flatten(), group.flatten(), masks, channels, reduction)


def _latents(y: Tensor, norm: Norm | None, normalize: bool, eps: float, levels: int) -> Tensor:
    """Each level by itself: the encoder's norm with its share of the weight and bias, then the norm without affine."""
    width = y.shape[-1] // levels
    t = y.unflatten(-1, (levels, width))
    if norm is not None:
        gain, shift = (x.detach().to(y.dtype).view(levels, width) for x in norm[:2])
        t = F.layer_norm(t, (width,), eps=norm[2]) * gain + shift
    if normalize:
        t = F.layer_norm(t, (width,), eps=eps)
    return t.flatten(-2)


def _distance(pred: Tensor, target: Tensor, kind: str, beta: float, power: float) -> Tensor:
    if kind == "smooth_l1":
        return F.smooth_l1_loss(pred, target, reduction="none", beta=beta)
    if kind == "l2":
        return F.mse_loss(pred, target, reduction="none")
    d = pred - target
    sign = torch.where(d > 0, 1.0, torch.where(d < 0, -1.0, d)).detach()  # NaN stays: the gradient of abs would be 0
    return (d * sign).pow(power) / power


def _average(per_token: Tensor, group: Tensor, masks: int, channels: int, reduction: str) -> Tensor:
    # Group `masks` takes the rows past the last sequence, which do not count.
    sums = per_token.new_zeros(masks + 1).index_add(0, group, per_token)[:masks]
    tokens = per_token.new_zeros(masks + 1).index_add(0, group, torch.ones_like(per_token))[:masks]
    if reduction == "token":
        return sums.sum() / (tokens.sum() * channels).clamp(min=1)
    means = sums / (tokens * channels).clamp(min=1)
    return means.sum() / (tokens > 0).sum().clamp(min=1)
