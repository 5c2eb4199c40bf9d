"""V-JEPA: predict the latents of masked parts of a clip from those of the rest, with a table of positions.

Source: Bardes et al., Revisiting Feature Prediction for Learning Visual Representations from Video
(arXiv:2404.08471). Parameter names and semantics are those of the published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.models.jepa import AnyMasks
from jepa_kernels.models.video import VideoJEPA
from jepa_kernels.nn import Encoder, Predictor
from jepa_kernels.packing import Packing


@dataclass(frozen=True)
class VJEPAConfig:
    """Sizes of the networks; those of ViT-L unless given. The predictor has as many heads as the encoder.

    uniform_power: of the tables of positions (see `sincos_3d`).
    interpolate_positions: encoders take clips of other sizes and numbers of frames, for which their table is resized
        (see `Encoder`); predictors do not.
    frame_causal: a patch sees those of its own frame and of earlier ones alone; published encoders see all.
    loss_exp: p of the loss |d|^p / p.
    reg_coeff: of mean(relu(1 - s)) in the loss, with s the predictions' standard deviation over the places of a clip,
        of each channel, mean over masks. Published: 0, which costs nothing.
    """

    crop_size: int | tuple[int, int] = 224  # pixels per side
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
    num_mask_tokens: int = 2  # one for each kind of mask
    uniform_power: bool = True
    interpolate_positions: bool = False
    frame_causal: bool = False
    loss_exp: float = 1.0
    reg_coeff: float = 0.0


def vit_large(**changes: Any) -> VJEPAConfig:
    return replace(VJEPAConfig(), **changes)


def vit_huge(**changes: Any) -> VJEPAConfig:
    return replace(VJEPAConfig(embed_dim=1280, depth=32), **changes)


def vit_huge_384(**changes: Any) -> VJEPAConfig:
    return replace(vit_huge(crop_size=384), **changes)


SIZES: dict[str, Callable[..., VJEPAConfig]] = {f.__name__: f for f in (vit_large, vit_huge, vit_huge_384)}


class VJEPA(VideoJEPA):
    """A context encoder of clips, its moving average as target encoder, and a predictor; see `VideoJEPA` for masks.

    shadow_dtype, .ema: as of `IJEPA`.

    Inference: `model.ema(clips)` is the target encoder's latents [B, N, E]; `model.ema(clips, ids, packing)` those of
    the kept patches, at the cost of these alone; `model(clips, masks)` predictions. Clips have the config's size,
    but for encoders with interpolate_positions.
    """

    published_name, sizes = "V-JEPA", SIZES

    def __init__(self, config: VJEPAConfig | None = None, *, shadow_dtype: torch.dtype | None = None) -> None:
        c = VJEPAConfig() if config is None else config
        encoder = Encoder(
            c.crop_size,
            c.patch_size,
            c.embed_dim,
            c.depth,
            c.num_heads,
            c.mlp_ratio,
            c.in_chans,
            tubelet_size=c.tubelet_size,
            num_frames=c.num_frames,
            uniform_power=c.uniform_power,
            interpolate_positions=c.interpolate_positions,
            frame_causal=c.frame_causal,
        )
        predictor = Predictor(
            encoder.grid,
            c.embed_dim,
            c.predictor_embed_dim,
            c.predictor_depth,
            c.num_heads,
            num_mask_tokens=c.num_mask_tokens,
            uniform_power=c.uniform_power,
        )
        super().__init__(encoder, predictor, shadow_dtype=shadow_dtype)
        self.config, self.grid = c, cast(tuple[int, int, int], encoder.grid)

    def forward(self, batch: Tensor, masks: AnyMasks) -> Tensor:
        """Predict the target latents: batch [B, C, T, H, W] -> packed [Tt, E], or [masks * B, Kt, E].

        Mask number j takes mask token j, the first again after the last.
        """
        m, grid = self._masks(batch, masks), self.context_encoder.grid_of(batch)
        if grid != self.grid:
            wanted = f"have {self.grid} patches like the predictor's table of positions"
            fail("VJEPA", "batch", wanted, grid, "encoders alone interpolate theirs")
        context = self.context_encoder(batch, m.context_ids, m.context_packing)
        packings = m.context_packing, m.target_packing, m.pairs
        rows = m.context_ids.shape[0] if m.context_packing is None else m.context_packing.sequences
        tokens = [j % self.config.num_mask_tokens for j in range(max(rows // max(m.batch, 1), 1))]
        return self.predictor(context, m.context_ids, m.target_ids, *packings, mask_index=tokens)

    def compare(self, predicted: Tensor, targets: Tensor, masks: AnyMasks) -> Tensor:
        """Distance of predictions to layer-normalised targets, and the regulariser of the config."""
        m, c = self._masks(targets, masks), self.config
        weight = m.weights("target", self.average)
        loss = self._distance(predicted, targets, m.target_ids, m.target_packing, power=c.loss_exp, weight=weight)
        if c.reg_coeff == 0 or m.batch == 0:
            return loss
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        spread = _spread(predicted, m.target_packing).unflatten(0, (-1, m.batch)).mean(0)
        lacking = (1 - spread).relu().mean()
        return loss + c.reg_coeff * (lacking if m.shares is None else lacking * m.shares.images[0])


def _spread(x: Tensor, packing: Packing | None) -> Tensor:
    """[S, E]: sqrt(var + 1e-4) of every channel over the tokens of each sequence of x [S, K, E], or packed [T, E].

    var divides by one less than the tokens; of a single one it is 0.
    """
    if packing is None:
        return (x.var(1, correction=min(1, x.shape[1] - 1)) + 1e-4).sqrt()
    count = packing.cu_seqlens.diff()[:, None]
    inside, x = packing.pad(x.new_ones(x.shape[0], 1)), packing.pad(x)
    centred = (x - x.sum(1, keepdim=True) / count[:, None].clamp_min(1)) * inside
    return (centred.square().sum(1) / (count - 1).clamp_min(1) + 1e-4).sqrt()
