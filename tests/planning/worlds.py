"""Small worlds with the whole protocol: a point in the plane, and a nonlinear one of several tokens."""

import torch
from torch import Tensor

from jepa_kernels.models.world import Context


class Point:
    """Its latent is its position, one token of two numbers; an action moves it."""

    action_dim = 2

    def imagine(self, context: Context, samples: int, horizon: int):
        return lambda actions: self.unroll(context, actions)

    def unroll(self, context: Context, actions: Tensor) -> Tensor:
        return (context.latents[-1, 0] + actions.cumsum(1))[:, :, None]


class Bent:
    """z[t + 1] = tanh(W z[t] + V a[t]), tokens of their own V. `seen` is the largest number of samples at once."""

    def __init__(self, action_dim=3, tokens=2, width=3, dtype=torch.float64, max_frames=16):
        g = torch.Generator().manual_seed(1)
        self.action_dim, self.max_frames, self.seen = action_dim, max_frames, 0
        self.w = torch.randn(width, width, generator=g, dtype=torch.float64).to(dtype)
        self.v = torch.randn(tokens, width, action_dim, generator=g, dtype=torch.float64).to(dtype)

    def context(self, frames=1):
        g = torch.Generator().manual_seed(2)
        latents = torch.randn(frames, *self.v.shape[:2], generator=g, dtype=torch.float64).to(self.w)
        return Context(latents, latents.new_zeros(frames - 1, self.action_dim) if frames > 1 else None)

    def imagine(self, context: Context, samples: int, horizon: int):
        assert not torch.is_grad_enabled()

        def imagined(actions: Tensor) -> Tensor:
            assert len(actions) <= samples and actions.shape[1] <= horizon
            self.seen = max(self.seen, len(actions))
            return self.unroll(context, actions)

        return imagined

    def unroll(self, context: Context, actions: Tensor) -> Tensor:
        z, found = context.latents[-1].expand(len(actions), -1, -1), []
        for step in actions.unbind(1):
            # Sums written out: the same bits for any number of samples, in any layout.
            moved = sum(z[..., i : i + 1] * self.w[i] for i in range(len(self.w)))
            z = torch.tanh(sum((self.v[..., i] * step[:, i, None, None] for i in range(self.action_dim)), moved))
            found.append(z)
        return torch.stack(found, 1)
