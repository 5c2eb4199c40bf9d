"""What a planner asks of a world model, and what the model is told of the world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from jepa_kernels._core.check import check_tensor, fail


@dataclass(frozen=True)
class Context:
    """What was seen of one world so far: no batch axis.

    latents [T, N, E]: of the frames, the last being the current one, as the model's `encode` gives them.
    actions [T - 1, A]: those taken between them; None for T = 1.
    states [T, Ds], extrinsics [T, Dx]: of each frame, for models with tokens of them.
    """

    latents: Tensor
    actions: Tensor | None = None
    states: Tensor | None = None
    extrinsics: Tensor | None = None


class World(Protocol):
    """A model that imagines what actions lead to: `vjepa2_ac.WorldModel`, or anyone's own."""

    action_dim: int

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of frames, without gradient: [T, C, H, W] or [B, T, C, H, W] -> [..., T, N, E]."""

    def imagine(self, context: Context, samples: int, horizon: int) -> Callable[[Tensor], Tensor]:
        """Prepare a plan: actions [S, horizon, A] -> latents [S, horizon, N, E] of the frames after the context's last.

        For inference: raises where gradients are recorded. What the samples share is computed here, once; the result
        starts from the context anew at every call, with the same bits for the same actions, waits for no device, and
        takes fewer samples or steps as well: of fewer samples the last bits may differ, since products round by how
        many rows they have.
        """

    def unroll(self, context: Context, actions: Tensor) -> Tensor:
        """The same numbers, with a gradient to the actions: [S, horizon, A] -> [S, horizon, N, E]."""


def refuse_grad(model: str) -> None:
    """Raise RuntimeError in a model's `imagine` where gradients are recorded."""
    if torch.is_grad_enabled():
        remedy = "call it under torch.no_grad(), or take unroll"
        fail(model, "imagine", "run where no gradients are recorded", "grad mode", remedy, RuntimeError)


def check_context(model: str, context: Any, *frame: int) -> None:
    """Raise TypeError for what is no Context, and ValueError for one without frames of shape `frame`, [N, E]."""
    remedy = "pass Context(world.encode(frames))"
    if not isinstance(context, Context):
        fail(model, "context", "be a Context", type(context).__name__, remedy, TypeError)
    check_tensor(model, "context.latents", context.latents, "T N E")
    if not len(context.latents) or context.latents.shape[1:] != frame:
        wanted = f"be [T, {', '.join(map(str, frame))}], of a frame or more"
        fail(model, "context.latents", wanted, tuple(context.latents.shape), remedy)


def check_actions(model: str, actions: Any, dim: int, samples: int | None = None, horizon: int | None = None) -> None:
    """Raise for actions that are not [S, steps, dim], or more than a plan was prepared for."""
    check_tensor(model, "actions", actions, "S horizon A")
    if actions.shape[2] != dim or not actions.shape[0] or not actions.shape[1]:
        fail(model, "actions", f"be [S, horizon, {dim}], of one or more", tuple(actions.shape), "see world.action_dim")
    if samples is not None and horizon is not None and (len(actions) > samples or actions.shape[1] > horizon):
        wanted = f"be [{samples}, {horizon}, {dim}] at most"
        fail(model, "actions", wanted, tuple(actions.shape), "prepare the plan for as many")
