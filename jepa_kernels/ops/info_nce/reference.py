"""Specification of `info_nce`: the matrix of similarities, and a cross-entropy along each of its sides."""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    duplicates: Tensor | None = None,
) -> Tensor:
    """The loss, a scalar in fp32 (float64 for float64 inputs)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(wide), y.to(wide)
        if normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        scores = x @ y.mT / (temperature.to(wide) if isinstance(temperature, Tensor) else temperature)
        if x.shape[0] == 0:
            return scores.sum()
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if duplicates is not None:
            allowed = (duplicates[:, None] != duplicates[None, :]) | allowed.diag().diag()
        return (_entropy(scores, allowed, label_smoothing) + _entropy(scores.mT, allowed, label_smoothing)) / 2


def _entropy(scores: Tensor, allowed: Tensor, smoothing: float) -> Tensor:
    """Mean over rows of the cross-entropy with the diagonal; a row's other candidates are those allowed."""
    top = scores.masked_fill(~allowed, float("-inf"))
    loss = top.logsumexp(1) - (1 - smoothing) * scores.diagonal()
    if smoothing:
        loss = loss - smoothing * (scores * allowed).sum(1) / allowed.sum(1)
    return loss.mean()
