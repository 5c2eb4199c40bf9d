"""What the shapes of a checkpoint tell: which model it is of, of which size, and the config that fits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from math import isqrt
from typing import Any

from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.models.layouts import ENCODERS

Networks = Mapping[str, Mapping[str, Any]]
Sizes = Mapping[str, Callable[..., Any]]


def model_of(networks: Networks) -> str | None:
    """The published model that names and shapes of an encoder, and of a predictor if there is one, are those of.

    Encoders of V-JEPA and V-JEPA 2 have the same, but for a table of positions that files of the latter may hold too:
    the predictor tells them apart, and without it none is named.
    """
    encoder, predictor = _encoder(networks), networks.get("predictor", {})
    weight = _shape(encoder, "patch_embed.proj.weight")
    if len(weight) == 4:
        return "I-JEPA"
    if len(weight) != 5:
        return None
    if any(name.startswith("norms_block.") for network in ENCODERS for name in networks.get(network, ())):
        return "V-JEPA 2.1"
    if "action_encoder.weight" in predictor:
        return "V-JEPA 2-AC"
    if not predictor:
        return None
    first = "predictor_pos_embed" in predictor and _count(predictor, "mask_tokens.") == 2
    return "V-JEPA" if first else "V-JEPA 2"


def size_of(networks: Networks) -> dict[str, int]:
    """{field of a config: its value} as far as shapes tell; `hidden` is the width of the encoder's MLP."""
    encoder, predictor = _encoder(networks), networks.get("predictor", {})
    weight, own = _shape(encoder, "patch_embed.proj.weight"), _shape(predictor, "predictor_norm.weight")
    found = {"depth": _count(encoder, "blocks.")}
    if len(weight) in (4, 5):
        found |= {"embed_dim": weight[0], "in_chans": weight[1], "patch_size": weight[-1]}
    if len(weight) == 5:
        found["tubelet_size"] = weight[2]
    if hidden := _shape(encoder, "blocks.0.mlp.fc1.weight"):
        found["hidden"] = hidden[0]
    if len(table := _shape(encoder, "pos_embed")) == 3:
        found["patches"] = table[1]
    if own:
        found |= {"predictor_embed_dim": own[0], "predictor_depth": _count(predictor, "predictor_blocks.")}
    if tokens := _count(predictor, "mask_tokens."):
        found["num_mask_tokens"] = tokens
    return found


def describe(sizes: Sizes, size: Mapping[str, int]) -> str:
    """The name of a published size, or numbers."""
    named = [name for name in _alike(sizes, size) if sizes[name]().patch_size == size["patch_size"]]
    numbers = ", ".join(f"{f} {size[f]}" for f in ("embed_dim", "depth", "patch_size") if f in size)
    patches = f" with {size['patches']} patches" if "patches" in size else ""
    return (named[0] if named else numbers) + patches


def config_for(model: str, sizes: Sizes, networks: Networks, changes: Mapping[str, Any]) -> Any:
    """The config of the networks in a checkpoint, with `changes`.

    Shapes do not tell the heads: they are those of the published size of the same widths and depth. Raises ValueError
    where there is none and `changes` does not give them.
    """
    size = size_of(networks)
    if "embed_dim" not in size:
        fail(model, "checkpoint", "hold an encoder", "no patch_embed.proj.weight", "pass a published file")
    alike = _alike(sizes, size)
    config = sizes[alike[0]]() if alike else next(iter(sizes.values()))()
    unknown = [] if alike else ["num_heads"]
    if hasattr(config, "predictor_num_heads") and size.get("predictor_embed_dim", config.predictor_embed_dim) != (
        config.predictor_embed_dim
    ):
        unknown.append("predictor_num_heads")
    if unknown and not changes.keys() >= set(unknown):
        remedy = f"pass {' and '.join(unknown)}, which shapes do not tell"
        fail(model, "checkpoint", "be of a published size", describe(sizes, size), remedy)
    given: dict[str, Any] = {field.name: size[field.name] for field in fields(config) if field.name in size}
    if int(size["embed_dim"] * config.mlp_ratio) != size.get("hidden"):
        given["mlp_ratio"] = (size["hidden"] + 0.5) / size["embed_dim"]  # the model rounds down
    given |= _crop(replace(config, **given), size)
    return replace(config, **{**given, **changes})


def _crop(config: Any, size: Mapping[str, int]) -> dict[str, int]:
    """The sides of square pixels that a table of positions is of, where the config's are others."""
    if "patches" not in size:
        return {}
    frames = config.num_frames // config.tubelet_size if hasattr(config, "num_frames") else 1
    side = isqrt(size["patches"] // frames)
    return {"crop_size": side * config.patch_size} if side * side * frames == size["patches"] else {}


def _alike(sizes: Sizes, size: Mapping[str, int]) -> list[str]:
    """The published sizes of this width and depth, those of its patches first."""
    known = {name: make() for name, make in sizes.items()}
    alike = [n for n, c in known.items() if (c.embed_dim, c.depth) == (size.get("embed_dim"), size["depth"])]
    return sorted(alike, key=lambda name: known[name].patch_size != size["patch_size"])


def _encoder(networks: Networks) -> Mapping[str, Any]:
    return networks.get("target_encoder") or networks.get("encoder") or {}


def _shape(state: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = state.get(name)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _count(state: Mapping[str, Any], begin: str) -> int:
    return len({name.removeprefix(begin).split(".")[0] for name in state if name.startswith(begin)})
