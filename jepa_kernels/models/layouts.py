"""How published files name the tensors of a model: Meta's names, which are ours, Hugging Face's and timm's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from jepa_kernels._core.check import fail

WRAPPERS = {"module", "backbone", "_orig_mod", "vjepa2", "ijepa"}  # of DDP, Meta, torch.compile, Hugging Face's heads
ENCODERS = ("encoder", "target_encoder")
NETWORKS = (*ENCODERS, "ema_encoder", "predictor", "classifier")
BESIDE = {"action_encoder": "action_encoder", "proprio_encoder": "state_encoder"}  # JEPA-WMs', and in our predictor
FUSED = {".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."), ".xattn.kv.": (".xattn.k.", ".xattn.v.")}
TOKENS = "predictor.mask_tokens"
Pairs = tuple[tuple[str, str], ...]  # a piece of their name, and of ours


@dataclass(frozen=True)
class Layout:
    """Other names of the same tensors.

    mark: the beginnings of names by which a file of this layout is known.
    begins: how a name begins; ours says the network. The first that fits.
    inside: what follows it, within blocks; the first that fits.
    rest: where no beginning fits.
    """

    title: str
    mark: tuple[str, ...]
    begins: Pairs
    inside: Pairs = ()
    rest: Layout | None = None

    def to_meta(self, name: str) -> str:
        """Our name for theirs. Any other keeps its own, in the encoder, which may know it."""
        found = _renamed(name, self.begins, self.inside)
        return found or (self.rest.to_meta(name) if self.rest else f"encoder.{name}")

    def from_meta(self, name: str) -> str | None:
        """Their name for ours; None where they have no place for it."""
        found = _renamed(name, _swapped(self.begins), _swapped(self.inside))
        return found or (self.rest.from_meta(name) if self.rest else None)


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors in Meta's names.

    networks: {encoder, target_encoder, predictor or classifier (a probe): {name: tensor}}, those that it holds.
    ignored: {name in the file: why it is in no network}.
    """

    layout: Layout
    networks: dict[str, dict[str, Any]]
    ignored: dict[str, str]


def _swapped(pairs: Pairs) -> Pairs:
    return tuple((ours, theirs) for theirs, ours in pairs)


def _renamed(name: str, begins: Pairs, inside: Pairs) -> str | None:
    for old, new in begins:
        if name.startswith(old):
            rest = name.removeprefix(old)
            piece = next(((a, b) for a, b in inside if a in rest), ("", ""))
            return new + rest.replace(*piece, 1)
    return None


META = Layout("Meta's layout", tuple(f"{name}." for name in NETWORKS[:-1]), tuple((f"{n}.",) * 2 for n in NETWORKS))
JEPA_WM = Layout(  # an action or a pose is encoded beside the predictor, by a layer or a convolution, or in it
    "JEPA-WMs' layout",
    mark=(),
    begins=(
        *((f"{where}{theirs}.{of}", f"predictor.{ours}.")
          for theirs, ours in BESIDE.items() for where in ("", "predictor.") for of in ("patch_embed.", "")),
        *META.begins,
    ),
)  # fmt: skip
OWN = Layout(
    "its own state dict",
    mark=("context_encoder.",),
    begins=(("context_encoder.", "encoder."), ("target_encoder.",) * 2, ("predictor.",) * 2),
)
VJEPA2_PROBE = Layout(
    "Hugging Face's VJEPA2 layout",
    mark=(),
    begins=(
        ("pooler.query_tokens", "classifier.pooler.query_tokens"),
        ("pooler.self_attention_layers.", "classifier.pooler.blocks."),
        ("pooler.cross_attention_layer.", "classifier.pooler.cross_attention_block."),
        ("classifier.", "classifier.linear."),
    ),
    inside=(
        (".self_attn.q_proj.", ".attn.q."),
        (".self_attn.k_proj.", ".attn.k."),
        (".self_attn.v_proj.", ".attn.v."),
        (".self_attn.out_proj.", ".attn.proj."),
        ("cross_attn.q_proj.", "xattn.q."),
        ("cross_attn.k_proj.", "xattn.k."),
        ("cross_attn.v_proj.", "xattn.v."),
        ("layer_norm1.", "norm1."),
        ("layer_norm2.", "norm2."),
    ),
)
VJEPA2 = Layout(
    "Hugging Face's VJEPA2 layout",
    mark=("encoder.layer.",),
    begins=(
        ("encoder.embeddings.patch_embeddings.", "encoder.patch_embed."),
        ("encoder.layer.", "encoder.blocks."),
        ("encoder.layernorm.", "encoder.norm."),
        ("predictor.embeddings.predictor_embeddings.", "predictor.predictor_embed."),
        ("predictor.embeddings.mask_tokens", TOKENS),
        ("predictor.layer.", "predictor.predictor_blocks."),
        ("predictor.layernorm.", "predictor.predictor_norm."),
        ("predictor.proj.", "predictor.predictor_proj."),
    ),
    inside=(
        (".attention.query.", ".attn.q."),
        (".attention.key.", ".attn.k."),
        (".attention.value.", ".attn.v."),
        (".attention.proj.", ".attn.proj."),
    ),
    rest=VJEPA2_PROBE,
)
IJEPA = Layout(
    "Hugging Face's IJepa layout",
    mark=("layers.0.attention.",),
    begins=(
        ("embeddings.position_embeddings", "encoder.pos_embed"),
        ("embeddings.patch_embeddings.projection.", "encoder.patch_embed.proj."),
        ("layers.", "encoder.blocks."),
        ("layernorm.", "encoder.norm."),
        ("classifier.", "classifier.linear."),
    ),
    inside=(
        (".attention.q_proj.", ".attn.q."),
        (".attention.k_proj.", ".attn.k."),
        (".attention.v_proj.", ".attn.v."),
        (".attention.o_proj.", ".attn.proj."),
        ("layernorm_before.", "norm1."),
        ("layernorm_after.", "norm2."),
    ),
)
IJEPA_OLD = Layout(  # of transformers before 5
    "Hugging Face's earlier IJepa layout",
    mark=("encoder.layer.0.attention.attention.",),
    begins=(*IJEPA.begins, ("encoder.layer.", "encoder.blocks.")),
    inside=(
        (".attention.attention.query.", ".attn.q."),
        (".attention.attention.key.", ".attn.k."),
        (".attention.attention.value.", ".attn.v."),
        (".attention.output.dense.", ".attn.proj."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
        *IJEPA.inside[-2:],
    ),
)
LEWM = Layout(  # its encoder as either transformers names a ViT, or as ours
    "LeWorldModel's layout",
    mark=("pred_proj.",),
    begins=(
        ("encoder.embeddings.cls_token", "encoder.cls_token"),
        ("encoder.embeddings.position_embeddings", "encoder.pos_embed"),
        ("encoder.embeddings.patch_embeddings.projection.", "encoder.patch_embed.proj."),
        ("encoder.encoder.layer.", "encoder.blocks."),
        ("encoder.layers.", "encoder.blocks."),
        ("encoder.layernorm.", "encoder.norm."),
        *(
            (f"{name}.",) * 2
            for name in ("encoder", "projector", "action_encoder", "predictor", "pred_proj", "sigreg", "inverse")
        ),
    ),
    inside=(*IJEPA_OLD.inside, *IJEPA.inside[:4]),
)
TIMM_POOLED = Layout(
    "timm's layout, its norm after pooling (fc_norm) as that of every patch",
    mark=("fc_norm.",),
    begins=(("fc_norm.", "encoder.norm."), ("head.", "classifier.linear.")),
)
BARE = Layout("the layout of timm, or of one encoder", mark=("blocks.",), begins=TIMM_POOLED.begins[1:])
PROBE = Layout("the layout of one probe", mark=("pooler.",), begins=(("", "classifier."),))
LAYOUTS = (OWN, LEWM, IJEPA_OLD, VJEPA2, META, IJEPA, TIMM_POOLED, BARE, PROBE)


def recognise(model: str, state: Mapping[Any, Any], *, probe: int = 0) -> Checkpoint:
    """The tensors of a file in any published layout, by network, in Meta's names.

    Names lose the parts that wrappers put into them; queries, keys and values apart are stacked, mask tokens in one
    tensor are listed. What does not fit that is left as it is, for the model to refuse. probe: which of several.
    Raises ValueError for a layout that is not known, and for two tensors of one name.
    """
    state, ignored = _one_probe(model, state, probe)
    nested = {name: own for name in (*NETWORKS, *BESIDE) if isinstance(own := state.get(name), Mapping)}
    if nested:
        layout = JEPA_WM if "predictor" in nested and BESIDE.keys() & state.keys() else META
        ignored |= {str(n): "no weights of a network" for n in state if n not in nested}
        state = {f"{network}.{name}": value for network, own in nested.items() for name, value in own.items()}
    flat = _rename(model, state, bare)
    if not nested:
        known = (layout for layout in LAYOUTS if any(name.startswith(layout.mark) for name in flat))
        layout = next(known, None) or _unknown(model, flat)
    networks: dict[str, dict[str, Any]] = {}
    for name, value in _listed(_fused(_pointwise(_rename(model, flat, layout.to_meta)))).items():
        network, own = name.split(".", 1)
        networks.setdefault(network, {})[own] = value
    if "ema_encoder" in networks:
        if networks.pop("target_encoder", None) is not None:
            ignored["target_encoder"] = "ema_encoder takes its place"
        networks["target_encoder"] = networks.pop("ema_encoder")
    return Checkpoint(layout, networks, ignored)


def _one_probe(model: str, state: Mapping[Any, Any], probe: int) -> tuple[Mapping[Any, Any], dict[str, str]]:
    """V-JEPA 2's files of probes hold a list, `classifiers`, of one for each setting: the one as `classifier`."""
    probes = state.get("classifiers")
    count = len(probes) if isinstance(probes, list) else 1
    if not 0 <= probe < max(count, 1):
        fail(model, "index", f"lie in [0, {count})", probe, "leave it out for the first probe of the file")
    if not isinstance(probes, list) or not probes:
        return state, {}
    rest = {name: value for name, value in state.items() if name != "classifiers"}
    others = {f"classifiers[{i}]": "another probe" for i in range(len(probes)) if i != probe}
    return {**rest, "classifier": probes[probe]}, others


def bare(name: Any) -> str:
    """The name without the parts that wrappers of modules put into it."""
    return ".".join(part for part in str(name).split(".") if part not in WRAPPERS)


def to_huggingface(model: str, layout: Layout, networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights by network, in Meta's names, in Hugging Face's, but for networks that its class has not.

    Raises ValueError where it has no place for a weight of those that it has.
    """
    held = {network for network in networks if any(ours.startswith(f"{network}.") for _, ours in layout.begins)}
    flat = {f"{network}.{name}": value for network in held for name, value in networks[network].items()}
    tokens = [flat.pop(name) for name in sorted(flat, key=_place) if name.startswith(f"{TOKENS}.")]
    if tokens:
        flat[TOKENS] = torch.stack(tokens)
    found = {}
    for name, value in _split(flat).items():
        theirs = layout.from_meta(name)
        if theirs is None:
            fail(model, "layout", "have a place for every weight", f"{layout.title} for {name}", "save in Meta's")
        found[theirs] = value
    return found


def _place(name: str) -> int:
    last = name.rsplit(".", 1)[-1]
    return int(last) if last.isdecimal() else -1


def _rename(model: str, state: Mapping[Any, Any], rename: Callable[[Any], str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in state.items():
        new = rename(name)
        if new in found:
            fail(model, "checkpoint", "hold each tensor once", f"{new} twice", "drop one of the two")
        found[new] = value
    return found


def _unknown(model: str, state: Mapping[str, Any]) -> NoReturn:
    found = ", ".join(sorted(state)[:8]) or "nothing"
    remedy = "pass a file of Meta, Hugging Face or timm, or this model's state_dict()"
    fail(model, "checkpoint", "be of a published layout", found, remedy)


def _fused(state: dict[str, Any]) -> dict[str, Any]:
    """The same with queries, keys and values of each block stacked, where they are tensors that can be."""
    found = dict(state)
    for whole, parts in FUSED.items():
        for first in [name for name in state if parts[0] in name]:
            names = [first.replace(parts[0], part) for part in parts]
            values: list[Any] = [state.get(name) for name in names]
            if all(map(_dense, values)) and len({(v.shape, v.dtype, v.device) for v in values}) == 1:
                stacked = torch.cat([found.pop(name) for name in names])
                found[first.replace(parts[0], whole)] = stacked
    return found


def _split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_fused`, by views."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        whole = next((whole for whole in FUSED if whole in name), None)
        if whole is None:
            found[name] = value
        else:
            thirds = zip(FUSED[whole], value.chunk(len(FUSED[whole])), strict=True)
            found |= {name.replace(whole, part): third for part, third in thirds}
    return found


def _listed(state: dict[str, Any]) -> dict[str, Any]:
    """The same with mask tokens [n, 1, 1, D] as n tensors."""
    tokens: Any = state.get(TOKENS)
    if not (_dense(tokens) and tokens.dim() == 4):
        return state
    listed = {f"{TOKENS}.{i}": token for i, token in enumerate(tokens)}
    return {name: value for name, value in state.items() if name != TOKENS} | listed


def _pointwise(state: dict[str, Any]) -> dict[str, Any]:
    """The same with convolutions over single steps, [D, A, 1], as the matrices that they are."""
    found = dict(state)
    for name in (f"predictor.{ours}.weight" for ours in BESIDE.values()):
        weight: Any = state.get(name)
        if _dense(weight) and weight.dim() == 3 and weight.shape[-1] == 1:
            found[name] = weight[..., 0]
    return found


def _dense(value: Any) -> bool:
    """A tensor whose rows can be taken and stacked."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided and value.dim() > 0
