"""What action-conditioned world models are trained by: frames predicted from true ones, and from predicted ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import jepa_kernels as jk
from jepa_kernels._core.check import fail

if TYPE_CHECKING:
    from jepa_kernels.models.vjepa2_ac import WorldModel


def teacher_forcing_and_rollout(
    world: WorldModel,
    latents: Tensor,
    actions: Tensor,
    states: Tensor | None = None,
    extrinsics: Tensor | None = None,
    *,
    auto_steps: int = 2,
    released_slice: bool = False,
) -> Tensor:
    """V-JEPA 2-AC's loss, an fp32 scalar: mean |z - h| of frames 1..T-1 predicted from true ones, plus that of the
    first auto_steps frames, each predicted from frame 0 and the predictions before it.

    latents h [B, T, N, E], as `encode` gives them; actions [B, T - 1, A]; states [B, T - 1 or T, Ds] and extrinsics,
        true ones in both parts. |d|: the config's distance.
    auto_steps: 1..T-1. The first rollout step is the teacher-forced prediction of frame 1, which so counts twice;
        gradients flow through it.
    released_slice: as the released checkpoint was trained: the prediction of frame 2 stands in the place of frame 1.
        Corrected in its published code since.
    Raises ValueError for fewer frames than that takes.
    Source: V-JEPA 2 (arXiv:2506.09985), section 3.1.
    """
    known = latents.shape[1] - 1
    _check_steps(known, actions, auto_steps, "auto_steps")
    if released_slice and known < 2:
        fail("WorldModel", "released_slice", "have 3 frames or more", known + 1, "pass longer clips, or leave it out")
    steering = _first(known, actions, states, extrinsics)
    forced = world(latents[:, :-1], *steering)
    loss = distance(world, forced, latents[:, 1:])
    seen = torch.cat([latents[:, :1], forced[:, int(released_slice), None]], 1)
    for n in range(2, auto_steps + 1):
        seen = torch.cat([seen, world(seen, *_first(n, *steering))[:, -1:]], 1)
    return loss + distance(world, seen[:, 1:], latents[:, 1 : auto_steps + 1])


def rollouts_of_prefixes(
    world: WorldModel,
    latents: Tensor,
    actions: Tensor,
    states: Tensor | None = None,
    extrinsics: Tensor | None = None,
    *,
    rollout_steps: int = 1,
    prefixes: Sequence[int] = (0,),
    window: int = 8,
    detach: bool = True,
    stop_gradient: bool = False,
) -> Tensor:
    """JEPA-WMs' loss, an fp32 scalar, of R = rollout_steps:

    D / (R + 1) + sum over prefixes t and steps r = 1..R-1 of D(t, r) / (R P), P prefixes, D the mean distance of all
    teacher-forced frames, and D(t, r) that of frame t + 1 + r, predicted from frames 0..t and the predictions of
    t + 1.. before it. The weights do not sum to 1: so published.

    latents, actions, states, extrinsics: as of `teacher_forcing_and_rollout`. prefixes: each in 0..T-1-R; published
        are 0, one drawn for the step, or all.
    window: a rollout step sees the last frames only, numbered from 0 anew.
    detach: no gradient flows into the frames that a rollout starts from, the first prediction included; stop_gradient:
        nor from one of its steps into the one before.
    Source: JEPA-WMs (arXiv:2512.24497).
    """
    known = latents.shape[1] - 1
    _check_steps(known, actions, rollout_steps, "rollout_steps")
    if window < 1 or not all(0 <= t <= known - rollout_steps for t in prefixes):
        found = f"{list(prefixes)} with {known + 1} frames, window {window}"
        wanted = f"lie in 0..T-1-{rollout_steps}, with a window of at least 1"
        fail("WorldModel", "prefixes", wanted, found, "pass longer clips or fewer steps")
    steering = _first(known, actions, states, extrinsics)
    forced = world(latents[:, :-1], *steering)
    loss = distance(world, forced, latents[:, 1:]) / (rollout_steps + 1)
    for t in prefixes:
        seen = torch.cat([latents[:, : t + 1], forced[:, t, None].detach() if detach else forced[:, t, None]], 1)
        for n in range(t + 2, t + 1 + rollout_steps):
            begin = max(0, n - window)
            given = (None if x is None else x[:, begin:n] for x in steering)
            new = world(seen[:, begin:], *given)[:, -1:]
            loss = loss + distance(world, new, latents[:, n, None]) / (rollout_steps * len(prefixes))
            seen = torch.cat([seen, new.detach() if stop_gradient else new], 1)
    return loss


def distance(world: WorldModel, predicted: Tensor, latents: Tensor) -> Tensor:
    """Mean distance of frames [B, T, N, E], in fp32; no gradient to `latents`."""
    pair = predicted.flatten(1, 2), latents.flatten(1, 2)
    return jk.latent_loss(*pair, kind=world.config.distance, normalize=False)


def _first(frames: int, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x[:, :frames] for x in given)


def _check_steps(known: int, actions: Tensor, steps: int, name: str) -> None:
    if known < 1 or actions.shape[1] != known:
        wanted = f"be of the {known} frames before the last"
        fail("WorldModel", "actions", wanted, tuple(actions.shape), "pass one for each frame but the last")
    if not 1 <= steps <= known:
        fail("WorldModel", name, f"lie in 1..{known} for {known + 1} frames", steps, "pass longer clips")
