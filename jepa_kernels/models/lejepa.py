"""LeJEPA: views of an image meet at their mean, and SIGReg keeps embeddings apart; no teacher, no predictor.

Source: Balestriero and LeCun, LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics
(arXiv:2511.08544).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.nn import Encoder, SIGReg


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


def published(**changes: Any) -> LeJEPAConfig:
    """Two global and six local views, which meet at the mean of all."""
    return replace(LeJEPAConfig(), **changes)


SIZES: dict[str, Callable[..., LeJEPAConfig]] = {"published": published}


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
        averaged.
    In a process group SIGReg is that of all ranks' embeddings (see `nn.SIGReg`), and gradients averaged by
    DistributedDataParallel are those of one process with the whole batch, but for the projector's batch norms: convert
    these with torch.nn.SyncBatchNorm.convert_sync_batchnorm.
    """

    inputs = "images"  # what a batch holds, in messages

    def __init__(self, backbone: nn.Module, config: LeJEPAConfig | None = None) -> None:
        super().__init__()
        self.config = c = LeJEPAConfig() if config is None else config
        if not 0 <= c.weight <= 1:
            fail("LeJEPA", "weight", "lie in 0..1", c.weight, "0.02 is published")
        self.backbone = backbone
        hidden = c.proj_hidden
        self.projector = nn.Sequential(
            nn.Linear(c.embed_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, c.proj_dim),
        )
        self.sigreg = SIGReg(c.slices, c.knots)

    def embed(self, views: Sequence[Tensor]) -> Tensor:
        """What the backbone gives: views [B, C, H, W] each, of any sizes -> [V, B, E]."""
        batch = self._batch(views)
        if isinstance(self.backbone, Encoder):
            x, packing = self.backbone.ragged(views)
            return packing.mean(x).unflatten(0, (len(views), batch))
        sizes = [tuple(view.shape[1:]) for view in views]
        found: list[Tensor | None] = [None] * len(views)
        for size in dict.fromkeys(sizes):
            own = [v for v, other in enumerate(sizes) if other == size]
            pooled = self._pooled(self.backbone(torch.cat([views[v] for v in own])), len(own) * batch)
            for v, x in zip(own, pooled.chunk(len(own)), strict=True):
                found[v] = x
        return torch.stack([x for x in found if x is not None])

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Projections of all views: [V, B, proj_dim]."""
        embedded = self.embed(views)
        return self.projector(embedded.flatten(0, 1)).unflatten(0, embedded.shape[:2])

    def objective(self, projected: Tensor) -> Losses:
        """The loss and its parts, of what `forward` gives."""
        c, p = self.config, projected.float()
        if not 1 <= (c.global_views or 1) <= len(p):
            fail("LeJEPA", "global_views", f"lie in 1..{len(p)}, the views", c.global_views, "pass more views")
        meet = p[: c.global_views].mean(0)
        invariance, sigreg = (p - meet).square().mean(), self.sigreg(p)
        return Losses((1 - c.weight) * invariance + c.weight * sigreg, invariance, sigreg)

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        """The training loss, an fp32 scalar."""
        return self.objective(self(views)).loss

    def _batch(self, views: Sequence[Tensor]) -> int:
        shapes = [tuple(view.shape) for view in views]
        if not shapes or any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
            wanted = "be one or more [B, C, H, W] of one B"
            fail("LeJEPA", "views", wanted, shapes, "pass each view of all images as one tensor")
        return shapes[0][0]

    def _pooled(self, x: Any, count: int) -> Tensor:
        """[n, E] of a backbone's output."""
        width = self.config.embed_dim
        if not isinstance(x, Tensor) or x.dim() not in (2, 3) or (x.shape[0], x.shape[-1]) != (count, width):
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            wanted = f"give [{count}, {width}] or [{count}, N, {width}]"
            fail("LeJEPA", "backbone", wanted, given, "wrap it, or set embed_dim")
        return x if x.dim() == 2 else x.mean(1)
