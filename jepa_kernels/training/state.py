"""What a checkpoint of a training run holds: tensors by public names, and what must be true of one to be continued."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from jepa_kernels._core.check import fail
from jepa_kernels._core.select import short
from jepa_kernels.models.checkpoints import brief

FORMAT = "jepa_kernels.train/2"
ABOUT = "state.json"  # beside the tensors: all that is no tensor
PARTS = "format", "config", "step", "world", "versions", "scores", "files"
REMEDY = "pass the --out of a whole run"


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"model.NAME": its state dict's, "optimizer.NAME.exp_avg": that parameter's moment}: no copies; DTensors stay."""
    found = {f"model.{name}": x for name, x in model.state_dict().items()}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for p, entries in optimizer.state.items():
        found |= {f"optimizer.{names[p]}.{key}": x for key, x in entries.items()}
    return found


def generators(rank: int, device: torch.device) -> dict[str, Tensor]:
    """{"rng.RANK.cpu": the state of this rank's generator}, and "rng.RANK.cuda" of one that trains on a GPU."""
    found = {f"rng.{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return found


def about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; ValueError for one of another format, or that lacks a part."""
    found = json.loads((path / ABOUT).read_bytes())
    held = found if isinstance(found, dict) else {}
    if held.get("format") != FORMAT:
        actual = held.get("format") or ", ".join(sorted(held)[:5]) or "nothing"
        fail("train", f"checkpoint {path}", f"be of format {FORMAT}", actual, "pass the --out of a training run")
    missing = [name for name in PARTS if name not in held]
    if missing:
        fail("train", f"checkpoint {path}", f"hold {', '.join(missing)}", "a part", REMEDY)
    if type(held["step"]) is not int or held["step"] < 0:
        fail("train", f"checkpoint {path}", "hold a state of this run", f"step is {held['step']!r}", REMEDY)
    return held


def read(path: Path, own: Mapping[str, Tensor], kinds: tuple[str, ...] = ("model", "optimizer")) -> dict[str, Tensor]:
    """A checkpoint's values for the tensors `own`, in memory of their own, cut as `own` is: no rank waits for another.

    kinds: of names that the checkpoint and `own` must have alike. Generators are left out where it lacks one of these.
    The file that says where each tensor lies is torch.distributed.checkpoint's, a pickle: whoever wrote the folder is
    trusted. Raises ValueError for what does not fit.
    """
    held = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    drawn = [name for name in own if name.startswith("rng.")]
    left = () if all(name in held for name in drawn) else drawn
    wanted = {name: x for name, x in own.items() if name not in left}
    _refuse(path, _misfits(wanted, held, kinds))
    values = {name: _empty(x) for name, x in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads: so it shall
        try:
            dcp.load(values, checkpoint_id=path, no_dist=True)
        except CheckpointException as error:  # no Exception, and without a word of its cause
            cause, _ = next(iter(error.failures.values()))
            _refuse(path, [f"{type(cause).__name__}: {cause}"])
    _refuse(path, [why for name, x in values.items() if (why := _spoiled(name, x))])
    return values


def put(values: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write what `read` gave into model and optimizer; a load_state_dict renews the rounded copies of targets."""
    model.load_state_dict({n.removeprefix("model."): x for n, x in values.items() if n.startswith("model.")})
    own = {} if optimizer is None else tensors(model, optimizer)
    with torch.no_grad():
        for name, x in own.items():
            if name.startswith("optimizer."):
                x.copy_(values[name])


def put_generators(values: Mapping[str, Tensor], rank: int, device: torch.device, *, seed: int, step: int) -> None:
    """Set this rank's generators, or, where the checkpoint has none for it, seed them by (seed, rank, step)."""
    if f"rng.{rank}.cpu" not in values:
        torch.manual_seed(int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0]))
        return
    torch.set_rng_state(values[f"rng.{rank}.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(values[f"rng.{rank}.cuda"], device)


def _refuse(path: Path, found: list[str]) -> None:
    if found:
        fail("train", f"checkpoint {path}", "hold a state of this run", brief(found), REMEDY)


def _misfits(own: Mapping[str, Tensor], held: Mapping[str, Any], kinds: tuple[str, ...]) -> list[str]:
    """Names and shapes that differ, a line each, before anything is read."""
    found = [f"{name} is missing" for name in own if name not in held]
    found += [f"{name} is unknown" for name in held if name.split(".")[0] in kinds and name not in own]
    return found + [why for name, x in own.items() if name in held and (why := _misfit(name, x, held[name]))]


def _misfit(name: str, own: Tensor, held: Any) -> str:
    if not isinstance(held, TensorStorageMetadata):
        return f"{name} is no tensor"
    if held.size != own.shape:
        return f"{name} has shape {tuple(held.size)}, the run's {tuple(own.shape)}"
    dtype = held.properties.dtype
    return "" if dtype == own.dtype else f"{name} is of dtype {short(dtype)}, the run's {short(own.dtype)}"


def _empty(own: Tensor) -> Tensor:
    """Whole tensors are read to the CPU: a GPU that the run fills has no room for two."""
    return torch.empty_like(own) if hasattr(own, "to_local") else torch.empty_like(own, device="cpu")


def _spoiled(name: str, value: Any) -> str:
    local = value.to_local() if hasattr(value, "to_local") else value
    if local.is_floating_point() and not local.isfinite().all():
        return f"{name} holds values that are not finite"
    if name.startswith("rng.") and name.endswith(".cpu"):
        try:
            torch.Generator().set_state(local)
        except RuntimeError:
            return f"{name} is no state of a generator"
    return ""
