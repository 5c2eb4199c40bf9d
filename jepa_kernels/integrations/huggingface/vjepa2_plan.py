"""Which modules of one VJEPA2 can be replaced, by what, and what its verification computes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels._core.select import FLOATS
from jepa_kernels.integrations.huggingface import vjepa2
from jepa_kernels.integrations.huggingface.implementations import against_attention
from jepa_kernels.integrations.layers import EMBEDS, against_product, linear_layers
from jepa_kernels.integrations.patching import Replacement, Run, is_patched, kind_of, own_forward, seeded_input

ROPE, CONTEXT = "one table of cosines for all layers", "patches outside context_mask are dropped first"
PARTS = {
    "VJEPA2Encoder": Replacement(vjepa2.encoder, ROPE, ("pixel_values_videos", "kwargs")),
    "VJEPA2PatchEmbeddings3D": Replacement(vjepa2.patch_embeddings, EMBEDS, ("pixel_values_videos",)),
    "VJEPA2RopeAttention": Replacement(
        vjepa2.attention, "rotary positions inside masked_attention", ("hidden_states", "position_mask")
    ),
    "VJEPA2Predictor": Replacement(
        vjepa2.predictor,
        f"tokens are not sorted, {ROPE}",
        ("encoder_hidden_states", "context_mask", "target_mask", "kwargs"),
    ),
    "VJEPA2Layer": Replacement(
        vjepa2.last_layer, "rows of the target alone", ("hidden_states", "position_mask", "kwargs")
    ),
    "VJEPA2PredictorEmbeddings": Replacement(
        vjepa2.predictor_embeddings,
        "mask tokens without waiting for the device",
        ("hidden_states", "context_mask", "target_mask", "mask_index"),
    ),
    "VJEPA2PoolerSelfAttention": Replacement(
        vjepa2.pooler_self_attention, "masked_attention", ("hidden_states", "attention_mask")
    ),
    "VJEPA2PoolerCrossAttention": Replacement(
        vjepa2.pooler_cross_attention, "masked_attention", ("queries", "keys", "values", "attention_mask")
    ),
}
ATTENTION = ("VJEPA2RopeAttention", "VJEPA2PoolerSelfAttention", "VJEPA2PoolerCrossAttention")
MASKED = {
    "VJEPA2Model": Replacement(
        vjepa2.masked_model,
        CONTEXT,
        ("pixel_values_videos", "context_mask", "target_mask", "skip_predictor", "kwargs"),
    ),
    "VJEPA2Embeddings": Replacement(vjepa2.embeddings, CONTEXT, ("pixel_values_videos",)),
}
# V-JEPA 2.1, in versions of transformers to come: what tells it in a config, and the value that means V-JEPA 2.
SWITCHES: dict[str, Any] = {
    "use_rope_interleave": False,
    "interpolate_rope": False,
    "use_modality_embeddings": False,
    "use_context_projection": False,
    "use_image_patch_embedder": False,
    "hierarchical_layers": None,
    "teacher_embed_dim": None,
    "num_distillation_outputs": 1,
}


def plan(
    model: nn.Module, *, masked_encoder: bool, angle_dtype: torch.dtype | None
) -> tuple[dict[str, Replacement], dict[str, str], Run]:
    """Replacements and reasons against them, by module name, and the verification, of a model that holds VJEPA2."""
    _check(model, angle_dtype)
    parts = PARTS | (MASKED if masked_encoder else {})
    modules = {name: module for name, module in model.named_modules() if kind_of(module, parts)}
    last = [m.layer[-1] for m in modules.values() if kind_of(m, ("VJEPA2Predictor",))]
    modules = {n: m for n, m in modules.items() if not kind_of(m, ("VJEPA2Layer",)) or m in last}
    skipped = {name: why for name, module in modules.items() if (why := _reason(module))}
    if masked_encoder and (needed := [n for n, m in modules.items() if n in skipped and _is_needed(m)]):
        fail(
            "patch",
            "masked_encoder",
            "find an encoder and a predictor it can replace",
            f"{needed[0]}: {skipped[needed[0]]}",
            "change that, or leave it out",
        )
    wanted = {n: _bound(m, parts[str(kind_of(m, parts))], angle_dtype) for n, m in modules.items() if n not in skipped}
    attentions = [name for name, module in modules.items() if kind_of(module, ATTENTION)]
    return wanted | linear_layers(model, attentions), skipped, partial(run, masked=masked_encoder)


def _check(model: Any, angle_dtype: torch.dtype | None) -> None:
    for switch, value in SWITCHES.items():
        found = getattr(model.config, switch, value)
        if found != value:
            remedy = "of V-JEPA 2.1 this patch knows nothing, jepa_kernels.models does"
            fail("patch", f"config.{switch}", f"be {value}", found, remedy)
    if angle_dtype not in (None, *FLOATS):
        wanted = "be None, float32, bfloat16 or float16"
        fail("patch", "angle_dtype", wanted, angle_dtype, "leave it out to keep the model's", TypeError)
    dtype = next(model.parameters()).dtype
    if dtype not in FLOATS:
        fail("patch", "model", "be float32, bfloat16 or float16", dtype, "call model.float()", TypeError)


def _bound(module: Any, part: Replacement, angle_dtype: torch.dtype | None) -> Replacement:
    options: dict[str, Any] = {}
    if part.forward in (vjepa2.attention, vjepa2.encoder, vjepa2.predictor):
        options["angle_dtype"] = angle_dtype
    if part.forward is vjepa2.predictor:
        options["fused"] = not _apart(module)
        options["shortened"] = options["fused"] and not _reason(module.layer[-1])
    return replace(part, forward=partial(part.forward, **options)) if options else part


def _reason(module: Any) -> str | None:
    """Why a module keeps its own forward."""
    kind = kind_of(module, PARTS | MASKED)
    if why := own_forward(module, str(kind)):
        return why
    if kind == "VJEPA2RopeAttention":
        return against_attention(module, module.attention_head_size, module.dropout_prob)
    if kind in ATTENTION:
        return against_attention(module, module.head_dim, module.dropout)
    if kind == "VJEPA2PatchEmbeddings3D":
        return against_product(module.proj)
    if kind == "VJEPA2Layer" and (why := _reason(module.attention)):
        return f"its attention is left alone: {why}"
    if kind == "VJEPA2Encoder" and (apart := _apart(module)):
        return f"layer {apart[0]} keeps its own attention"
    return None


def _apart(network: Any) -> list[int]:
    """Layers whose attention takes no Rope."""
    return [i for i, layer in enumerate(network.layer) if _reason(layer.attention)]


def _is_needed(module: nn.Module) -> bool:
    """Whether a masked encoder can't do without its replacement: the predictor's takes contexts that are gathered."""
    return bool(kind_of(module, ("VJEPA2Encoder", "VJEPA2PatchEmbeddings3D", "VJEPA2Predictor", *MASKED)))


def run(model: Any, *, masked: bool) -> dict[str, Tensor]:
    """A clip of few patches through all parts; with masks also what keeps some of them, and predicts far ones."""
    c, base = model.config, getattr(model, "vjepa2", model)
    pixels = seeded_input(model, 4, 2 * c.tubelet_size, c.in_chans, 2 * c.patch_size, 3 * c.patch_size)
    context = torch.tensor([[0, 3, 4, 7, 10], [1, 2, 5, 6, 11]], device=pixels.device).repeat(2, 1)
    far = context[:, :4] + 3 * (c.crop_size // c.patch_size) ** 2 // 2
    features = base(pixels, skip_predictor=True).last_hidden_state
    found = {"encoder": features}
    found["predictor"] = base.predictor(features, [context], [far]).last_hidden_state
    if base is not model:
        found["pooler"] = model.pooler(features)
    if masked:
        found["masked encoder"] = _masked(base, pixels, context)
    return found


def _masked(base: Any, pixels: Tensor, ids: Tensor) -> Tensor:
    """The encoder's features of kept patches alone; by the model's own layers, where it is not patched."""
    if is_patched(base):
        return base(pixels, context_mask=[ids], skip_predictor=True).last_hidden_state
    x = vjepa2.gather(base.encoder.embeddings(pixels), [ids])
    for layer in base.encoder.layer:
        x = layer(x, ids)[0]
    return base.encoder.layernorm(x)
