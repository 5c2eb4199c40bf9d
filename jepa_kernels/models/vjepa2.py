"""V-JEPA 2: predict the latents of masked parts of a clip from those of the rest.

Source: Assran et al., V-JEPA 2: Self-Supervised Video Models Enable Understanding, Prediction and Planning
(arXiv:2506.09985), section 2; the masks and the loss: Bardes et al. (arXiv:2404.08471), section 3. Parameter names and
semantics are those of the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.models import layouts
from jepa_kernels.models.jepa import AnyMasks
from jepa_kernels.models.video import VideoJEPA
from jepa_kernels.nn import Encoder, Predictor
from jepa_kernels.nn.block import rescale_blocks
from jepa_kernels.nn.encoder import frames_of


@dataclass(frozen=True)
class VJEPA2Config:
    """Sizes of the networks; those of ViT-L unless given. crop_size and num_frames give the grid for samplers of
    masks: the networks take clips of any size and number of frames.

    The options of V-JEPA 2.1, which the sizes of `vjepa2_1` set; those of V-JEPA 2 unless given:
    rope: "tiled", as V-JEPA 2 was trained, or "interleaved", a true rotation.
    interpolate_rope: rows and columns are spread over those of 256 pixels at every resolution (see `patch_positions`);
        predictor_interpolate_rope: the predictor's too. Published training sets both, published inference the first.
    levels: None: one norm, after the last block. 1 to 4: a norm after each quarter of the blocks; the predictor reads
        the latents of the last `levels` of them side by side, and predicts as many.
    teacher_embed_dim: of distilled models, the width of the teacher's latents, all levels together, which the
        predictor has instead of its own encoder's.
    image_tokenizer, modality_embedding: as of `Encoder`.
    predict_all: predictions, and a loss, at the context's places too. context_weight: of that loss, at the start;
        weight_distance_loss: each token's divided by the root of its distance to the nearest target;
        offset_context_loss: that distance in units of Gh // 16 patches.

    rope_precision: of angles, as of `Encoder`: "bf16_exponent" gives the numbers of published training and evaluation
        under autocast to bf16, in any type.
    frame_causal: a patch sees those of its own frame and of earlier ones alone; published encoders see all.
    """

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
    rope: str = "tiled"
    interpolate_rope: bool = False
    predictor_interpolate_rope: bool = False
    levels: int | None = None
    teacher_embed_dim: int | None = None
    image_tokenizer: bool = False
    modality_embedding: bool = False
    predict_all: bool = False
    context_weight: float = 0.5
    weight_distance_loss: bool = True
    offset_context_loss: bool = False
    rope_precision: str = "float32"
    frame_causal: bool = False


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


class Dense(NamedTuple):
    """What `VJEPA2` with predict_all predicts: at the targets, and at the context's places with their weights."""

    target: Tensor
    context: Tensor
    weight: Tensor | None


class VJEPA2(VideoJEPA):
    """A context encoder of clips, its moving average as target encoder, and a predictor, with rotary positions.

    shadow_dtype, .ema: as of `IJEPA`. Masks: see `VideoJEPA`.
    .context_weight: of the loss at the context's places (predict_all), a number, or a tensor on the device, whose
        values compiled code takes without being compiled again; see `schedules.context_weight`.

    Clips are [B, C, T, H, W], of sides and frames that are multiples of the patch's, square or not; images
    [B, C, H, W] are shown for a whole patch, or have patches of their own (image_tokenizer).

    Inference: `model.ema(clips)` is the target encoder's latents [B, N, E]; `model.ema(clips, ids, packing)` those of
    the kept patches, at the cost of these alone; `model(clips, masks)` predictions. In anticipation
    `model.predictor(model.context_encoder(clips, dense=True), ids, later_ids, grid=longer)` goes on after the clip.
    """

    published_name, sizes = "V-JEPA 2", SIZES
    huggingface: ClassVar[layouts.Layout | None] = layouts.VJEPA2

    def __init__(self, config: VJEPA2Config | None = None, *, shadow_dtype: torch.dtype | None = None) -> None:
        c = VJEPA2Config() if config is None else config
        frames = frames_of("VJEPA2", c.num_frames, c.tubelet_size)
        pretrained_grid = 256 // max(c.patch_size, 1)
        encoder = Encoder(
            c.crop_size,
            c.patch_size,
            c.embed_dim,
            c.depth,
            c.num_heads,
            c.mlp_ratio,
            c.in_chans,
            tubelet_size=c.tubelet_size,
            rope=c.rope,
            rope_precision=c.rope_precision,
            pretrained_grid=pretrained_grid if c.interpolate_rope else None,
            frame_causal=c.frame_causal,
            levels=c.levels,
            image_tokenizer=c.image_tokenizer,
            modality_embedding=c.modality_embedding,
        )
        height, width = encoder.grid
        grid = frames, height, width
        predictor = Predictor(
            grid,
            c.embed_dim,
            c.predictor_embed_dim,
            c.predictor_depth,
            c.predictor_num_heads,
            rope=c.rope,
            rope_precision=c.rope_precision,
            num_mask_tokens=c.num_mask_tokens,
            pretrained_grid=pretrained_grid if c.predictor_interpolate_rope else None,
            levels=c.levels or 1,
            out_dim=c.teacher_embed_dim,
            modality_embedding=c.modality_embedding,
            context_proj=c.predict_all,
        )
        rescale_blocks(encoder.blocks)
        rescale_blocks(predictor.predictor_blocks)
        super().__init__(encoder, predictor, shadow_dtype=shadow_dtype)
        self.config, self.grid = c, grid
        self.context_weight: float | Tensor = c.context_weight

    def forward(self, batch: Tensor, masks: AnyMasks, *, mask_index: int | Sequence[int] = 0) -> Tensor | Dense:
        """Predict the target latents: batch [B, C, T, H, W] -> packed [Tt, E], or [masks * B, Kt, E].

        mask_index: which mask token stands at the targets, or which for each mask. In published training it counts
            the lengths of clips, not the masks, so that all masks share token 0; published inference, and Hugging
            Face's, takes token 1.
        With predict_all: `Dense`.
        """
        m, encoder = self._masks(batch, masks), self.context_encoder
        context = encoder(batch, m.context_ids, m.context_packing, dense=True)
        grid, image = encoder.grid_of(batch), encoder.shows_images(batch)
        packings = m.context_packing, m.target_packing, m.pairs
        options = dict(grid=grid, mask_index=mask_index, image=image)
        predicted = self.predictor(context, m.context_ids, m.target_ids, *packings, **options)
        if not self.config.predict_all:
            return predicted
        weight = None
        if self.config.weight_distance_loss:
            scale = grid[1] // 16 if self.config.offset_context_loss else 1
            if scale < 1:
                fail("VJEPA2", "offset_context_loss", "have 16 rows of patches or more", grid[1], "set it to False")
            both: Any = dict(packing=m.context_packing, target_packing=m.target_packing)
            weight = jk.distance_weights(m.context_ids, m.target_ids, grid, **both, scale=scale)
        target, own = predicted
        return Dense(target, own, weight)

    def compare(self, predicted: Tensor | Dense, targets: Tensor, masks: AnyMasks) -> Tensor:
        """L1 distance of predictions to layer-normalised targets: mean per mask, mean of masks.

        With several levels each is normalised by itself. With predict_all the weighted distance at the context's
        places, times `context_weight`, is added.
        """
        if self.config.teacher_embed_dim is not None:
            requirement, remedy = "be None for targets of its own encoder", "a distilled model is for inference"
            fail("VJEPA2", "teacher_embed_dim", requirement, self.config.teacher_embed_dim, remedy)
        m = self._masks(targets, masks)
        target = predicted.target if isinstance(predicted, Dense) else predicted
        share = m.weights("target", self.average)
        loss = self._distance(target, targets, m.target_ids, m.target_packing, weight=share)
        if not isinstance(predicted, Dense):
            return loss
        weight = _product(predicted.weight, m.weights("context", self.average))
        given = predicted.context, targets, m.context_ids, m.context_packing
        return loss + self.context_weight * self._distance(*given, weight=weight)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Of weights, None being 1."""
    return a if b is None else b if a is None else a * b
