"""What the models with a target encoder share: three networks, their checkpoints, the training step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.masks import MaskBatch, Masks
from jepa_kernels.models import checkpoints
from jepa_kernels.models.checkpoints import LoadReport, Source
from jepa_kernels.models.layouts import ENCODERS, OWN, Checkpoint, Layout, recognise, to_huggingface
from jepa_kernels.models.sizes import check_config, config_for, describe, model_of, size_of
from jepa_kernels.nn import EMA, Encoder, Predictor

AnyMasks = Masks | tuple[Tensor, Tensor]
Self = TypeVar("Self", bound="JEPA")


class JEPA(nn.Module):
    """A context encoder, its moving average as target encoder, and a predictor.

    A model says how it predicts (`forward`), what it compares predictions with (`targets`) and how (`compare`).

    .average: how the losses of tokens are averaged: "mask", over those of each mask, then over masks, as published; or
        "token", over all.
    """

    published_name: ClassVar[str]
    inputs: ClassVar[str]  # what a batch holds, in messages
    sizes: ClassVar[Mapping[str, Callable[..., Any]]]  # the published ones
    huggingface: ClassVar[Layout | None] = None  # the names in transformers, which may have no such model
    config: Any  # a dataclass

    def __init__(
        self, context_encoder: Encoder, predictor: Predictor, *, shadow_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.context_encoder, self.predictor, self.average = context_encoder, predictor, "mask"
        self.ema: EMA
        object.__setattr__(self, "ema", EMA(self.context_encoder, shadow_dtype=shadow_dtype))  # no submodule: ...
        self.target_encoder = self.ema.module  # ... its weights have their published names here alone
        self.register_load_state_dict_post_hook(_after_load)

    def targets(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def compare(self, predicted: Tensor, targets: Tensor, masks: AnyMasks) -> Tensor:
        raise NotImplementedError

    def objective(self, predicted: Tensor, batch: Tensor, masks: AnyMasks) -> Tensor:
        """The loss of what `forward` gives."""
        return self.compare(predicted, self.targets(batch), masks)

    def loss(self, batch: Tensor, masks: AnyMasks, **options: Any) -> Tensor:
        """The training loss, an fp32 scalar; gradients reach the context encoder and the predictor.

        options: of the model's forward, such as V-JEPA 2's mask_index.
        """
        return self.objective(self(batch, masks, **options), batch, masks)

    def load(self, source: Source) -> LoadReport:
        """Load a published checkpoint in any layout, or this model's own state dict; report what became of it.

        source: a mapping of names, or the path of a torch file (weights_only=True), of a .safetensors file, or of the
        .index.json of one in several. Names may be Meta's, Hugging Face's or timm's, with any prefixes of wrappers
        (`module.`, ...). One encoder is loaded into both; without a predictor the model's stays as it is; tables that
        rotary positions replace, and what belongs to no network, are left out: the report says so. In a file of one
        encoder of clips a table with sines and cosines says V-JEPA; without it the mapping loads as V-JEPA 2.
        Raises ValueError, and loads nothing, for anything else that does not fit: another model or size, missing or
        unknown names, other shapes, dtypes that are not real floating, values that are not finite, tables of another
        grid; a file of `save` whose config differs in what weights do not tell, such as heads and rope.
        """
        found = recognise(type(self).__name__, checkpoints.read(type(self).__name__, source))
        modules = {
            "encoder": self.context_encoder,
            "target_encoder": self.target_encoder,
            "predictor": self.predictor,
        }
        self._refuse_other(found, model_of({name: module.state_dict() for name, module in modules.items()}))
        check_config(type(self).__name__, asdict(self.config), checkpoints.config_in(type(self).__name__, source))
        networks, missing = self._completed(found)
        report = self._fit({name: (modules[name], own) for name, own in networks.items()}, found, missing)
        self.ema.refresh()
        return report

    @classmethod
    def from_checkpoint(cls: type[Self], source: Source, **changes: Any) -> tuple[Self, LoadReport]:
        """Build the model that a checkpoint holds the weights of, and load it.

        A file of `save` holds its config. Of others sizes come from the shapes, heads from the published size of these
        widths; `changes`: fields of the config, such as num_heads where there is no such size. Raises ValueError as
        `load` does, or if heads are not known.
        """
        state = checkpoints.read(cls.__name__, source)
        found = recognise(cls.__name__, state)
        cls._refuse_other(found, cls.published_name)
        changes = {**checkpoints.config_in(cls.__name__, source), **changes}
        model = cls._of(config_for(cls.__name__, cls.sizes, found.networks, changes))
        report = model.load(state)
        random = {name: "at its random start" for name in report.missing if name == "predictor"}
        return model, replace(report, missing={**report.missing, **random})

    @classmethod
    def load_encoder(
        cls, source: Source, *, network: str = "target_encoder", **changes: Any
    ) -> tuple[Encoder, LoadReport]:
        """Build one encoder alone, without gradient, from a checkpoint: what inference needs.

        network: "target_encoder", as published evaluations take, or "encoder"; the other one where a file holds one.
        changes: as of `from_checkpoint`. Raises ValueError as `load` does.
        """
        name = cls.__name__
        if network not in ENCODERS:
            fail(name, "network", f"be {' or '.join(ENCODERS)}", repr(network), "leave it out for the target encoder")
        found = recognise(name, checkpoints.read(name, source))
        cls._refuse_other(found, cls.published_name, "V-JEPA 2-AC")
        kept = network if network in found.networks else next((n for n in ENCODERS if n in found.networks), network)
        alone = Checkpoint(found.layout, {kept: found.networks.get(kept, {})}, dict(found.ignored))
        alone.ignored.update({other: "one encoder was asked for" for other in found.networks if other != kept})
        changes = {**checkpoints.config_in(name, source), **changes}
        with torch.device("meta"):  # three networks of no bytes
            encoder = cls._of(config_for(name, cls.sizes, alone.networks, changes)).target_encoder
        encoder.to_empty(device="cpu").reset_positions()
        missing = {} if kept == network else {network: f"the {kept} takes its place"}
        return encoder, cls._fit({kept: (encoder, alone.networks[kept])}, alone, missing)

    def save(self, path: str | os.PathLike[str], layout: str = "meta", *, dtype: torch.dtype | None = None) -> None:
        """Write the weights to a .safetensors file, whole or not at all.

        layout: "meta": all three networks, `encoder.blocks.0...`, which `load` reads back. "huggingface": what the
            model's class in transformers holds, `VJEPA2Model` the target encoder and the predictor, `IJepaModel` the
            target encoder alone; give its config layer_norm_eps 1e-6.
        dtype: of the file; None: the weights' own.
        The config is in the file, as JSON in its metadata, with layout "meta".

        Raises ValueError for another suffix or layout, OSError where the file can't be written: one that was there
        is then as it was.
        """
        name = type(self).__name__
        target, predictor = self.target_encoder.state_dict(), self.predictor.state_dict()
        if layout == "meta":
            networks = {"encoder": self.context_encoder.state_dict(), "target_encoder": target, "predictor": predictor}
            tensors = {f"{network}.{key}": value for network, own in networks.items() for key, value in own.items()}
            config = asdict(self.config)
        elif layout == "huggingface" and self.huggingface is not None:
            tensors, config = to_huggingface(name, self.huggingface, {"encoder": target, "predictor": predictor}), {}
        else:
            known = "meta" if self.huggingface is None else "meta or huggingface"
            fail(name, "layout", f"be {known}", repr(layout), "leave it out for Meta's")
        checkpoints.write(name, path, tensors, dtype, config)

    @classmethod
    def _of(cls: type[Self], config: Any) -> Self:
        return cast(Callable[[Any], Self], cls)(config)  # models take their config alone

    @classmethod
    def _completed(cls, found: Checkpoint) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
        """{network of the model: its weights}, one encoder in place of two; and what the checkpoint lacks."""
        names, missing = (*ENCODERS, "predictor"), {}
        networks: dict[str, Mapping[str, Any]] = {
            name: found.networks[name] for name in names if name in found.networks
        }
        if not networks.keys() & set(ENCODERS) or (found.layout is OWN and len(networks) < len(names)):
            wanted = ", ".join(name for name in names if name not in networks)
            held = ", ".join(sorted([*found.networks, *found.ignored])[:8])
            remedy = f"pass a published file of {cls.published_name} or this model's state_dict()"
            fail(cls.__name__, "checkpoint", f"hold {wanted}", held, remedy)
        for name, other in (ENCODERS, ENCODERS[::-1]):
            if name not in networks:
                networks[name], missing[name] = networks[other], f"the {other}'s weights are in its place"
        if "predictor" not in networks:
            missing["predictor"] = "left as it was"
        return networks, missing

    @classmethod
    def _refuse_other(cls, found: Checkpoint, *published: str | None) -> None:
        """Raise ValueError for a checkpoint of a model that is none of these."""
        kind = model_of(found.networks)
        if kind not in (None, *published):
            size = describe(cls.sizes, size_of(found.networks))
            fail(cls.__name__, "checkpoint", f"be of {published[0]}", f"one of {kind}, {size}", "build that model")

    @classmethod
    def _fit(
        cls, parts: Mapping[str, tuple[nn.Module, Mapping[str, Any]]], found: Checkpoint, missing: Mapping[str, str]
    ) -> LoadReport:
        """Load {network: (module, weights)} but for tables that the module does without: all, or none."""
        others = {other: "a probe, which load_probe reads" for other in found.networks if other not in parts}
        ignored, kept = {**found.ignored, **others}, {}
        for network, (module, own) in parts.items():
            tables = [table for table in checkpoints.TABLES if table in own and table not in module.state_dict()]
            ignored |= {f"{network}.{table}": "rotary positions take its place" for table in tables}
            kept[network] = module, {key: value for key, value in own.items() if key not in tables}
        checkpoints.load(cls.__name__, kept, lambda problems: cls._remedy(found, problems))
        named = {network: f"{network}." for network in parts} if len(parts) > 1 else {}
        if "encoder" in named:
            named["encoder"] = "context_encoder."
        loaded = tuple(named.get(network, "") + key for network, (_, own) in kept.items() for key in own)
        return LoadReport(cls.__name__, found.layout.title, loaded, ignored, missing)

    @classmethod
    def _remedy(cls, found: Checkpoint, problems: list[str]) -> str:
        """What to do about weights that do not fit: name what they seem to be of."""
        size = size_of(found.networks)
        if "num_mask_tokens" in size and all("predictor.mask_tokens." in line for line in problems):
            return f"build the model with num_mask_tokens={size['num_mask_tokens']}, as many as it holds"
        if all("another grid" in line for line in problems):
            return "build the model with the crop_size, and num_frames, that they are of"
        if "embed_dim" not in size:
            return f"it seems to be of another model than {cls.published_name}"
        return f"its size seems to be {describe(cls.sizes, size)}"

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.ema.refresh()
        return self

    def _masks(self, batch: Tensor, masks: AnyMasks) -> Masks:
        """The masks of this batch, on a device."""
        if isinstance(masks, tuple) and [isinstance(ids, Tensor) for ids in masks] == [True, True]:
            return self._rectangular(batch.shape[0], *masks)
        if isinstance(masks, MaskBatch):
            fail(type(self).__name__, "masks", "be on the device", "a MaskBatch", "pass masks.to(device)", TypeError)
        if not isinstance(masks, Masks):
            found = ", ".join(type(ids).__name__ for ids in masks) if isinstance(masks, tuple) else type(masks).__name__
            requirement, remedy = (
                "be Masks or two tensors (context, target)",
                "pack lists of many lengths in a MaskBatch",
            )
            fail(type(self).__name__, "masks", requirement, found, remedy, TypeError)
        if masks.batch != batch.shape[0]:
            requirement = f"belong to {batch.shape[0]} {self.inputs}"
            fail(type(self).__name__, "masks", requirement, masks.batch, "sample that many")
        return masks

    def _rectangular(self, batch: int, context_ids: Tensor, target_ids: Tensor) -> Masks:
        raise NotImplementedError


def _after_load(model: JEPA, _: Any) -> None:
    model.ema.refresh()


def loss_of(model: nn.Module, batch: Tensor, given: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """The loss of a model, or of its wrapper, whose own forward runs; arguments as of `train_step`."""
    own: Any = getattr(model, "module", model)
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype is not None):
        return own.objective(model(batch, given, **options), batch, given)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    given: Any,
    momentum: float | Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> Tensor:
    """One step: loss, backward, optimiser, moving average if there is one. Returns the loss, without a device sync.

    model: a JEPA, another model with `forward` and `objective` (LeWorldModel), or a wrapper that keeps one in `.module`
        (DDP).
    given: what is predicted from besides the batch: masks, or actions.
    optimizer: one without targets; or an `AdamWEMA` with those of model.ema (`ema.pairs()`), which moves them itself.
    momentum: in [0, 1], of the target encoder's moving average, which is updated after the optimiser; None for a model
        without one.
    dtype: run the networks under autocast to it; None: in the parameters' dtype.
    scaler: for float16; the moving average is updated even where it skips the optimiser, as published.
    options: of the model's forward, such as V-JEPA 2's mask_index.
    """
    own: Any = getattr(model, "module", model)
    ema: EMA | None = getattr(own, "ema", None)
    if (ema is None) != (momentum is None):
        wanted = "be None without a target encoder" if ema is None else "be given for the target encoder"
        fail("train_step", "momentum", wanted, momentum, "only a moving average has one")
    loss = loss_of(model, batch, given, dtype=dtype, **options)
    moves_targets = isinstance(optimizer, jk.AdamWEMA) and bool(optimizer.targets)
    (loss if scaler is None else scaler.scale(loss)).backward()
    with own.ema.moved_by(optimizer, momentum) if moves_targets else nullcontext():
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if ema is not None and momentum is not None and not moves_targets:
        ema.apply_update_(own.context_encoder, momentum)
    return loss.detach()
