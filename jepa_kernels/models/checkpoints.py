"""Reading published checkpoints: their layout, their prefixes, and what is wrong with one that does not fit."""

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail

PREFIXES = ("module.", "backbone.", "_orig_mod.")


def read(model: str, source: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """A checkpoint given as a mapping, or as the path of a torch file (read with weights_only=True, on the CPU)."""
    if isinstance(source, Mapping):
        return source
    with open(source, "rb"):  # a missing or unreadable file raises its own OSError
        pass
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        why = str(error).strip().split("\n")[0][:200] or type(error).__name__
        text = f"{model}: {os.fspath(source)} must be a torch file of plain tensors, got: {why}; save it again"
        raise ValueError(text) from error
    if not isinstance(checkpoint, Mapping):
        fail(model, "checkpoint", "be a mapping of names", type(checkpoint).__name__, "pass a state dict", TypeError)
    return checkpoint


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries without the prefixes that DDP, published wrappers and torch.compile put before names."""

    def short(name: str) -> str:
        for prefix in PREFIXES:
            if name.startswith(prefix):
                return short(name.removeprefix(prefix))
        return name

    return {short(name): value for name, value in state.items()}


def problems(name: str, module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """What keeps `state` from being loaded into `module`, a line each; nothing is loaded."""
    own = module.state_dict()
    found = [f"{name}.{key} is missing" for key in own if key not in state]
    found += [f"{name}.{key} is unknown" for key in state if key not in own]
    for key, value in own.items():
        theirs = state.get(key, value)
        if not isinstance(theirs, Tensor):
            found.append(f"{name}.{key} is a {type(theirs).__name__}")
        elif theirs.shape != value.shape:
            found.append(f"{name}.{key} has shape {tuple(theirs.shape)}, the model {tuple(value.shape)}")
        elif not theirs.isfinite().all():
            found.append(f"{name}.{key} holds values that are not finite")
    return found


def load(model: str, parts: Mapping[str, tuple[nn.Module, Mapping[str, Any]]], remedy: str) -> None:
    """Load every part {name: (module, state)}, or raise ValueError and load none."""
    found = [line for name, (module, state) in parts.items() for line in problems(name, module, state)]
    if found:
        shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        fail(model, "checkpoint", "hold exactly the weights of this config", shown, remedy)
    for module, state in parts.values():
        module.load_state_dict(state)
