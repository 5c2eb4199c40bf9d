"""What `train` does in its own way for each model: the networks, their inputs and masks, the probes at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from jepa_kernels import probe
from jepa_kernels._core.check import fail
from jepa_kernels.configs import Config
from jepa_kernels.data import PhotoCrops
from jepa_kernels.masks import MultiBlock2d, MultiBlock3d, Spec3d
from jepa_kernels.masks.sampler import Sampler
from jepa_kernels.models.ijepa import IJEPA
from jepa_kernels.models.jepa import JEPA
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config
from jepa_kernels.video import VideoClips


@dataclass(frozen=True)
class Recipe:
    """
    model: (a config's `model`, the dtype of the target's rounded weights, or None) -> the networks.
    inputs: a config -> (what item i shows, the masks of step n), functions of (seed, i) and (seed, n) alone.
    probes: (a config, the trained target encoder, what makes one at random initialisation) -> scores, one each.
    needs: packages that these import when they are called.
    """

    model: Callable[..., JEPA]
    inputs: Callable[[Config], tuple[Dataset[tuple[Tensor, int]], Sampler]]
    probes: Callable[[Config, nn.Module, probe.Fresh], list[dict[str, Any]]]
    needs: tuple[str, ...]


def _side(config: Config) -> int:
    size = config.model.crop_size
    if not isinstance(size, int):
        fail("train", "model.crop_size", "be one number", size, "crops are square")
    return size


def _photos(config: Config) -> tuple[PhotoCrops, MultiBlock2d]:
    d, size = config.data, _side(config)
    crops = PhotoCrops(
        size, scale=d.crop_scale, ratio=d.crop_ratio, flip=d.horizontal_flip, grey=d.grey, seed=config.seed
    )
    return crops, MultiBlock2d(size // config.model.patch_size, seed=config.seed, **vars(config.mask))


def _photo_probes(config: Config, encoder: nn.Module, fresh: probe.Fresh) -> list[dict[str, Any]]:
    return probe.photos(encoder, fresh, _side(config), **vars(config.probe))


def _vjepa2(config: VJEPA2Config, *, shadow_dtype: torch.dtype | None = None) -> VJEPA2:
    model = VJEPA2(config, shadow_dtype=shadow_dtype)
    for part in _unused(model, images=config.image_tokenizer and config.num_frames == 1):
        part.requires_grad_(False)
    return model


def _unused(model: VJEPA2, *, images: bool) -> list[nn.Module | nn.Parameter]:
    """What clips of one length give no gradient: mask tokens but the first, what images alone, or videos, go through,
    norms below the trained levels. The optimiser would have no state of these, and a resumed run would miss it."""
    encoder, predictor = model.context_encoder, model.predictor
    of_images = encoder.patch_embed_img, encoder.img_mod_embed, predictor.img_mod_embed
    of_videos = encoder.patch_embed, encoder.video_mod_embed, predictor.video_mod_embed
    others = [part for part in (of_videos if images else of_images) if part is not None]
    norms = [] if encoder.levels is None else list(encoder.norms_block)[: -encoder.levels]
    return [*list(predictor.mask_tokens)[1:], *others, *norms]


def _clips(config: Config) -> tuple[VideoClips, MultiBlock3d]:
    c: Any = config.model
    d: Any = config.data
    m: Any = config.mask
    make = _clips_of(config)
    make(span="held_out")  # too short for the probes is known before the first step
    clips = make(scale=d.crop_scale, ratio=d.crop_ratio, flip=d.horizontal_flip, grey=d.grey, seed=config.seed)
    specs = (
        Spec3d(m.short_num_blocks, m.short_spatial_scale, aspect_ratio=m.aspect_ratio),
        Spec3d(m.long_num_blocks, m.long_spatial_scale, aspect_ratio=m.aspect_ratio),
    )
    side = clips.size // c.patch_size
    grid = c.num_frames // c.tubelet_size, side, side
    return clips, MultiBlock3d(grid, specs, truncate=m.truncate, seed=config.seed)


def _clips_of(config: Config) -> Callable[..., VideoClips]:
    c: Any = config.model
    d: Any = config.data
    return partial(VideoClips, _side(config), c.num_frames, frame_step=d.frame_step, videos=d.videos)


def _clip_probes(config: Config, encoder: nn.Module, fresh: probe.Fresh) -> list[dict[str, Any]]:
    return probe.clips(encoder, fresh, _clips_of(config), **vars(config.probe))


RECIPES = {
    "ijepa": Recipe(IJEPA, _photos, _photo_probes, ("skimage",)),
    "vjepa2": Recipe(_vjepa2, _clips, _clip_probes, ("av",)),
}
