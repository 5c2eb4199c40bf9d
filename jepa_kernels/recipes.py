"""What `train` does in its own way for each model: the networks, their inputs and masks, the probes at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from jepa_kernels import probe, pusht
from jepa_kernels._core.check import fail
from jepa_kernels.configs import Config
from jepa_kernels.data import PhotoCrops, need, normalize
from jepa_kernels.images import Folder, ImageCrops
from jepa_kernels.masks import MultiBlock2d, MultiBlock3d, Spec3d
from jepa_kernels.masks.sampler import Sampler
from jepa_kernels.models.ijepa import IJEPA
from jepa_kernels.models.jepa import JEPA
from jepa_kernels.models.lejepa import LeJEPA, ViTConfig
from jepa_kernels.models.lewm import LeWMConfig, LeWorldModel
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config
from jepa_kernels.models.vl_jepa import VLJEPA
from jepa_kernels.rooms import answers, stream
from jepa_kernels.rooms.scenes import Scenes
from jepa_kernels.training import flops
from jepa_kernels.video import VideoClips, listed
from jepa_kernels.views import Views, load_digits


@dataclass(frozen=True)
class Recipe:
    """
    model: (a config's `model`, the dtype of the target's rounded weights, or None) -> the networks.
    inputs: a config -> (what item i shows, the masks of step n), functions of (seed, i) and (seed, n) alone. Without
        masks items are pairs of tensors, pixels and what else the model is given.
    watch: the networks -> (the module whose output tells of the latents, what makes these [B, N, E] of it).
    probes: (a config, the trained networks, what makes others at random initialisation) -> scores, one each.
    needs: packages that these import when they are called.
    work: (the networks, a batch's pixels, what else they are given) -> what a step on it computes.
    prepare: uint8 pixels -> what the model takes.
    collate: a config -> what makes a batch of items without masks, (pixels, what else); None: both are stacked.
    pictures: (a config, the trained networks) -> {name: PNG}, of what a table does not show.
    """

    model: Callable[..., Any]
    inputs: Callable[[Config], tuple[Dataset[Any], Sampler | None]]
    watch: Callable[[Any], tuple[nn.Module, Callable[[Tensor], Tensor]]]
    probes: Callable[[Config, Any, Callable[[], Any]], list[dict[str, Any]]]
    needs: tuple[str, ...]
    work: Callable[..., flops.Work]
    prepare: Callable[[Tensor], Tensor] = normalize
    collate: Callable[[Config], Callable[[list[Any]], Any]] | None = None
    pictures: Callable[[Config, Any], dict[str, bytes]] | None = None


def _target_latents(model: JEPA) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Of the target encoder's last level; V-JEPA 2 itself has them at the targets alone."""

    def normed(features: Tensor) -> Tensor:
        width = features.shape[-1]
        weight, bias, eps = model.target_encoder.last_norm()
        return F.layer_norm(features, (width,), weight[-width:], bias[-width:], eps)

    return model.target_encoder.blocks[-1], normed


def _one_token(rows: Tensor) -> Tensor:
    """Embeddings [B, E] as latents of one place."""
    return rows.detach()[:, None]


def _as_they_are(pixels: Tensor) -> Tensor:
    return pixels


def _side(config: Config) -> int:
    size = config.model.crop_size
    if not isinstance(size, int):
        fail("train", "model.crop_size", "be one number", size, "crops are square")
    return size


def _folder(config: Config, part: str = "train") -> Folder | None:
    """Of your own images, if there is one."""
    d: Any = config.data
    return Folder(d.root, part, d.held_out) if d.root else None


def _photos(config: Config) -> tuple[Dataset[Any], MultiBlock2d]:
    d: Any = config.data
    size, folder = _side(config), _folder(config)
    how: Any = dict(scale=d.crop_scale, ratio=d.crop_ratio, flip=d.horizontal_flip, grey=d.grey, seed=config.seed)
    crops = PhotoCrops(size, **how) if folder is None else ImageCrops(folder, size, **how)
    return crops, MultiBlock2d(size // config.model.patch_size, seed=config.seed, **vars(config.mask))


def _photo_probes(config: Config, model: JEPA, fresh: Callable[[], JEPA]) -> list[dict[str, Any]]:
    return _picture_probes(config, (model.target_encoder, lambda: fresh().target_encoder))


def _picture_probes(config: Config, encoders: tuple[Any, Any], **options: Any) -> list[dict[str, Any]]:
    """Of the bundled photos, or of your own images' classes."""
    p: Any = config.probe
    seen, held_out = _folder(config), _folder(config, "held_out")
    if seen is None or held_out is None:
        return probe.photos(*encoders, _side(config), **{**vars(p), **options})
    if not len(held_out):
        print("no probe: data.root has no classes (two subfolders or more that hold all images), or none is held out")
        return []
    return probe.images(*encoders, seen, held_out, _side(config), seeds=p.seeds, per_class=p.per_photo, **options)


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
    if not d.whole:
        make(span="held_out")  # too short for the probes is known before the first step
    how: Any = dict(span="whole", keep=False) if d.whole else {}
    clips = make(**how, scale=d.crop_scale, ratio=d.crop_ratio, flip=d.horizontal_flip, grey=d.grey, seed=config.seed)
    specs = (
        Spec3d(m.short_num_blocks, m.short_spatial_scale, aspect_ratio=m.aspect_ratio),
        Spec3d(m.long_num_blocks, m.long_spatial_scale, aspect_ratio=m.aspect_ratio),
    )
    side = clips.size // c.patch_size
    grid = c.num_frames // c.tubelet_size, side, side
    drawn = dict(truncate=m.truncate, truncate_group=m.truncate_group, bucket=m.bucket, seed=config.seed)
    return clips, MultiBlock3d(grid, specs, **drawn)


def _clips_of(config: Config) -> Callable[..., VideoClips]:
    c: Any = config.model
    d: Any = config.data
    how = dict(frame_step=d.frame_step, fps=d.fps, videos=listed(d.videos))
    return partial(VideoClips, _side(config), c.num_frames, **how)


def _clip_probes(config: Config, model: JEPA, fresh: Callable[[], JEPA]) -> list[dict[str, Any]]:
    if config.data.whole:  # type: ignore[attr-defined]
        print("no probe: data.whole leaves nothing held out")
        return []
    return probe.clips(model.target_encoder, lambda: fresh().target_encoder, _clips_of(config), **vars(config.probe))


def _lewm(config: LeWMConfig, *, shadow_dtype: torch.dtype | None = None) -> LeWorldModel:
    return LeWorldModel(config)


def _windows(config: Config) -> tuple[pusht.Windows, None]:
    c: Any = config.model
    if c.action_dim != pusht.ACTION_DIM:
        fail("train", "model.action_dim", f"be {pusht.ACTION_DIM}", c.action_dim, "PushT's agent moves in a plane")
    d: Any = config.data
    counts = dict(episodes=d.episodes, collect_seed=d.collect_seed)
    return pusht.Windows(c.history + c.rollout_steps, seed=config.seed, **counts, **_episodes(config)), None


def _episodes(config: Config) -> dict[str, Any]:
    d: Any = config.data
    return dict(steps=d.steps, size=_side(config), frame_skip=d.frame_skip)


def _state_probes(config: Config, model: LeWorldModel, fresh: Callable[[], LeWorldModel]) -> list[dict[str, Any]]:
    d: Any = config.data
    p: Any = config.probe
    seen, held_out = (
        pusht.load(part, count, seed=d.collect_seed, **_episodes(config))
        for part, count in (("train", d.episodes), ("held_out", p.held_out))
    )
    fitted_on = pusht.Episodes(*(x[: p.fitted_on] for x in (seen.frames, seen.actions, seen.states)))
    return pusht.probes(model, fresh, fitted_on, held_out)


def _embeddings(model: LeWorldModel | LeJEPA) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    return model.projector, _one_token


def _lejepa(config: ViTConfig, *, shadow_dtype: torch.dtype | None = None) -> LeJEPA:
    return LeJEPA.of(config)


def _views(config: Config) -> tuple[Views, None]:
    c: Any = config.model
    d: Any = config.data
    patch = c.patch_size
    for name, side in (("model.crop_size", _side(config)), ("data.local_size", d.local_size)):
        if side < patch or side % patch:
            fail("train", name, f"be a multiple of model.patch_size {patch}", side, "views are cut into whole patches")
    meet, views = c.global_views, d.global_views + d.local_views
    if meet is not None and meet > views:
        fail("train", "model.global_views", f"be at most {views}, the views", meet, "raise data.global_views")
    if d.source == "mnist" and d.root:
        fail("train", "data.root", "be empty with data.source mnist", repr(d.root), "leave one of them out")
    if d.source == "mnist":
        load_digits("train")  # a package that is missing is known before the first step
    elif not d.root:
        need("skimage")
    crops = Views(
        _folder(config) or d.source,
        _side(config),
        d.local_size,
        global_views=d.global_views,
        local_views=d.local_views,
        region=d.region_scale,
        global_scale=d.global_scale,
        local_scale=d.local_scale,
        ratio=d.crop_ratio,
        flip=d.horizontal_flip,
        grey=d.grey,
        jitter=d.jitter,
        hue=d.hue,
        blur=d.blur,
        solarize=d.solarize,
        seed=config.seed,
    )
    return crops, None


def _view_probes(config: Config, model: LeJEPA, fresh: Callable[[], LeJEPA]) -> list[dict[str, Any]]:
    encoders = model.backbone, lambda: fresh().backbone
    if config.data.source == "mnist":  # type: ignore[attr-defined]
        return probe.digits(*encoders, _side(config), seeds=config.probe.seeds)  # type: ignore[union-attr]
    return _picture_probes(config, encoders, prepare=lambda pixels: pixels / 255)


def _answering(config: answers.RoomsConfig, *, shadow_dtype: torch.dtype | None = None) -> VLJEPA:
    return answers.build(config)


def _rooms(config: Config) -> tuple[Scenes, None]:
    return _rooms_of(config)(seed=config.seed), None


def _rooms_of(config: Config) -> Callable[..., Scenes]:
    d: Any = config.data
    return partial(Scenes, _side(config), side=d.side, objects=d.objects)


def _questions(config: Config) -> answers.Collate:
    c: Any = config.model
    return answers.Collate(c.text)


def _stream(config: Config, seed: int) -> stream.Stream:
    p: Any = config.probe
    d: Any = config.data
    return stream.stream(p.frames, _side(config), side=d.side, seed=seed)


def _answer_probes(config: Config, model: VLJEPA, fresh: Callable[[], VLJEPA]) -> list[dict[str, Any]]:
    p: Any = config.probe
    counts = dict(questions=p.questions, fitted_on=p.fitted_on)
    found = answers.probes(model, fresh, _rooms_of(config), **counts)
    return [*found, stream.compare(model, [_stream(config, seed) for seed in range(p.streams)])]


def _answers(model: VLJEPA) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    return model.predictor.out_proj, _one_token


RECIPES = {
    "ijepa": Recipe(IJEPA, _photos, _target_latents, _photo_probes, ("skimage", "sklearn"), flops.jepa),
    "vjepa2": Recipe(_vjepa2, _clips, _target_latents, _clip_probes, ("av", "sklearn"), flops.jepa),
    "lewm": Recipe(_lewm, _windows, _embeddings, _state_probes, (), flops.lewm, prepare=_as_they_are),
    "lejepa": Recipe(_lejepa, _views, _embeddings, _view_probes, ("sklearn",), flops.lejepa, prepare=_as_they_are),
    "vl_jepa": Recipe(
        _answering,
        _rooms,
        _answers,
        _answer_probes,
        ("sklearn",),
        flops.vl_jepa,
        prepare=_as_they_are,
        collate=_questions,
        pictures=lambda config, model: {"selective.png": stream.picture(model, _stream(config, 0))},
    ),
}
