"""What a planner asks of a world model, and what the model is told of the world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
        takes fewer samples or steps as well.
        """

    def unroll(self, context: Context, actions: Tensor) -> Tensor:
        """The same numbers, with a gradient to the actions: [S, horizon, A] -> [S, horizon, N, E]."""
