"""I-JEPA: predict the latents of image blocks from those of a context block.

Source: Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture
(arXiv:2301.08243). Parameter names and semantics are those of the published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.masks import Masks
from jepa_kernels.models import layouts
from jepa_kernels.models.jepa import JEPA, AnyMasks
from jepa_kernels.nn import Encoder, Predictor


@dataclass(frozen=True)
class IJEPAConfig:
    """Sizes of the networks. The predictor has as many heads as the encoder."""

    crop_size: int | tuple[int, int] = 224  # pixels per side
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    predictor_embed_dim: int = 384
    predictor_depth: int = 12


def vit_tiny(**changes: Any) -> IJEPAConfig:
    return replace(IJEPAConfig(embed_dim=192, num_heads=3), **changes)


def vit_small(**changes: Any) -> IJEPAConfig:
    return replace(IJEPAConfig(), **changes)


def vit_base(**changes: Any) -> IJEPAConfig:
    return replace(IJEPAConfig(embed_dim=768, num_heads=12), **changes)


def vit_large(**changes: Any) -> IJEPAConfig:
    return replace(IJEPAConfig(embed_dim=1024, depth=24, num_heads=16), **changes)


def vit_huge_14(**changes: Any) -> IJEPAConfig:
    return replace(IJEPAConfig(patch_size=14, embed_dim=1280, depth=32, num_heads=16), **changes)


def vit_huge_16_448(**changes: Any) -> IJEPAConfig:
    return replace(vit_huge_14(patch_size=16, crop_size=448), **changes)


def vit_giant_16(**changes: Any) -> IJEPAConfig:
    giant = IJEPAConfig(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11, predictor_depth=16)
    return replace(giant, **changes)


SIZES: dict[str, Callable[..., IJEPAConfig]] = {
    f.__name__: f for f in (vit_tiny, vit_small, vit_base, vit_large, vit_huge_14, vit_huge_16_448, vit_giant_16)
}


class IJEPA(JEPA):
    """A context encoder, its moving average as target encoder, and a predictor.

    shadow_dtype: bf16 or fp16: the target encoder also keeps low-precision copies of its weights, which its forward
        under autocast to that dtype reads instead of casting (see `nn.EMA`).
    .ema: moves the target encoder, which is its `.module`.

    Masks are `Masks` (a MaskBatch moved with `.to(device)`), packed or rectangular, or a pair of rectangular ids
    (context [B, Kc], target [masks * B, Kt], mask-major).
    """

    published_name, inputs, sizes, huggingface = "I-JEPA", "images", SIZES, layouts.IJEPA

    def __init__(self, config: IJEPAConfig | None = None, *, shadow_dtype: torch.dtype | None = None) -> None:
        c = IJEPAConfig() if config is None else config
        encoder = Encoder(c.crop_size, c.patch_size, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio, c.in_chans)
        predictor = Predictor(encoder.grid, c.embed_dim, c.predictor_embed_dim, c.predictor_depth, c.num_heads)
        super().__init__(encoder, predictor, shadow_dtype=shadow_dtype)
        self.config = c

    def forward(self, batch: Tensor, masks: AnyMasks) -> Tensor:
        """Predict the target latents: batch [B, C, H, W] -> [masks * B, Kt, E], or packed [Tt, E]."""
        m = self._masks(batch, masks)
        context = self.context_encoder(batch, m.context_ids, m.context_packing)
        packings = m.context_packing, m.target_packing, m.pairs
        return self.predictor(context, m.context_ids, m.target_ids, *packings)

    @torch.no_grad()
    def targets(self, batch: Tensor) -> Tensor:
        """The target encoder's latents of every patch [B, N, E]."""
        with self.ema.cast_weights():
            return self.target_encoder(batch)

    def compare(self, predicted: Tensor, targets: Tensor, masks: AnyMasks) -> Tensor:
        """Smooth-L1 distance of predictions to layer-normalised targets: mean per mask, mean of masks (`average`)."""
        m = self._masks(targets, masks)
        return jk.latent_loss(
            predicted,
            targets,
            m.target_ids,
            packing=m.target_packing,
            weight=m.weights("target", self.average),
            reduction=self.average,
        )

    def _rectangular(self, batch: int, context_ids: Tensor, target_ids: Tensor) -> Masks:
        rows = context_ids.shape[0], target_ids.shape[0]
        if rows[0] != batch or rows[1] % max(batch, 1):
            requirement = f"hold {batch} contexts and a multiple of {batch} targets"
            fail("IJEPA", "masks", requirement, rows, "pass ids [B, Kc] and [masks * B, Kt], mask-major")
        return Masks(batch, context_ids, target_ids)
