"""Specification of `latent_loss`: gather, layer norm without affine, compare, average."""

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_kernels.packing import Packing


def forward(
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
) -> Tensor:
    """The loss, a scalar in fp32 (float64 for float64 inputs)."""
    wide = torch.float64 if pred.dtype == torch.float64 else torch.float32
    images, channels = target.shape[0], target.shape[2]
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
        chosen = target[torch.where(inside, sequence % max(images, 1), 0), torch.where(inside, ids, 0)]
        group = torch.where(inside, sequence // max(images, 1), masks)
    chosen = chosen.detach().to(wide)
    if normalize:
        chosen = F.layer_norm(chosen, (channels,), eps=eps)
    per_token = _distance(pred.to(wide), chosen, kind, beta).sum(-1).flatten()
    return _average(per_token, group.flatten(), masks, channels, reduction)


def _distance(pred: Tensor, target: Tensor, kind: str, beta: float) -> Tensor:
    if kind == "smooth_l1":
        return F.smooth_l1_loss(pred, target, reduction="none", beta=beta)
    return F.l1_loss(pred, target, reduction="none") if kind == "l1" else F.mse_loss(pred, target, reduction="none")


def _average(per_token: Tensor, group: Tensor, masks: int, channels: int, reduction: str) -> Tensor:
    # Group `masks` takes the rows past the last sequence, which do not count.
    sums = per_token.new_zeros(masks + 1).index_add(0, group, per_token)[:masks]
    tokens = per_token.new_zeros(masks + 1).index_add(0, group, torch.ones_like(per_token))[:masks]
    if reduction == "token":
        return sums.sum() / (tokens.sum() * channels).clamp(min=1)
    means = sums / (tokens * channels).clamp(min=1)
    return means.sum() / (tokens > 0).sum().clamp(min=1)
