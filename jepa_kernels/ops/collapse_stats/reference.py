"""Specification of `collapse_stats`."""

import torch
from torch import Tensor

RANK_ROWS = 1024


@torch.no_grad()
def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(std, min_std, rank, cosine), 0-dim, in fp32 (float64 for float64 z)."""
    x = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32).flatten(0, -2)
    if x.numel() == 0:
        return tuple(x.new_zeros(4).unbind())  # type: ignore[return-value]
    std = _centred(x).square().mean(0).sqrt()
    return std.mean(), std.amin(), _rank(x), _cosine(x)


def _centred(x: Tensor) -> Tensor:
    x = x - x[0]  # equal rows give 0 exactly
    return x - x.mean(0)


def _rank(x: Tensor) -> Tensor:
    """(sum l)^2 / sum l^2 of the eigenvalues l of the covariance: trace and Frobenius norm of the smaller product."""
    count = min(len(x), RANK_ROWS)
    chosen = _centred(x[torch.arange(count, device=x.device) * len(x) // count])
    top = chosen.abs().amax()
    chosen = chosen / torch.where(top == 0, 1.0, top)  # the products of no size overflow, or vanish
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # meta has none
        gram = chosen @ chosen.T if count < x.shape[1] else chosen.T @ chosen
    trace = gram.trace()
    return torch.where(trace == 0, 0.0, 1 / (gram / trace).square().sum())


def _cosine(x: Tensor) -> Tensor:
    """Mean over pairs of rows: |sum of unit rows|^2 holds each pair twice, and each row with itself."""
    norm = x.norm(dim=1, keepdim=True)
    unit = torch.where(norm == 0, 0.0, x / norm)
    if len(x) == 1:
        return unit.sum() * 0
    return (unit.sum(0).square().sum() - (norm != 0).sum()) / (len(x) * (len(x) - 1))
