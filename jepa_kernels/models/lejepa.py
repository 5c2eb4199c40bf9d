"""LeJEPA: views of an image meet at their mean, and SIGReg keeps embeddings apart; no teacher, no predictor.

Source: Balestriero and LeCun, LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics
(arXiv:2511.08544).
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.models import checkpoints
from jepa_kernels.models.checkpoints import LoadReport, Source
from jepa_kernels.nn import BatchNorm1d, Encoder, SIGReg
from jepa_kernels.nn.linear import Linear
from jepa_kernels.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD

Pixels = Sequence[Tensor] | Tensor
ANY_SIZE = "interpolate_pos_encoding"  # what transformers' ViTs are asked with for images that are not of their size


@dataclass(frozen=True)
class LeJEPAConfig:
    """embed_dim: what the backbone gives for a view. proj_dim, proj_hidden: of the projector.

    weight: lambda in 0..1, the one number to tune. slices, knots: of `sigreg`.
    global_views: how many of the views, the first ones, say where all are to meet; None: all of them.
    """

    embed_dim: int = 384
    proj_hidden: int = 2048
    proj_dim: int = 128
    weight: float = 0.02
    slices: int = 1024
    knots: int = 17
    global_views: int | None = None


@dataclass(frozen=True)
class ViTConfig(LeJEPAConfig):
    """Also of the `Encoder` that `LeJEPA.of` builds, for views of any sides that patch_size divides."""

    crop_size: int = 128  # pixels per side of the global views
    patch_size: int = 8
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0


def vit_small(**changes: Any) -> ViTConfig:
    """ViT-S/8 at 128 pixels, as in the authors' minimal example, but for rotary positions."""
    return replace(ViTConfig(), **changes)


def digits(**changes: Any) -> ViTConfig:
    """One that trains on two CPU cores in minutes, on MNIST's 28 pixels."""
    encoder = dict(crop_size=28, patch_size=14, embed_dim=128, depth=4, num_heads=4, mlp_ratio=2.0)
    return vit_small(**{**encoder, **dict(proj_hidden=512, proj_dim=64), **changes})


SIZES: dict[str, Callable[..., ViTConfig]] = {f.__name__: f for f in (vit_small, digits)}


class Losses(NamedTuple):
    """fp32 scalars: (1 - lambda) invariance + lambda sigreg, and both."""

    loss: Tensor
    invariance: Tensor
    sigreg: Tensor


class LeJEPA(nn.Module):
    """A backbone and a projector, trained by invariance and SIGReg alone.

    loss = (1 - lambda) mean_v mean |p_v - m|^2 + lambda mean_v sigreg(p_v),   m = the mean of the (global) views' p

    backbone: an `Encoder` of images, whose views of all sizes go through in one packed pass; or any module, such as
        timm's or Hugging Face's, pixels [n, C, H, W] -> [n, E] or [n, N, E], called once for each size. Tokens are
        averaged, a class token among them. Of outputs as transformers has them `last_hidden_state` is taken, and its
        models are asked to interpolate their positions. timm's ViTs take views of several sizes with
        dynamic_img_size=True. It is given floating pixels, normalised as it wants them. Parameters behind anything else
        that it computes, such as the pooler that transformers' ViTModel has by default, get no gradient, which
        DistributedDataParallel takes with find_unused_parameters=True alone: build it with add_pooling_layer=False.
    In a process group SIGReg and the projector's batch norms are those of all ranks (see `nn.SIGReg`,
    `nn.BatchNorm1d`), and gradients averaged by DistributedDataParallel those of one process with the whole batch,
    where every rank has as many images.
    """

    inputs = "images"  # what a batch holds, in messages

    def __init__(self, backbone: nn.Module, config: LeJEPAConfig | None = None) -> None:
        super().__init__()
        self.config = c = LeJEPAConfig() if config is None else config
        if not 0 <= c.weight <= 1:
            fail("LeJEPA", "weight", "lie in 0..1", c.weight, "0.02 is published")
        if c.global_views is not None and c.global_views < 1:
            fail("LeJEPA", "global_views", "be at least 1", c.global_views, "leave it out for all views")
        self.backbone = backbone
        hidden = c.proj_hidden
        self.projector = nn.Sequential(
            Linear(c.embed_dim, hidden),
            BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            Linear(hidden, hidden),
            BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            Linear(hidden, c.proj_dim),
        )
        self.sigreg = SIGReg(c.slices, c.knots)

    @classmethod
    def of(cls, config: ViTConfig | None = None) -> LeJEPA:
        """With an `Encoder` of these sizes and rotary positions.

        It takes pixels that are uint8, or floating in 0..1; ImageNet's mean and standard deviation are taken out on the
        way in.
        """
        c = ViTConfig() if config is None else config
        sizes = c.crop_size, c.patch_size, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio
        return cls(Encoder(*sizes, rope="interleaved", mean=IMAGENET_MEAN, std=IMAGENET_STD), c)

    def embed(self, views: Pixels, local: Tensor | None = None) -> Tensor:
        """What the backbone gives: [V, B, E]; arguments as of `forward`."""
        views = _apart(views, local)
        batch = self._batch(views)
        if isinstance(self.backbone, Encoder):
            x, packing = self.backbone.ragged(views)
            return self._pooled(packing.mean(x), len(views) * batch).unflatten(0, (len(views), batch))
        if not isinstance(self._inner(), Encoder) and not all(view.is_floating_point() for view in views):
            given, remedy = [view.dtype for view in views], "normalise them, as jepa_kernels.data.normalize does"
            fail("LeJEPA", "views", "be floating for a backbone that is no Encoder", given, remedy)
        sizes = [tuple(view.shape[1:]) for view in views]
        found: list[Tensor | None] = [None] * len(views)
        for size in dict.fromkeys(sizes):
            own = [v for v, other in enumerate(sizes) if other == size]
            pooled = self._pooled(self._asked(torch.cat([views[v] for v in own])), len(own) * batch)
            for v, x in zip(own, pooled.chunk(len(own)), strict=True):
                found[v] = x
        return torch.stack([x for x in found if x is not None])

    def forward(self, views: Pixels, local: Tensor | None = None) -> Tensor:
        """Projections of all views: [V, B, proj_dim].

        views: [B, C, H, W] each, of any sizes, global ones first; or, as data loaders stack those of one size,
        [B, V, C, H, W], and `local` the others.
        """
        embedded = self.embed(views, local)
        return self.projector(embedded.flatten(0, 1)).unflatten(0, embedded.shape[:2])

    def losses(self, projected: Tensor) -> Losses:
        """The loss and its parts, of what `forward` gives."""
        c, p = self.config, projected.float()
        if c.global_views is not None and c.global_views > len(p):
            fail("LeJEPA", "global_views", f"lie in 1..{len(p)}, the views", c.global_views, "pass more views")
        meet = p[: c.global_views].mean(0)
        invariance, sigreg = (p - meet).square().mean(), self.sigreg(p)
        return Losses((1 - c.weight) * invariance + c.weight * sigreg, invariance, sigreg)

    def objective(self, projected: Tensor, views: Pixels | None = None, local: Tensor | None = None) -> Tensor:
        """The loss, an fp32 scalar, of what `forward` gives; the views themselves say no more."""
        return self.losses(projected).loss

    def loss(self, views: Pixels, local: Tensor | None = None) -> Tensor:
        """The training loss, an fp32 scalar; arguments as of `forward`."""
        return self.objective(self(views, local))

    def load(self, source: Source) -> LoadReport:
        """Load a file of `save`, or this model's state dict, whole or not at all.

        Raises ValueError, and loads nothing, for weights that do not fit or are not finite, and for a file of `save`
        whose heads are others.
        """
        theirs = checkpoints.config_in("LeJEPA", source).get("num_heads")
        own = getattr(self.config, "num_heads", theirs)
        if theirs not in (None, own):
            fail("LeJEPA", "checkpoint", f"be of {own} heads", theirs, "build the model by from_checkpoint")
        state = checkpoints.read("LeJEPA", source)
        checkpoints.load("LeJEPA", {"model": (self, state)}, lambda _: "build the model by from_checkpoint")
        return LoadReport("LeJEPA", "this model's names", tuple(state), {}, {})

    @classmethod
    def from_checkpoint(cls, source: Source, backbone: nn.Module | None = None) -> tuple[LeJEPA, LoadReport]:
        """Build the model that a file of `save` holds, load it, and put it in evaluation mode.

        backbone: where it is not the `Encoder` that `of` builds. Raises ValueError as `load` does, for a source without
        a config, and for one of another backbone where none is given.
        """
        config = checkpoints.config_in(cls.__name__, source)
        if not config:
            remedy = "build LeJEPA(backbone, config) and load it"
            fail("LeJEPA", "checkpoint", "hold the config, as a file of save does", "none", remedy)
        if backbone is None and "depth" not in config:
            found = "the config of another backbone"
            fail("LeJEPA", "checkpoint", "hold the config of an Encoder", found, "pass the backbone")
        if backbone is None:
            checkpoints.check_fields(cls.__name__, ViTConfig, config, {})
        model = cls.of(ViTConfig(**config)) if backbone is None else cls(backbone, _config(config))
        return model, (model.load(source), model.eval())[0]

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write the weights, and the config as JSON in the metadata, to a .safetensors file, whole or not at all.

        dtype: of the file; None: the weights' own. Raises ValueError and OSError as `JEPA.save` does.
        """
        checkpoints.write("LeJEPA", path, self.state_dict(), dtype, asdict(self.config))

    def _batch(self, views: Sequence[Tensor]) -> int:
        shapes = [tuple(view.shape) for view in views]
        if not shapes or any(len(shape) != 4 or shape[0] != max(shapes[0][0], 1) for shape in shapes):
            wanted = "be one or more [B, C, H, W] of one B, at least 1"
            fail("LeJEPA", "views", wanted, shapes, "pass each view of all images as one tensor")
        return shapes[0][0]

    def _inner(self) -> nn.Module:
        """The backbone itself, where torch.compile has wrapped it."""
        return getattr(self.backbone, "_orig_mod", self.backbone)

    def _asked(self, pixels: Tensor) -> Any:
        """The backbone's output; what it says about views of a size that it does not take comes with the remedy."""
        resizes = ANY_SIZE in inspect.signature(self._inner().forward).parameters
        try:
            return self.backbone(pixels, **({ANY_SIZE: True} if resizes else {}))
        except (AssertionError, ValueError, RuntimeError) as error:  # timm's, transformers', torch's
            if isinstance(error, RuntimeError) and not re.search(r"\b(size|shape)s?\b", str(error), re.IGNORECASE):
                raise  # of memory, dtypes or devices
            remedy = "build it for images of any size (timm: dynamic_img_size=True), or pass views of its own"
            text = f"LeJEPA: views must be of sizes that the backbone takes, got {tuple(pixels.shape[1:])}: {error}"
            raise ValueError(f"{text.rstrip('.')}; {remedy}") from error

    def _pooled(self, x: Any, count: int) -> Tensor:
        """[n, E] of a backbone's output."""
        width, x = self.config.embed_dim, getattr(x, "last_hidden_state", x)
        if not isinstance(x, Tensor) or x.dim() not in (2, 3) or (x.shape[0], x.shape[-1]) != (count, width):
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            wanted = f"give [{count}, {width}] or [{count}, N, {width}]"
            fail("LeJEPA", "backbone", wanted, given, "wrap it, or set embed_dim")
        return x if x.dim() == 2 else x.mean(1)


def _apart(views: Pixels, local: Tensor | None) -> Sequence[Tensor]:
    """Each view by itself, of stacks [B, V, C, H, W]."""
    if not isinstance(views, Tensor):
        return views
    stacks = [views] if local is None else [views, local]
    if any(stack.dim() != 5 for stack in stacks):
        shapes = [tuple(stack.shape) for stack in stacks]
        fail("LeJEPA", "views", "be [B, V, C, H, W] in one tensor", shapes, "or pass a list of [B, C, H, W]")
    return [view for stack in stacks for view in stack.unbind(1)]


def _config(held: dict[str, Any]) -> LeJEPAConfig:
    return LeJEPAConfig(**{name: value for name, value in held.items() if name in LeJEPAConfig.__dataclass_fields__})
