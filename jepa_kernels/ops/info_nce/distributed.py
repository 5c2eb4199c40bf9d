"""`info_nce` over a process group: embeddings travel one rank's rows at a time, log-sum-exps and gradients are merged.

Rank r holds rows of x and y. Against the rows of y of each rank in turn it computes its block of similarities: its own
rows' log-sum-exps merge on the spot, the columns' over the group. Backward walks the same blocks: a rank keeps the
gradient of its x and sends each y's back to where it came from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from jepa_kernels._core.check import FLOATING, fail
from jepa_kernels._core.select import BACKENDS, select
from jepa_kernels.agreement import agree, bits, check_group
from jepa_kernels.ops.info_nce import op, reference
from jepa_kernels.ops.info_nce.items import items_of, shares

FACTS = ("dtype", "E", "backend", "normalize", "label_smoothing", "duplicates", "temperature", "requires_grad")


@dataclass(frozen=True)
class Ranks:
    """Who holds which rows."""

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def rows(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank + 1])

    def shift(self, other: int) -> int:
        """From the place of a row here to that of its pair among the rows of another rank."""
        return self.starts[self.rank] - self.starts[other]

    def source(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def blocks(self, local: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its rows) in order of ranks; ranks without rows are left out. Their bytes travel, of any dtype."""
        for rank, size in enumerate(self.sizes):
            if size:
                shape = (size, *local.shape[1:])
                block = local.contiguous() if rank == self.rank else local.new_empty(shape)
                dist.broadcast(block.view(torch.uint8), self.source(rank), self.group)
                yield rank, block

    def gather(self, local: Tensor) -> Tensor:
        return torch.cat([local[:0], *(block for _, block in self.blocks(local))])

    def sum(self, x: Tensor) -> Tensor:
        """Over ranks, in place; the same bits on each."""
        dist.all_reduce(x, group=self.group)
        return x


class Options(NamedTuple):
    """Of a call: the same on every rank."""

    smoothing: float
    normalize: bool
    backend: str


def over_ranks(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    label_smoothing: float,
    duplicates: Tensor | None,
    group: Any,
    backend: str | None,
) -> Tensor:
    """The loss of the rows of all ranks; see `info_nce`."""
    if torch.compiler.is_compiling():
        fail(op.OP, "group", "be None under torch.compile", "a group", "call it inside torch.compiler.disable")
    check_group(op.OP, group)
    facts: list[int | Tensor] | Exception
    try:
        op.check_arguments(x, y, temperature, normalize, label_smoothing, duplicates)
        backend = select(op.OP, op.KERNELS, backend, x)
        facts = _facts(x, y, temperature, normalize, label_smoothing, duplicates, backend)
    except Exception as error:  # the others wait for this rank: they must hear of it, whatever it is
        facts = error
    sizes = agree(op.OP, group, FACTS, facts, 0 if isinstance(facts, Exception) else x.shape[0])
    ranks = Ranks(group, dist.get_rank(group), sizes)
    labels = None if duplicates is None else ranks.gather(duplicates)
    if backend == "reference":
        x, y = (_Gather.apply(t, ranks) for t in (x, y))
        return reference.forward(
            x, y, temperature, normalize=normalize, label_smoothing=label_smoothing, duplicates=labels
        )
    options = Options(float(label_smoothing), normalize, str(backend))
    items = None if labels is None else items_of(labels)
    return _OverRanks.apply(x, y, op.as_tensor(temperature, x.device), items, ranks, options)


def _facts(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    smoothing: float,
    duplicates: Tensor | None,
    backend: str,
) -> list[int | Tensor]:
    """What must be the same on every rank, as whole numbers."""
    # Of each tensor: the reference gathers each by itself, and its backward takes part in the others'.
    wanted = [torch.is_grad_enabled() and isinstance(t, Tensor) and t.requires_grad for t in (x, y, temperature)]
    leaves = sum(2**place for place, needs in enumerate(wanted) if needs)
    options = [int(normalize), bits(smoothing), int(duplicates is not None), bits(temperature), leaves]
    return [FLOATING.index(x.dtype), x.shape[1], BACKENDS.index(backend), *options]


class _Gather(torch.autograd.Function):
    """All rows on every rank; their gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.ranks
        wide = ranks.sum(grad.clone() if grad.dtype == torch.float64 else grad.float().clone())
        return wide[ranks.rows(ranks.rank)].to(grad.dtype), None


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, temperature: Tensor, items: Tensor | None, ranks: Ranks, options: Options
    ) -> Tensor:
        row_lse, col_lse, share, loss = _statistics(x, y, temperature, items, ranks, options)
        ctx.save_for_backward(x, y, temperature, items, row_lse, col_lse, share)
        ctx.ranks, ctx.options = ranks, options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(grad, ctx.saved_tensors, ctx.ranks, ctx.options), None, None, None)


def _part(x: Tensor | None, ranks: Ranks, rank: int) -> Tensor | None:
    return None if x is None else x[ranks.rows(rank)]


def _statistics(
    x: Tensor, y: Tensor, temperature: Tensor, items: Tensor | None, ranks: Ranks, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Log-sum-exps of own rows and of all columns, shares of label smoothing of all rows, and the loss."""
    smoothing, normalize, backend = options
    own = ranks.rows(ranks.rank)
    row_lse = x.new_full((x.shape[0],), float("-inf"), dtype=torch.float64)
    col_lse = x.new_full((ranks.total,), float("-inf"), dtype=torch.float64)
    row_sum, col_sum, diagonal = torch.zeros_like(row_lse), torch.zeros_like(col_lse), torch.zeros_like(row_lse)
    for rank, block in ranks.blocks(y):
        at = ranks.rows(rank)
        rows, columns, pairs, *sums = op.forward_block(
            x, block, temperature, _part(items, ranks, ranks.rank), _part(items, ranks, rank), ranks.shift(rank),
            smoothing, normalize, backend,
        )  # fmt: skip
        row_lse, col_lse[at] = torch.logaddexp(row_lse, rows), columns
        if rank == ranks.rank:
            diagonal = pairs.double()
        if smoothing:
            row_sum, col_sum[at] = row_sum + sums[0], sums[1]
    top = col_lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, ranks.group)
    col_lse = top + ranks.sum((col_lse - top).exp()).log()
    total = row_lse.sum() + col_lse[own].sum() - 2 * (1 - smoothing) * diagonal.sum()
    share = None
    if smoothing:
        share = shares(smoothing, items, col_lse)
        total = total - (share[own] * (row_sum + ranks.sum(col_sum)[own])).sum()
    return row_lse, col_lse, share, (ranks.sum(total) / (2 * max(ranks.total, 1))).float()


def _gradients(grad: Tensor, saved: tuple[Any, ...], ranks: Ranks, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, y and the temperature: of the sum over ranks of grad * loss."""
    x, y, temperature, items, row_lse, col_lse, share = saved
    weight = torch.full((), 1 / (2 * max(ranks.total, 1)), dtype=torch.float32, device=x.device)
    dx, dy = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (x, y))
    heat = torch.zeros_like(temperature)
    for rank, block in ranks.blocks(y):
        part_x, part_y, part_heat = op.backward_block(
            weight, x, block, temperature, _part(items, ranks, ranks.rank), _part(items, ranks, rank),
            row_lse, col_lse[ranks.rows(rank)], _part(share, ranks, ranks.rank), _part(share, ranks, rank),
            ranks.shift(rank), 1 - options.smoothing, options.normalize, True, options.backend,
        )  # fmt: skip
        dx += part_x
        heat += part_heat
        dist.reduce(part_y, ranks.source(rank), group=ranks.group)
        if rank == ranks.rank:
            dy = part_y
    everywhere = ranks.sum(grad.float().clone())
    # The temperature is each rank's own: its gradient is that of the loss which this rank returns.
    return dx.mul_(everywhere).to(x.dtype), dy.mul_(everywhere).to(y.dtype), ranks.sum(heat) * grad
