"""A frozen description of patches that needs no training: which colors lie where in them."""

import math

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import check_tensor, fail
from jepa_kernels.nn.patch_embed import frozen_table

CELLS = 4  # to a patch's side, in each of which colors are averaged by themselves
WHOLE = 3.0  # weight of the average over the whole patch, which tells the color, against those that tell the shape
CHUNK = 4  # images at a time: the features of every pixel are many


class ColorFeatures(nn.Module):
    """Patches by random Fourier features of their pixels' colors, averaged over the patch and over its 4 x 4 cells.

    f(p) = sqrt(2) gain (cos(W p + b) - cos(b)),   W ~ N(0, bandwidth^2), b ~ U(0, 2 pi), p a pixel's color in 0..1

    A patch is [3 mean f, mean of f in each cell / 4], then its place in I-JEPA's table. A linear map of cosines of
    single pixels tells color and shape apart, also of pairs that it was not fitted on; one of the pixels, or of a
    random vision transformer, does not. Black is 0. Nothing is trained.

    Source: Rahimi and Recht, Random Features for Large-Scale Kernel Machines (2007); averages over parts of a picture:
    Lazebnik et al., Beyond Bags of Features (2006).
    """

    weight: Tensor
    phase: Tensor
    positions: Tensor

    def __init__(
        self, crop_size: int, patch_size: int, features: int = 32, bandwidth: float = 4.0, gain: float = 2.0
    ) -> None:
        super().__init__()
        if patch_size % CELLS or crop_size % patch_size:
            wanted, remedy = f"be a multiple of {CELLS} and divide crop_size {crop_size}", "change either"
            fail("ColorFeatures", "patch_size", wanted, patch_size, remedy)
        self.crop_size, self.patch_size, self.gain = crop_size, patch_size, gain
        side = crop_size // patch_size
        self.register_buffer("weight", torch.randn(features, 3) * bandwidth)
        self.register_buffer("phase", torch.rand(features) * 2 * math.pi)
        table = frozen_table("ColorFeatures", "features", (side, side), features)
        self.register_buffer("positions", table.detach().clone())

    @property
    def embed_dim(self) -> int:
        return self.weight.shape[0] * (CELLS**2 + 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, crop_size, crop_size] -> [B, N, embed_dim], fp32."""
        check_tensor("ColorFeatures", "pixels", pixels, "B C H W", dtypes=(torch.uint8,))
        wanted = 3, self.crop_size, self.crop_size
        if pixels.shape[1:] != wanted:
            fail(
                "ColorFeatures", "pixels", f"be [B, {', '.join(map(str, wanted))}]", tuple(pixels.shape), "resize them"
            )
        with torch.autocast(pixels.device.type, enabled=False):
            found = torch.cat([self._describe(chunk) for chunk in pixels.split(CHUNK)])
        return torch.cat([found, self.positions.expand(len(found), -1, -1)], -1)

    def _describe(self, pixels: Tensor) -> Tensor:
        batch, side, cell = len(pixels), self.crop_size // self.patch_size, self.patch_size // CELLS
        colors, width = pixels.permute(0, 2, 3, 1).float() / 255, len(self.phase)
        waves = (colors @ self.weight.T + self.phase).cos_()
        of_cells = waves.view(batch, side * CELLS, cell, side * CELLS, cell, width).mean((2, 4)) - self.phase.cos()
        of_cells = of_cells.view(batch, side, CELLS, side, CELLS, width).transpose(2, 3)
        of_cells = of_cells.reshape(batch, side**2, CELLS**2, width)
        parts = torch.cat([WHOLE * of_cells.mean(2), of_cells.flatten(2) / CELLS], -1)
        return parts * (self.gain * math.sqrt(2))
