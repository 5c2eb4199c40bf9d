"""The vision transformer that tells of an image by one class token, as Hugging Face's ViT does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from jepa_kernels.nn.block import Block, init_weights
from jepa_kernels.nn.patch_embed import PatchEmbed

CLASS_NORM_EPS = 1e-12  # of ViTConfig: not that of the other encoders


class ClassEncoder(nn.Module):
    """Pre-norm ViT with a class token and learned positions: what it gives of an image is the class token's latent.

    crop_size: pixels per side of the square images. mean, std: of each channel, see `PatchEmbed`.
    """

    def __init__(
        self,
        crop_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        patches = (crop_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, mean=mean, std=std)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, embed_dim))  # the class token's first
        blocks = (Block(embed_dim, num_heads, mlp_ratio, eps=CLASS_NORM_EPS) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=CLASS_NORM_EPS)
        self.apply(init_weights)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, C, H, W] -> [B, E]."""
        patches = self.patch_embed(pixels, pos_embed=self.pos_embed[0, 1:])
        token = self.cls_token + self.pos_embed[:, :1]
        patches = patches.to(token.dtype)  # under autocast the blocks add up in full precision
        x = torch.cat([token.expand(len(patches), -1, -1), patches], 1)
        *blocks, last = (cast(Block, block) for block in self.blocks)
        for block in blocks:
            x = block(x)
        return self.norm(last.cross(x[:, :1], x))[:, 0]  # nothing reads the last block's patches
