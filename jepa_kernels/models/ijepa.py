"""I-JEPA: predict the latents of image blocks from those of a context block.

Source: Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture
(arXiv:2301.08243). Parameter names and semantics are those of the published code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.masks import MaskBatch, Masks
from jepa_kernels.models import checkpoints
from jepa_kernels.nn import EMA, Encoder, Predictor


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


class IJEPA(nn.Module):
    """A context encoder, its moving average as target encoder, and a predictor.

    shadow_dtype: bf16 or fp16: the target encoder also keeps low-precision copies of its weights, which its forward
        under autocast to that dtype reads instead of casting (see `nn.EMA`).
    .ema: moves the target encoder, which is its `.module`.

    Masks are `Masks` (a MaskBatch moved with `.to(device)`), packed or rectangular, or a pair of rectangular ids
    (context [B, Kc], target [masks * B, Kt], mask-major).
    """

    def __init__(self, config: IJEPAConfig | None = None, *, shadow_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = c = IJEPAConfig() if config is None else config
        self.context_encoder = Encoder(
            c.crop_size, c.patch_size, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio, c.in_chans
        )
        self.predictor = Predictor(
            self.context_encoder.grid, c.embed_dim, c.predictor_embed_dim, c.predictor_depth, c.num_heads
        )
        self.ema: EMA
        object.__setattr__(self, "ema", EMA(self.context_encoder, shadow_dtype=shadow_dtype))  # no submodule: ...
        self.target_encoder = self.ema.module  # ... its weights have their published names here alone
        self.register_load_state_dict_post_hook(_after_load)

    def forward(self, batch: Tensor, masks: Masks | tuple[Tensor, Tensor]) -> Tensor:
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

    def compare(self, predicted: Tensor, targets: Tensor, masks: Masks | tuple[Tensor, Tensor]) -> Tensor:
        """Smooth-L1 distance of predictions to layer-normalised targets: mean per mask, mean of masks."""
        m = self._masks(targets, masks)
        return jk.latent_loss(predicted, targets, m.target_ids, packing=m.target_packing)

    def loss(self, batch: Tensor, masks: Masks | tuple[Tensor, Tensor]) -> Tensor:
        """The training loss, an fp32 scalar; gradients reach the context encoder and the predictor."""
        return self.compare(self(batch, masks), self.targets(batch), masks)

    def load(self, source: Mapping[str, Any] | str | os.PathLike[str]) -> IJEPA:
        """Load a published checkpoint (encoder, predictor, target_encoder) or this model's own state dict.

        source: the mapping, or the path of a torch file, which is read with weights_only=True. Prefixes of
        wrappers (`module.`, ...) are dropped. Raises ValueError, and loads nothing, for anything that does not
        fit: missing or unknown names, other shapes, dtypes that are not real floating, values that are not finite.
        """
        state = checkpoints.strip(checkpoints.read("IJEPA", source))
        own = "context_encoder.norm.weight" in state
        parts = {"model": (self, state)} if own else self._published(state)
        checkpoints.load("IJEPA", parts, lambda: "pass weights of this model" if own else _remedy(state))
        self.ema.refresh()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> IJEPA:
        super()._apply(fn, recurse)
        self.ema.refresh()
        return self

    def _published(self, state: Mapping[str, Any]) -> dict[str, tuple[nn.Module, Mapping[str, Any]]]:
        modules = {
            "encoder": self.context_encoder,
            "predictor": self.predictor,
            "target_encoder": self.target_encoder,
        }
        missing = [name for name in modules if not isinstance(state.get(name), Mapping)]
        if missing:
            found = ", ".join(sorted(str(name) for name in state)[:8]) or "nothing"
            remedy = "pass a file of the published I-JEPA layout or this model's state_dict()"
            fail("IJEPA", "checkpoint", f"hold {', '.join(missing)}", found, remedy)
        return {name: (module, checkpoints.strip(state[name])) for name, module in modules.items()}

    @staticmethod
    def _masks(batch: Tensor, masks: Masks | tuple[Tensor, Tensor]) -> Masks:
        if isinstance(masks, tuple):
            return _rectangular(batch.shape[0], *masks)
        if isinstance(masks, MaskBatch):
            fail("IJEPA", "masks", "be on the device", "a MaskBatch", "pass masks.to(device)", TypeError)
        if masks.batch != batch.shape[0]:
            fail("IJEPA", "masks", f"belong to {batch.shape[0]} images", masks.batch, "sample that many")
        return masks


def _after_load(model: IJEPA, _: Any) -> None:
    model.ema.refresh()


def _rectangular(batch: int, context_ids: Tensor, target_ids: Tensor) -> Masks:
    rows = context_ids.shape[0], target_ids.shape[0]
    if rows[0] != batch or rows[1] % max(batch, 1):
        requirement = f"hold {batch} contexts and a multiple of {batch} targets"
        fail("IJEPA", "masks", requirement, rows, "pass ids [B, Kc] and [masks * B, Kt], mask-major")
    return Masks(batch, context_ids, target_ids)


def _remedy(state: Mapping[str, Any]) -> str:
    """Name the size that a checkpoint of the published layout seems to hold."""
    encoder = checkpoints.strip(state["encoder"])
    weight, table = encoder.get("patch_embed.proj.weight"), encoder.get("pos_embed")
    if not (isinstance(weight, Tensor) and weight.dim() == 4 and isinstance(table, Tensor) and table.dim() == 3):
        return "it seems to be of another model than I-JEPA"
    depth = len({name.split(".")[1] for name in map(str, encoder) if name.startswith("blocks.")})
    tokens = table.shape[1]
    for name, size in SIZES.items():
        c = size()
        if (c.embed_dim, c.depth, c.patch_size) == (weight.shape[0], depth, weight.shape[2]):
            return f"it seems to be of {name} with {tokens} patches"
    return f"it has embed_dim {weight.shape[0]}, depth {depth}, patch_size {weight.shape[2]}, {tokens} patches"


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    masks: Masks | tuple[Tensor, Tensor],
    momentum: float | Tensor,
    *,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """One step: loss, backward, optimiser, moving average. Returns the loss, without a device sync.

    model: an IJEPA, or a wrapper that keeps one in `.module` (DDP).
    optimizer: one without targets; or an `AdamWEMA` with those of model.ema (`ema.pairs()`), which moves them itself.
    momentum: in [0, 1], of the target encoder's moving average, which is updated after the optimiser.
    dtype: run the networks under autocast to it; None: in the parameters' dtype.
    scaler: for float16; the moving average is updated even where it skips the optimiser, as published.
    """
    ijepa = cast(IJEPA, getattr(model, "module", model))
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype is not None):
        loss = ijepa.compare(model(batch, masks), ijepa.targets(batch), masks)
    moves_targets = isinstance(optimizer, jk.AdamWEMA) and bool(optimizer.targets)
    (loss if scaler is None else scaler.scale(loss)).backward()
    with ijepa.ema.moved_by(cast(jk.AdamWEMA, optimizer), momentum) if moves_targets else nullcontext():
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if not moves_targets:
        ijepa.ema.apply_update_(ijepa.context_encoder, momentum)
    return loss.detach()
