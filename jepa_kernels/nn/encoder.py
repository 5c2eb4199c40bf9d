"""The vision transformer that encodes images and videos, whole or by kept patches."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.nn.block import NORM_EPS, Block, init_weights
from jepa_kernels.nn.patch_embed import PatchEmbed, sincos_2d
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope, patch_positions


class Encoder(nn.Module):
    """Pre-norm ViT without class token; patches outside `ids` cost nothing.

    tubelet_size: frames of a video's patch; None: images.
    rope: how queries and keys turn with their patch's frame, row and column, a pairing of `Rope` ("tiled": V-JEPA 2,
        "interleaved": V-JEPA 2.1): pixels of any size and number of frames. None: I-JEPA's table of positions is
        added to the patches, for images of crop_size alone.
    mean, std: of each channel, applied to pixels on the way in (see `embed_patches`); uint8 pixels need them.
    """

    autocast_casts = ("pos_embed",)  # by embed_patches: low-precision twins copy it too

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        *,
        tubelet_size: int | None = None,
        rope: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        crop = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if patch_size < 1 or len(crop) != 2:
            sizes = f"crop_size {crop_size} and patch_size {patch_size}"
            fail("Encoder", "sizes", "be a side or (height, width), and at least 1", sizes, "pass pixels")
        if crop[0] % patch_size or crop[1] % patch_size:
            fail("Encoder", "crop_size", f"be a multiple of patch_size {patch_size}", crop_size, "crop to a multiple")
        if rope is None and embed_dim % 4:
            fail("Encoder", "embed_dim", "be a multiple of 4", embed_dim, "position tables have four parts")
        if tubelet_size is not None and rope is None:
            fail("Encoder", "rope", "be a pairing for videos", rope, "the published one is 'tiled'")
        check_rope("Encoder", rope)
        self.grid, self.rope = (crop[0] // patch_size, crop[1] // patch_size), rope
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, tubelet_size, mean=mean, std=std)
        self.pos_embed = frozen_table(self.grid, embed_dim) if rope is None else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.apply(init_weights)

    def forward(self, pixels: Tensor, ids: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Encode every patch of images or videos, or the kept ones of all masks in one pass.

        pixels [B, C, H, W] or [B, C, T, H, W]; an image given to a video encoder is shown for a whole tubelet.
        ids None: every patch -> [B, N, E]. ids int64 [M, K], sorted in each row, row s of image s % B -> [M, K, E].
        ids int64 [T] with `packing` of masks * B sequences -> [T, E].
        """
        return self.norm(self.features(pixels, ids, packing))

    def features(self, pixels: Tensor, ids: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """`forward` without the last norm."""
        x = self.patch_embed(pixels, ids, packing, None if self.pos_embed is None else self.pos_embed[0])
        rope = self._rope(pixels, ids)
        for block in self.blocks:
            x = block(x, packing, rope)
        return x

    def grid_of(self, pixels: Tensor) -> tuple[int, int, int]:
        """(Gt, Gh, Gw): how many patches these pixels have along time, height and width."""
        *tubelet, height, width = self.patch_embed.proj.kernel_size
        frames = pixels.shape[2] // tubelet[0] if pixels.dim() == 5 else 1
        return frames, pixels.shape[-2] // height, pixels.shape[-1] // width

    def _rope(self, pixels: Tensor, ids: Tensor | None) -> Rope | None:
        if self.rope is None:
            return None
        grid = self.grid_of(pixels)
        if ids is None:
            ids = torch.arange(grid[0] * grid[1] * grid[2], device=pixels.device)
        return Rope(patch_positions(ids, grid), pairing=self.rope)


def check_rope(module: str, rope: str | None) -> None:
    """A pairing of the three axes of a patch's place, or None."""
    if rope not in (None, "interleaved", "tiled"):
        fail(module, "rope", "be interleaved, tiled or None", repr(rope), "V-JEPA 2 was trained with 'tiled'")


def frozen_table(grid: tuple[int, int], dim: int) -> nn.Parameter:
    """[1, N, dim]: a parameter, as in published state dicts, that is never trained."""
    table = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim, dtype=torch.float32), requires_grad=False)
    table.data.copy_(sincos_2d(grid, dim)[None])
    return table
