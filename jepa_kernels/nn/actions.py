"""What reads actions into embeddings, and what reads them back out of two frames' embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_kernels.nn.linear import Linear, product


class ActionEncoder(nn.Module):
    """W2 silu(W1 (W0 a + b0) + b1) + b2: actions [..., A] -> [..., E]; W0 is stored as a convolution's.

    Source: LeWorldModel (arXiv:2603.19312).
    """

    def __init__(self, action_dim: int, hidden: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv1d(action_dim, hidden, 1)
        self.embed = nn.Sequential(Linear(hidden, 4 * embed_dim), nn.SiLU(), Linear(4 * embed_dim, embed_dim))

    def forward(self, actions: Tensor) -> Tensor:
        weight = self.patch_embed.weight[..., 0]
        return self.embed(product(actions.to(weight.dtype), weight, self.patch_embed.bias))


class InverseDynamics(nn.Module):
    """W2 gelu(W1 [z_t, z_t+1] + b1) + b2: embeddings [..., T, E] -> the actions between them [..., T - 1, A].

    For training alone: what an action moves must then be in the embeddings, however little of a picture it is.
    Source: the inverse dynamics model of EB-JEPA's action-conditioned example.
    """

    def __init__(self, embed_dim: int, hidden: int, action_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Linear(2 * embed_dim, hidden), nn.GELU(), Linear(hidden, action_dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.net(torch.cat([embeddings[..., :-1, :], embeddings[..., 1:, :]], -1))
