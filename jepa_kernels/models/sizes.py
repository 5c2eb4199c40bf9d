"""What the shapes of a checkpoint tell: which model it is of, of which size, and the config that fits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from math import isqrt
from typing import Any

from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.models.layouts import ENCODERS

# Fields of configs that change what weights compute, and that no weight tells.
UNTOLD = {"num_heads", "predictor_num_heads", "rope", "interpolate_rope", "predictor_interpolate_rope", "frame_causal"}
UNTOLD |= {"rope_grid", "use_extrinsics", "normalize", "mean", "std"}
HEAD_DIM = 64  # of every published encoder and predictor of LeWorldModel: shapes do not tell the heads
Networks = Mapping[str, Mapping[str, Any]]
Sizes = Mapping[str, Callable[..., Any]]


def model_of(networks: Networks) -> str | None:
    """The published model that names and shapes of an encoder, and of a predictor if there is one, are those of.

    Encoders of V-JEPA and V-JEPA 2 have the same, but for a table of positions, of which files of the latter may hold
    one that is not used: what it holds tells them apart, in the predictor if there is one.
    """
    encoder, predictor = _encoder(networks), networks.get("predictor", {})
    weight = shape_of(encoder, "patch_embed.proj.weight")
    if len(weight) == 4:
        return "I-JEPA"
    if len(weight) != 5:
        return None
    if any(name.startswith("norms_block.") for network in ENCODERS for name in networks.get(network, ())):
        return "V-JEPA 2.1"
    if "action_encoder.weight" in predictor:
        return "V-JEPA 2-AC"
    table = predictor.get("predictor_pos_embed") if predictor else encoder.get("pos_embed")
    if _holds_places(table) and count(predictor, "mask_tokens.") != 10:  # 10: of V-JEPA 2's files, table or not
        return "V-JEPA"
    return "V-JEPA 2" if predictor else None


def size_of(networks: Networks) -> dict[str, Any]:
    """{field of a config: its value} as far as shapes tell; `hidden` is the width of the encoder's MLP."""
    encoder, predictor = _encoder(networks), networks.get("predictor", {})
    weight, own = shape_of(encoder, "patch_embed.proj.weight"), shape_of(predictor, "predictor_norm.weight")
    found: dict[str, Any] = {"depth": count(encoder, "blocks.")}
    read = shape_of(predictor, "predictor_embed.weight")
    if not encoder and len(read) == 2 and "action_encoder.weight" in predictor:
        found = {"embed_dim": read[1]}  # of the encoder that it was trained with, which is elsewhere
    if len(weight) in (4, 5) and min(weight) > 0:
        found |= {"embed_dim": weight[0], "in_chans": weight[1], "patch_size": weight[-1]}
        found |= {"tubelet_size": weight[2]} if len(weight) == 5 else {}
        found |= _options(weight[0], encoder, predictor) if count(encoder, "norms_block.") else {}
    if hidden := shape_of(encoder, "blocks.0.mlp.fc1.weight"):
        found["hidden"] = hidden[0]
    if len(table := shape_of(encoder, "pos_embed")) == 3:
        found["patches"] = table[1]
    if own:
        found |= {"predictor_embed_dim": own[0], "predictor_depth": count(predictor, "predictor_blocks.")}
    if "action_encoder.weight" in predictor:
        found |= _steering(predictor)
    if tokens := count(predictor, "mask_tokens."):
        found["num_mask_tokens"] = tokens
    return found


def _options(width: int, encoder: Mapping[str, Any], predictor: Mapping[str, Any]) -> dict[str, Any]:
    """Those of V-JEPA 2.1; of the predictor where there is one."""
    found: dict[str, Any] = {
        "image_tokenizer": "patch_embed_img.proj.weight" in encoder,
        "modality_embedding": "img_mod_embed" in encoder,
    }
    if out := shape_of(predictor, "predictor_proj.bias"):
        several = shape_of(predictor, "predictor_embed.0.weight")
        levels = several[1] // width if len(several) == 2 else 1
        found |= {"levels": levels, "teacher_embed_dim": None if out[0] == levels * width else out[0]}
        found["predict_all"] = "predictor_proj_context.weight" in predictor
    return found


def _steering(predictor: Mapping[str, Any]) -> dict[str, Any]:
    """What an action-conditioned predictor is told, and how."""
    shapes = {of: shape_of(predictor, f"{of}_encoder.weight") for of in ("action", "state", "extrinsics")}
    found: dict[str, Any] = {f"{of}_dim": shape[1] if len(shape) == 2 else None for of, shape in shapes.items()}
    modulated = any(".adaLN_modulation." in name for name in predictor)
    return {**found, "conditioning": "adaln" if modulated else "tokens"}


def describe(sizes: Sizes, size: Mapping[str, Any]) -> str:
    """The name of a published size, or numbers."""
    named = [name for name in _alike(sizes, size) if size.get("patch_size") in (None, sizes[name]().patch_size)]
    told = ("embed_dim", "depth", "patch_size") if "depth" in size else ("embed_dim", "predictor_depth")
    numbers = ", ".join(f"{f} {size[f]}" for f in told if f in size)
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
    known = {field.name for field in fields(config)}
    if foreign := sorted(changes.keys() - known):
        fail(model, "changes", f"be fields of {type(config).__name__}", ", ".join(foreign), "leave them out", TypeError)
    other = size.get("predictor_embed_dim") not in (None, config.predictor_embed_dim)
    unknown = [] if alike else ["num_heads"]
    unknown += ["predictor_num_heads"] if other and hasattr(config, "predictor_num_heads") else []
    if unknown and not changes.keys() >= set(unknown):
        remedy = f"pass {' and '.join(unknown)}, which shapes do not tell"
        fail(model, "checkpoint", "be of a published size", describe(sizes, size), remedy)
    given: dict[str, Any] = {field: value for field, value in size.items() if field in known}
    if "hidden" in size and int(size["embed_dim"] * config.mlp_ratio) != size["hidden"]:
        given["mlp_ratio"] = (size["hidden"] + 0.5) / size["embed_dim"]  # the model rounds down
    if not hasattr(config, "rope"):  # with it the model has no table
        given |= _crop(replace(config, **{**given, **changes}), size)
    return replace(config, **{**given, **changes})


def check_config(model: str, own: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise ValueError for the config of a file whose weights would mean something else in this model."""
    if other := {f: v for f, v in theirs.items() if f in UNTOLD and v != own.get(f)}:
        wanted = ", ".join(f"{field}={own.get(field)!r}" for field in other)
        held = ", ".join(f"{field}={value!r}" for field, value in other.items())
        remedy = "build the model by from_checkpoint, or pass the file's tensors"
        fail(model, "checkpoint", f"be of {wanted}", held, remedy)


def _crop(config: Any, size: Mapping[str, Any]) -> dict[str, int]:
    """The sides of square pixels that a table of positions is of, where the config's are others."""
    if "patches" not in size:
        return {}
    frames = max(1, config.num_frames // config.tubelet_size) if hasattr(config, "num_frames") else 1
    side = isqrt(size["patches"] // frames)
    return {"crop_size": side * config.patch_size} if side * side * frames == size["patches"] else {}


def _alike(sizes: Sizes, size: Mapping[str, Any]) -> list[str]:
    """The published sizes of this width and depth, the predictor's where it is alone, those of its patches first."""
    known = {name: make() for name, make in sizes.items()}
    told = ("embed_dim", "depth" if "depth" in size else "predictor_depth")
    alike = [n for n, c in known.items() if all(getattr(c, f) == size.get(f) for f in told)]
    return sorted(alike, key=lambda name: known[name].patch_size != size.get("patch_size"))


def _holds_places(table: Any) -> bool:
    """Whether [1, N, D] begins with sines and cosines of 0, the first place of every grid."""
    if not isinstance(table, Tensor) or table.dim() != 3 or not table.numel():
        return False
    if table.is_meta:  # no values: the name alone tells
        return True
    first = table[0, 0]
    return bool(((first == 0) | (first == 1)).all() and first.any())


def _encoder(networks: Networks) -> Mapping[str, Any]:
    return networks.get("target_encoder") or networks.get("encoder") or {}


def shape_of(state: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = state.get(name)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def count(state: Mapping[str, Any], begin: str) -> int:
    return len({name.removeprefix(begin).split(".")[0] for name in state if name.startswith(begin)})


def size_of_lewm(networks: Networks) -> dict[str, Any]:
    """{field of LeWMConfig: its value} as far as shapes tell; raises ValueError where they tell none."""
    encoder, predictor = (networks.get(name, {}) for name in ("encoder", "predictor"))
    layer = "transformer.layers.0."
    width, channels, _, patch = _lewm_shape(encoder, "patch_embed.proj.weight", 4)
    hidden, _ = _lewm_shape(encoder, "blocks.0.mlp.fc1.weight", 2)
    action_hidden, action_dim, _ = _lewm_shape(networks.get("action_encoder", {}), "patch_embed.weight", 3)
    inner, _ = _lewm_shape(predictor, f"{layer}attn.to_out.0.weight", 2)[::-1]
    return {
        "crop_size": isqrt(_lewm_shape(encoder, "pos_embed", 3)[1] - 1) * patch,
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": count(encoder, "blocks."),
        "num_heads": max(1, width // HEAD_DIM),
        "mlp_ratio": hidden / width if hidden % width == 0 else (hidden + 0.5) / width,  # the model rounds down
        "projector_hidden": _lewm_shape(networks.get("projector", {}), "net.0.weight", 2)[0],
        "action_dim": action_dim,
        "action_hidden": action_hidden,
        "history": _lewm_shape(predictor, "pos_embedding", 3)[1],
        "predictor_depth": count(predictor, "transformer.layers."),
        "predictor_num_heads": max(1, inner // HEAD_DIM),
        "predictor_head_dim": HEAD_DIM,
        "predictor_hidden": _lewm_shape(predictor, f"{layer}mlp.net.1.weight", 2)[0],
    }


def _lewm_shape(state: Any, name: str, rank: int) -> tuple[int, ...]:
    shape = shape_of(state, name)
    if len(shape) != rank or min(shape) < 1:
        remedy = "pass the published weights.pt, or this model's state_dict()"
        fail("LeWorldModel", "checkpoint", f"hold {name}", shape or "none", remedy)
    return shape
