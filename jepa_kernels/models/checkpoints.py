"""Reading published checkpoints: their layout, their prefixes, and what is wrong with one that does not fit."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels._core.select import FLOATS, short

PREFIXES = ("module.", "backbone.", "_orig_mod.")


def read(model: str, source: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """A checkpoint given as a mapping, or as the path of a file, whose tensors are read to the CPU.

    A torch file is read with weights_only=True; a name that ends in .safetensors tells the other format.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        found = type(source).__name__
        fail(model, "checkpoint", "be a mapping of names or a path", found, "pass a state dict", TypeError)
    with open(source, "rb"):  # a missing or unreadable file raises its own OSError
        pass
    kind = "safetensors" if os.fspath(source).endswith(".safetensors") else "torch"
    try:
        if kind == "safetensors":
            return load_file(source)
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader meets foreign bytes with errors of nearly every type
        why = str(error).strip().split("\n")[0][:200] or type(error).__name__
        text = f"{model}: {os.fspath(source)} must be a {kind} file of plain tensors, got: {why}; save it again"
        raise ValueError(text) from error
    if not isinstance(checkpoint, Mapping):
        fail(model, "checkpoint", "be a mapping of names", type(checkpoint).__name__, "pass a state dict", TypeError)
    return checkpoint


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries without the prefixes that DDP, published wrappers and torch.compile put before names."""

    def bare(name: str) -> str:
        for prefix in PREFIXES:
            if name.startswith(prefix):
                return bare(name.removeprefix(prefix))
        return name

    return {bare(name) if isinstance(name, str) else name: value for name, value in state.items()}


# Of Hugging Face's VJEPA2: the beginning of a name in either network, and the published one.
HUGGINGFACE = {
    "encoder.embeddings.patch_embeddings.": "patch_embed.",
    "encoder.layer.": "blocks.",
    "encoder.layernorm.": "norm.",
    "predictor.embeddings.predictor_embeddings.": "predictor_embed.",
    "predictor.embeddings.mask_tokens": "mask_tokens",
    "predictor.layer.": "predictor_blocks.",
    "predictor.layernorm.": "predictor_norm.",
    "predictor.proj.": "predictor_proj.",
}


def from_huggingface(state: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's VJEPA2 in the published layout, its one encoder in place of both. Other names stay, unknown."""
    parts: dict[str, dict[str, Any]] = {"encoder": {}, "predictor": {}}
    for name, value in state.items():
        begin = next((begin for begin in HUGGINGFACE if isinstance(name, str) and name.startswith(begin)), None)
        if begin is None:
            parts["encoder"][name] = value
        else:
            own = HUGGINGFACE[begin] + name.removeprefix(begin).replace("attention.", "attn.", 1)
            parts[begin.split(".")[0]][own] = value
    parts = {part: _fused(values) for part, values in parts.items()}
    tokens: Any = parts["predictor"].get("mask_tokens")
    if _dense(tokens) and tokens.dim() == 4:
        del parts["predictor"]["mask_tokens"]
        parts["predictor"] |= {f"mask_tokens.{i}": token for i, token in enumerate(tokens)}
    return {**parts, "target_encoder": parts["encoder"]}


def _fused(state: dict[str, Any]) -> dict[str, Any]:
    """The same with queries, keys and values of each block stacked, where they are tensors that can be."""
    found = dict(state)
    for query in [name for name in state if isinstance(name, str) and ".attn.query." in name]:
        names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        values: list[Any] = [state.get(name) for name in names]
        if all(map(_dense, values)) and len({(v.shape, v.dtype, v.device) for v in values}) == 1:
            stacked = torch.cat([found.pop(name) for name in names])
            found[query.replace(".query.", ".qkv.")] = stacked
    return found


def _dense(value: Any) -> bool:
    """A tensor whose rows can be taken and stacked."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided and value.dim() > 0


def size_of(encoder: Mapping[str, Any], *, patch_dims: int) -> tuple[int, int, int] | None:
    """(embed_dim, depth, patch_size) of the weights of an encoder of images (2) or videos (3); None if of neither."""
    weight = encoder.get("patch_embed.proj.weight")
    if not (isinstance(weight, Tensor) and weight.dim() == 2 + patch_dims):
        return None
    depth = len({name.split(".")[1] for name in map(str, encoder) if name.startswith("blocks.")})
    return weight.shape[0], depth, weight.shape[-1]


def problems(name: str, own: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    """What keeps `state` from taking the place of the tensors `own`, a line each."""
    found = [f"{name}.{key} is missing" for key in own if key not in state]
    found += [f"{name}.{key} is unknown" for key in state if key not in own]
    wrong = {key: _problem(value, state[key]) for key, value in own.items() if key in state}
    return found + [f"{name}.{key} {why}" for key, why in wrong.items() if why]


def _problem(own: Tensor, theirs: Any) -> str:
    if not isinstance(theirs, Tensor):
        return f"is a {type(theirs).__name__}"
    if theirs.is_nested or theirs.layout is not torch.strided:
        return "is no dense tensor"
    if theirs.shape != own.shape:
        return f"has shape {tuple(theirs.shape)}, the model {tuple(own.shape)}"
    if theirs.dtype not in (*FLOATS, torch.float64):
        return f"is of dtype {short(theirs.dtype)}"
    if theirs.is_meta:
        return "is on the meta device"
    return "" if theirs.to(own.dtype).isfinite().all() else "holds values that are not finite"


def load(model: str, parts: Mapping[str, tuple[nn.Module, Mapping[str, Any]]], remedy: Callable[[], str]) -> None:
    """Load every part {name: (module, state)}, or raise ValueError and load none."""
    found = [line for name, (module, state) in parts.items() for line in problems(name, module.state_dict(), state)]
    if found:
        fail(model, "checkpoint", "hold exactly the weights of this config", brief(found), remedy())
    for module, state in parts.values():
        module.load_state_dict(state)


def brief(found: list[str]) -> str:
    """The first three of many lines, on one."""
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
