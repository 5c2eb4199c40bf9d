"""Agreement: the one small collective before an op's others, so that no rank waits for one that raised or differs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from jepa_kernels._core.check import fail


def check_group(op: str, group: Any) -> None:
    """A process group that this rank belongs to. Nothing can tell the others where it is none."""
    if not isinstance(group, dist.ProcessGroup):
        actual, remedy = type(group).__name__, "pass torch.distributed.group.WORLD or a new_group of this rank's"
        fail(op, "group", "be a process group of this rank", actual, remedy, TypeError)


def bits(x: float | Tensor) -> int | Tensor:
    """A number as a fact: equal where the float64 are the same. A tensor is not read."""
    if isinstance(x, Tensor):
        return x.detach().double().view(torch.int64)
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def agree(
    op: str, group: Any, names: Sequence[str], facts: Sequence[int | Tensor] | Exception, rows: int = 0
) -> tuple[int, ...]:
    """Rows of each rank, once the facts of these names are the same on all; else every rank raises.

    facts: whole numbers or 0-dim int64 tensors; or the error that this rank met on the way, raised here after the
        others, which wait for this rank, have heard of it: they raise ValueError.
    Every rank takes part, whatever happened there: one all-gather of 2 + len(names) numbers. The answer is waited
    for: with NCCL, one synchronisation with the device a call.
    """
    device = torch.device("cuda") if "nccl" in dist.get_backend(group) else torch.device("cpu")
    numbers = [1, 0, *[0] * len(names)] if isinstance(facts, Exception) else [0, rows, *facts]
    own = torch.tensor([0 if isinstance(number, Tensor) else number for number in numbers], device=device)
    for place, number in enumerate(numbers):
        if isinstance(number, Tensor):
            own[place] = number
    each = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, own, group)
    told = torch.stack(each).tolist()
    if isinstance(facts, Exception):
        raise facts
    bad = [rank for rank, (failed, *_) in enumerate(told) if failed]
    if bad:
        fail(op, "group", "have fitting arguments on every rank", f"an error on rank {bad[0]}", "see its message")
    for rank, theirs in enumerate(told):
        for name, first, other in zip(names, told[0][2:], theirs[2:], strict=True):
            if other != first:
                actual = f"another on rank {rank} than on rank 0"
                fail(op, "group", f"agree on {name}", actual, "pass the same on every rank")
    return tuple(theirs[1] for theirs in told)
