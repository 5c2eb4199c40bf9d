"""What the models with a target encoder share: three networks, their checkpoints, the training step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.masks import MaskBatch, Masks
from jepa_kernels.models import checkpoints
from jepa_kernels.nn import EMA, Encoder, Predictor

AnyMasks = Masks | tuple[Tensor, Tensor]
Self = TypeVar("Self", bound="JEPA")


class JEPA(nn.Module):
    """A context encoder, its moving average as target encoder, and a predictor.

    A model says how it predicts (`forward`), what it compares predictions with (`targets`) and how (`compare`).
    """

    published_name: ClassVar[str]
    inputs: ClassVar[str]  # what a batch holds, in messages

    def __init__(
        self, context_encoder: Encoder, predictor: Predictor, *, shadow_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.context_encoder, self.predictor = context_encoder, predictor
        self.ema: EMA
        object.__setattr__(self, "ema", EMA(self.context_encoder, shadow_dtype=shadow_dtype))  # no submodule: ...
        self.target_encoder = self.ema.module  # ... its weights have their published names here alone
        self.register_load_state_dict_post_hook(_after_load)

    def targets(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def compare(self, predicted: Tensor, targets: Tensor, masks: AnyMasks) -> Tensor:
        raise NotImplementedError

    def loss(self, batch: Tensor, masks: AnyMasks) -> Tensor:
        """The training loss, an fp32 scalar; gradients reach the context encoder and the predictor."""
        return self.compare(self(batch, masks), self.targets(batch), masks)

    def load(self: Self, source: Mapping[str, Any] | str | os.PathLike[str]) -> Self:
        """Load a published checkpoint (encoder, predictor, target_encoder) or this model's own state dict.

        source: the mapping, or the path of a torch file, which is read with weights_only=True, or of a .safetensors
        file. Prefixes of wrappers (`module.`, ...) are dropped. Raises ValueError, and loads nothing, for anything
        that does not fit: missing or unknown names, other shapes, dtypes that are not real floating, values that are
        not finite.
        """
        name = type(self).__name__
        state = checkpoints.strip(checkpoints.read(name, source))
        if "context_encoder.patch_embed.proj.weight" in state:
            checkpoints.load(name, {"model": (self, state)}, lambda: "pass weights of this model")
        else:
            parts = self._published(state)
            checkpoints.load(name, parts, lambda: self._remedy(parts["encoder"][1]))
        self.ema.refresh()
        return self

    def _published(self, state: Mapping[str, Any]) -> dict[str, tuple[nn.Module, Mapping[str, Any]]]:
        """{name: (network, its weights)} of a checkpoint of the published layout."""
        modules = {
            "encoder": self.context_encoder,
            "predictor": self.predictor,
            "target_encoder": self.target_encoder,
        }
        missing = [name for name in modules if not isinstance(state.get(name), Mapping)]
        if missing:
            found = ", ".join(sorted(str(name) for name in state)[:8]) or "nothing"
            remedy = f"pass a file of the published {self.published_name} layout or this model's state_dict()"
            fail(type(self).__name__, "checkpoint", f"hold {', '.join(missing)}", found, remedy)
        return {name: (module, checkpoints.strip(state[name])) for name, module in modules.items()}

    def _remedy(self, encoder: Mapping[str, Any]) -> str:
        """Name the size that an encoder of the published layout, which does not fit, seems to be of."""
        raise NotImplementedError

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.ema.refresh()
        return self

    def _masks(self, batch: Tensor, masks: AnyMasks) -> Masks:
        """The masks of this batch, on a device."""
        if isinstance(masks, tuple):
            return self._rectangular(batch.shape[0], *masks)
        if isinstance(masks, MaskBatch):
            fail(type(self).__name__, "masks", "be on the device", "a MaskBatch", "pass masks.to(device)", TypeError)
        if masks.batch != batch.shape[0]:
            requirement = f"belong to {batch.shape[0]} {self.inputs}"
            fail(type(self).__name__, "masks", requirement, masks.batch, "sample that many")
        return masks

    def _rectangular(self, batch: int, context_ids: Tensor, target_ids: Tensor) -> Masks:
        raise NotImplementedError


def _after_load(model: JEPA, _: Any) -> None:
    model.ema.refresh()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    masks: AnyMasks,
    momentum: float | Tensor,
    *,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """One step: loss, backward, optimiser, moving average. Returns the loss, without a device sync.

    model: a JEPA, or a wrapper that keeps one in `.module` (DDP).
    optimizer: one without targets; or an `AdamWEMA` with those of model.ema (`ema.pairs()`), which moves them itself.
    momentum: in [0, 1], of the target encoder's moving average, which is updated after the optimiser.
    dtype: run the networks under autocast to it; None: in the parameters' dtype.
    scaler: for float16; the moving average is updated even where it skips the optimiser, as published.
    """
    jepa = cast(JEPA, getattr(model, "module", model))
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype is not None):
        loss = jepa.compare(model(batch, masks), jepa.targets(batch), masks)
    moves_targets = isinstance(optimizer, jk.AdamWEMA) and bool(optimizer.targets)
    (loss if scaler is None else scaler.scale(loss)).backward()
    with jepa.ema.moved_by(cast(jk.AdamWEMA, optimizer), momentum) if moves_targets else nullcontext():
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if not moves_targets:
        jepa.ema.apply_update_(jepa.context_encoder, momentum)
    return loss.detach()
