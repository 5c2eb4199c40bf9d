"""V-JEPA 2.1: the published sizes of `vjepa2.VJEPA2` with dense features.

Source: V-JEPA 2.1 (arXiv:2603.14482). Its encoder has norms after each quarter of the blocks and patches of its own for
images; positions are true rotations, spread over a fixed grid at every resolution; the loss also asks for the
context's own places. ViT-B and ViT-L were distilled from the last latents of ViT-G, whose width they predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jepa_kernels.models.vjepa2 import VJEPA2Config

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
