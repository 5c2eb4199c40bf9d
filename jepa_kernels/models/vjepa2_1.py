"""V-JEPA 2.1: `vjepa2.VJEPA2` with the options of dense features, and the published sizes.

Source: V-JEPA 2.1 (arXiv:2603.14482). Its encoder has norms after parts of the blocks and patches of its own for
images; positions are true rotations, spread over a fixed grid at every resolution; the loss also asks for the
context's own places. ViT-B and ViT-L were distilled from the last latents of ViT-G, whose width they predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config

TEACHER = 1664  # the width of ViT-G


def vit_base(**changes: Any) -> VJEPA2Config:
    return replace(_dense(embed_dim=768, depth=12, num_heads=12, levels=1, teacher_embed_dim=TEACHER), **changes)


def vit_large(**changes: Any) -> VJEPA2Config:
    return replace(_dense(levels=1, teacher_embed_dim=TEACHER), **changes)


def vit_giant_xformers(**changes: Any) -> VJEPA2Config:
    return replace(_dense(embed_dim=1408, depth=40, num_heads=22, mlp_ratio=48 / 11, predictor_depth=24), **changes)


def vit_gigantic_xformers(**changes: Any) -> VJEPA2Config:
    return replace(_dense(embed_dim=1664, depth=48, num_heads=26, mlp_ratio=64 / 13, predictor_depth=24), **changes)


def _dense(**sizes: Any) -> VJEPA2Config:
    return VJEPA2Config(
        crop_size=384,
        num_frames=64,
        num_mask_tokens=8,
        rope="interleaved",
        interpolate_rope=True,
        predictor_interpolate_rope=True,
        image_tokenizer=True,
        modality_embedding=True,
        predict_all=True,
        **{"levels": 4, **sizes},
    )


SIZES: dict[str, Callable[..., VJEPA2Config]] = {
    f.__name__: f for f in (vit_base, vit_large, vit_giant_xformers, vit_gigantic_xformers)
}


class VJEPA2_1(VJEPA2):
    """`VJEPA2` of the sizes of this file, whose checkpoints it loads; ViT-L unless given."""

    published_name, sizes, huggingface = "V-JEPA 2.1", SIZES, None

    def __init__(self, config: VJEPA2Config | None = None, *, shadow_dtype: torch.dtype | None = None) -> None:
        super().__init__(vit_large() if config is None else config, shadow_dtype=shadow_dtype)
