"""Specification of `info_nce`: the matrix of similarities, and a cross-entropy along each of its sides."""

import torch
from torch import Tensor


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
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # meta has none
        x, y = x.to(wide), y.to(wide)
        if normalize:
            x, y = _direction(x), _direction(y)
        scores = x @ y.mT / (temperature.to(wide) if isinstance(temperature, Tensor) else temperature)
        if x.shape[0] == 0:
            return scores.sum()
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if duplicates is not None:
            allowed = (duplicates[:, None] != duplicates[None, :]) | allowed.diag().diag()
        return (_entropy(scores, allowed, label_smoothing) + _entropy(scores.mT, allowed, label_smoothing)) / 2


def _direction(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)  # the squares of fp32 may be none
    return x / norm.clamp_min(1e-12).to(x.dtype)


def _entropy(scores: Tensor, allowed: Tensor, smoothing: float) -> Tensor:
    """Mean over rows of the cross-entropy with the diagonal; a row's other candidates are those allowed."""
    top = scores.masked_fill(~allowed, float("-inf"))
    loss = top.logsumexp(1) - (1 - smoothing) * scores.diagonal()
    if smoothing:
        loss = loss - smoothing * (scores * allowed).sum(1) / allowed.sum(1)
    return loss.mean()
