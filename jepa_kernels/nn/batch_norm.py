"""Batch normalisation whose batch is that of all ranks, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.nn.sync import one_batch


class BatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of rows [N, C] that, in training in a process group, normalises by the rows of all ranks.

    N may differ between ranks. Forward takes two sums over ranks and backward two; gradients averaged over ranks, as
    DistributedDataParallel does, are those of one process with all rows. torch.nn.SyncBatchNorm does the same on GPUs
    alone. In one process, a group of one rank, and evaluation mode it is `nn.BatchNorm1d` to the last bit.
    group: ranks whose rows count as one batch; None: all ranks, where a default group has been initialised.
    Raises ValueError for other shapes, and in training for fewer than two rows in all.
    """

    def __init__(self, num_features: int, *, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> the same shape and dtype."""
        if x.dim() != 2 or x.shape[1] != self.num_features:
            remedy = "flatten all dimensions but the features"
            fail("BatchNorm1d", "x", f"be rows [N, {self.num_features}]", list(x.shape), remedy)
        group = one_batch(self.group)
        if not self.training or group is None or dist.get_world_size(group) == 1:
            return super().forward(x)
        wide = x.float() if x.dtype.itemsize < 4 else x
        total = _Sum.apply(torch.cat([wide.sum(0), wide.new_full((1,), len(wide))]), group)
        count = total[-1].detach()
        if len(x) < 2 and count < 2:  # a GPU is waited for where this rank leaves it open
            fail("BatchNorm1d", "x", "be at least 2 rows in all ranks", int(count), "pass larger batches")
        centered = wide - total[:-1] / count
        variance = _Sum.apply(centered.square().sum(0), group) / count
        self._track(total[:-1].detach() / count, variance.detach() * count / (count - 1))
        weight, bias = (None if p is None else p.to(wide.dtype) for p in (self.weight, self.bias))
        normed = centered * (variance + self.eps).rsqrt()
        return (normed if weight is None else torch.addcmul(bias, normed, weight)).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as `nn.BatchNorm1d` does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """Over ranks; the gradient too is summed, since every rank's loss depends on every rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
