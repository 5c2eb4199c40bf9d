"""V-JEPA 2: predict the latents of masked parts of a clip from those of the rest.

Source: Assran et al., V-JEPA 2: Self-Supervised Video Models Enable Understanding, Prediction and Planning
(arXiv:2506.09985), section 2; the masks and the loss: Bardes et al. (arXiv:2404.08471), section 3. Parameter names and
semantics are those of the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.masks import Masks
from jepa_kernels.models import layouts
from jepa_kernels.models.jepa import JEPA, AnyMasks
from jepa_kernels.nn import Block, Encoder, Predictor


@dataclass(frozen=True)
class VJEPA2Config:
    """Sizes of the networks; those of ViT-L unless given. crop_size and num_frames give the grid for samplers of
    masks: the networks take clips of any size and number of frames."""

    crop_size: int | tuple[int, int] = 256  # pixels per side
    num_frames: int = 16
    patch_size: int = 16
    tubelet_size: int = 2  # frames of a patch
    in_chans: int = 3
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    predictor_embed_dim: int = 384
    predictor_depth: int = 12
    predictor_num_heads: int = 12
    num_mask_tokens: int = 10  # of every published file


def vit_large(**changes: Any) -> VJEPA2Config:
    return replace(VJEPA2Config(), **changes)


def vit_huge(**changes: Any) -> VJEPA2Config:
    return replace(VJEPA2Config(embed_dim=1280, depth=32), **changes)


def vit_giant_xformers(**changes: Any) -> VJEPA2Config:
    return replace(VJEPA2Config(embed_dim=1408, depth=40, num_heads=22, mlp_ratio=48 / 11), **changes)


def vit_giant_xformers_384(**changes: Any) -> VJEPA2Config:
    return replace(vit_giant_xformers(crop_size=384), **changes)


def vit_gigantic_xformers(**changes: Any) -> VJEPA2Config:
    """As its published code builds it, of which no weights are public."""
    return replace(VJEPA2Config(embed_dim=1664, depth=48, num_heads=26), **changes)


SIZES: dict[str, Callable[..., VJEPA2Config]] = {
    f.__name__: f for f in (vit_large, vit_huge, vit_giant_xformers, vit_giant_xformers_384, vit_gigantic_xformers)
}


class VJEPA2(JEPA):
    """A context encoder of clips, its moving average as target encoder, and a predictor, with rotary positions.

    shadow_dtype, .ema: as of `IJEPA`.
    .grid: (Gt, Gh, Gw) of the config's clips, as `MultiBlock3d` takes it.

    Clips are [B, C, T, H, W], of sides and frames that are multiples of the patch's, square or not; images
    [B, C, H, W] are shown for a whole patch. Masks are `Masks` of that grid (a MaskBatch of `MultiBlock3d` moved with
    `.to(device)`: every spec's masks of every clip in one packed pass), or a pair of rectangular ids (context
    [masks * B, Kc], target [masks * B, Kt], mask-major).

    Inference: `model.ema(clips)` is the target encoder's latents [B, N, E]; `model.ema(clips, ids, packing)` those of
    the kept patches, at the cost of these alone; `model(clips, masks)` predictions.
    """

    published_name, inputs, sizes, huggingface = "V-JEPA 2", "clips", SIZES, layouts.VJEPA2

    def __init__(self, config: VJEPA2Config | None = None, *, shadow_dtype: torch.dtype | None = None) -> None:
        c = VJEPA2Config() if config is None else config
        if c.tubelet_size < 1 or c.num_frames < 1 or c.num_frames % c.tubelet_size:
            requirement = f"be a multiple of tubelet_size {c.tubelet_size}"
            fail("VJEPA2", "num_frames", requirement, c.num_frames, "cut the clip to one")
        encoder = Encoder(
            c.crop_size,
            c.patch_size,
            c.embed_dim,
            c.depth,
            c.num_heads,
            c.mlp_ratio,
            c.in_chans,
            tubelet_size=c.tubelet_size,
            rope="tiled",
        )
        grid = (c.num_frames // c.tubelet_size, *encoder.grid)
        predictor = Predictor(
            grid,
            c.embed_dim,
            c.predictor_embed_dim,
            c.predictor_depth,
            c.predictor_num_heads,
            rope="tiled",
            num_mask_tokens=c.num_mask_tokens,
        )
        _calm(encoder.blocks)
        _calm(predictor.predictor_blocks)
        super().__init__(encoder, predictor, shadow_dtype=shadow_dtype)
        self.config, self.grid = c, grid

    def forward(self, batch: Tensor, masks: AnyMasks, *, mask_index: int | Sequence[int] = 0) -> Tensor:
        """Predict the target latents: batch [B, C, T, H, W] -> packed [Tt, E], or [masks * B, Kt, E].

        mask_index: which mask token stands at the targets, or which for each mask. In published training it counts
            the lengths of clips, not the masks, so that all masks share token 0; published inference, and Hugging
            Face's, takes token 1.
        """
        m = self._masks(batch, masks)
        context = self.context_encoder(batch, m.context_ids, m.context_packing)
        packings = m.context_packing, m.target_packing, m.pairs
        grid = self.context_encoder.grid_of(batch)
        return self.predictor(context, m.context_ids, m.target_ids, *packings, grid=grid, mask_index=mask_index)

    @torch.no_grad()
    def targets(self, batch: Tensor) -> Tensor:
        """The target encoder's features of every patch [B, N, E], before its last norm, which `compare` applies."""
        with self.ema.cast_weights():
            return self.target_encoder.features(batch)

    def compare(self, predicted: Tensor, targets: Tensor, masks: AnyMasks) -> Tensor:
        """L1 distance of predictions to layer-normalised targets: mean per mask, mean of masks.

        The target encoder's last norm and the one without weights are both computed at the targets' rows alone.
        """
        m, norm = self._masks(targets, masks), self.target_encoder.norm
        affine = norm.weight, norm.bias, norm.eps
        return jk.latent_loss(predicted, targets, m.target_ids, packing=m.target_packing, kind="l1", norm=affine)

    def _rectangular(self, batch: int, context_ids: Tensor, target_ids: Tensor) -> Masks:
        rows = context_ids.shape[0], target_ids.shape[0]
        if rows[0] % max(batch, 1) or rows[1] % max(rows[0], 1):
            requirement = f"hold a multiple of {batch} contexts, and of these as many targets"
            fail("VJEPA2", "masks", requirement, rows, "pass ids [masks * B, Kc] and [masks * B, Kt], mask-major")
        return Masks(batch, context_ids, target_ids)


def _calm(blocks: nn.ModuleList) -> None:
    """The published start: what block n = 1, 2, ... adds to its input is smaller by sqrt(2 n)."""
    for n, block in enumerate(blocks, 1):
        for linear in (cast(Block, block).attn.proj, cast(Block, block).mlp.fc2):
            linear.weight.data.div_(math.sqrt(2 * n))
