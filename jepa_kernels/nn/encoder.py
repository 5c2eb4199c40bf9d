"""The vision transformer that encodes images, whole or by kept patches."""

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.nn.block import NORM_EPS, Block, init_weights
from jepa_kernels.nn.patch_embed import PatchEmbed, sincos_2d
from jepa_kernels.packing import Packing


class Encoder(nn.Module):
    """Pre-norm ViT without class token; patches outside `ids` cost nothing."""

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        crop = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if crop[0] % patch_size or crop[1] % patch_size:
            fail("Encoder", "crop_size", f"be a multiple of patch_size {patch_size}", crop_size, "crop to a multiple")
        if embed_dim % 4:
            fail("Encoder", "embed_dim", "be a multiple of 4", embed_dim, "position tables have four parts")
        self.grid = (crop[0] // patch_size, crop[1] // patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = frozen_table(self.grid, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.apply(init_weights)

    def forward(self, pixels: Tensor, ids: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Encode images.

        pixels [B, C, H, W]. ids None: every patch -> [B, N, E]. ids int64 [M, K], sorted in each row, row s of
        image s % B -> [M, K, E]. ids int64 [T] with `packing` -> [T, E].
        """
        return self.norm(self.features(pixels, ids, packing))

    def features(self, pixels: Tensor, ids: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """`forward` without the last norm."""
        x = self.patch_embed(pixels, ids, packing, self.pos_embed[0])
        for block in self.blocks:
            x = block(x, packing)
        return x


def frozen_table(grid: tuple[int, int], dim: int) -> nn.Parameter:
    """[1, N, dim]: a parameter, as in published state dicts, that is never trained."""
    table = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim, dtype=torch.float32), requires_grad=False)
    table.data.copy_(sincos_2d(grid, dim)[None])
    return table
