"""The actions that a planner searches, and how they become the world's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
Numbers = float | Sequence[float]


@dataclass(frozen=True)
class ActionSpace:
    """D numbers a step: how they are drawn, what they may be, and what they mean to the world.

    std: of the first distribution, a number or one for each of the D dimensions.
    limit: every number drawn is clipped to [-limit, limit]; a number, one for each dimension, or None.
    constrain: functions [S, H, D] -> [S, H, D] of all samples, in this order after the limit: `clip_norm`, `fixed`, or
        one's own. Elites are what came out of them.
    to_world: [S, H, D] -> [S, H, A], the world's actions; None: the same, D = A.
    finish: a function of the plan's own numbers [H, D], before they become the world's: `dead_zone`.
    """

    std: Numbers = 1.0
    limit: Numbers | None = None
    constrain: tuple[Change, ...] = ()
    to_world: Change | None = None
    finish: Change | None = None


def clip_norm(*groups: tuple[slice, float]) -> Change:
    """Shorten the vector of each group of dimensions to at most its norm: `clip_norm((slice(0, 2), 2.45))`."""

    def change(actions: Tensor) -> Tensor:
        scales = torch.ones_like(actions)
        for dims, most in groups:
            norm = actions[..., dims].norm(dim=-1, keepdim=True)
            scales[..., dims] = most / norm.clamp(min=most or torch.finfo(norm.dtype).tiny)  # never 0 / 0
        return actions * scales

    return change


def fixed(values: dict[int, float], *, first_step: int = 0) -> Change:
    """Give dimensions a value from a step on: `fixed({1: 0.0})` moves in a plane, `fixed({-1: 1.0}, first_step=2)`
    closes the gripper."""

    def change(actions: Tensor) -> Tensor:
        actions = actions.clone()
        for dim, value in values.items():
            actions[..., first_step:, dim].fill_(value)
        return actions

    return change


def without_rotation(actions: Tensor) -> Tensor:
    """(dx, dy, dz, dgripper) [..., 4] to a pose's (dx, dy, dz, 0, 0, 0, dgripper) [..., 7]."""
    still = actions.new_zeros(*actions.shape[:-1], 3)
    return torch.cat((actions[..., :3], still, actions[..., 3:]), -1)


def dead_zone(dim: int, below: float) -> Change:
    """Set a dimension to 0 where it is smaller than `below`."""

    def change(actions: Tensor) -> Tensor:
        actions = actions.clone()
        kept = actions[..., dim]
        kept.masked_fill_(kept.abs() < below, 0)
        return actions

    return change
