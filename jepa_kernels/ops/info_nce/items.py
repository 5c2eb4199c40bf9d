"""Which rows stand for one item: what masked duplicates share, and how many candidates they leave."""

import torch
from torch import Tensor

MAX_ITEMS = 1 << 24  # whole numbers that fp32, which the kernels compare, tells apart


def items_of(labels: Tensor) -> Tensor:
    """Labels in fp32 [B], small enough to be exact: equal where the int64 labels are."""
    return torch.searchsorted(labels.sort().values, labels).float()


def shares(smoothing: float, items: Tensor | None, like: Tensor) -> Tensor:
    """smoothing / candidates of each row, fp32 [B]: all rows but others of its item."""
    total = like.shape[0]
    if items is None:
        return like.new_full((total,), smoothing / max(total, 1), dtype=torch.float32)
    ordered = items.sort().values
    same = torch.searchsorted(ordered, items, right=True) - torch.searchsorted(ordered, items)
    return smoothing / (total + 1 - same).float()


def mean_loss(
    lse: tuple[Tensor, Tensor], diagonal: Tensor, sums: tuple[Tensor, Tensor], share: Tensor | None, smoothing: float
) -> Tensor:
    """Mean cross-entropy of rows and columns, fp32, summed in float64. lse and sums: of rows, of columns."""
    total = lse[0].sum() + lse[1].sum() - 2 * (1 - smoothing) * diagonal.double().sum()
    if share is not None:
        total = total - (share * sums[0]).sum() - (share * sums[1]).sum()
    return (total / (2 * max(diagonal.shape[0], 1))).float()
