"""Forwards for the modules of Hugging Face's VJEPA2.

Arguments and results are those of transformers; what the functions take besides, after the `*`, is set by the plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.integrations.layers import against_product, embed, stands_for
from jepa_kernels.integrations.ropes import published_rope
from jepa_kernels.rotary import Rope

AngleType = torch.dtype | None


def attention(
    self: Any,
    hidden_states: Tensor,
    position_mask: Tensor | Rope | None = None,
    *,
    angle_dtype: AngleType,
    first: int = 0,
) -> tuple[Tensor, None]:
    """VJEPA2RopeAttention: q and k turn on their way into attention.

    position_mask: ids [B, N]; None: the first N; a patched encoder or predictor passes the Rope of all its layers.
    first: of the rows that look; those before are only looked at, and the Rope is of these queries and all keys.
    """
    if self.config._attn_implementation == "eager":
        remedy = "undo the patch, or model.set_attn_implementation('sdpa')"
        fail("patched VJEPA2", "attn_implementation", "not be 'eager'", "a wish for attention weights", remedy)
    if self.training and self.dropout_prob:
        fail("patched VJEPA2", "attention dropout", "stay 0", self.dropout_prob, "undo the patch, or set it to 0")
    heads = self.num_attention_heads, self.attention_head_size
    parts = self.query(hidden_states[:, first:]), self.key(hidden_states), self.value(hidden_states)
    q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in parts)
    rope = position_mask if isinstance(position_mask, Rope) else _rope(self, q, position_mask, angle_dtype)
    out = jk.masked_attention(q, k, v, rope=rope, scale=self.scaling)
    return self.proj(out.transpose(1, 2).flatten(2)), None


def _rope(attention: Any, x: Tensor, ids: Tensor | None, angle_dtype: AngleType) -> Rope:
    """How tokens x [..., N, :] at ids turn; frequencies are of the type of the queries that the model makes of x."""
    ids = torch.arange(x.shape[-2], device=x.device) if ids is None else ids
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    grid = attention.grid_size, attention.grid_size
    return published_rope(ids, grid, attention.d_dim // 2, "tiled", dtype, angle_dtype)


def patch_embeddings(self: Any, pixel_values_videos: Tensor, ids: Tensor | None = None) -> Tensor:
    """VJEPA2PatchEmbeddings3D: pixels [B, C, T, H, W] -> [B, N, E], or of the patches `ids` [M, K] alone."""
    if stands_for(self.proj, pixel_values_videos):
        return embed(self.proj, pixel_values_videos, ids)
    if ids is not None:
        actual = against_product(self.proj) or f"pixels of shape {tuple(pixel_values_videos.shape)}"
        fail("VJEPA2Model with a masked encoder", "proj", "be the convolution of the patch", actual, "undo the patch")
    return type(self).forward(self, pixel_values_videos)


def embeddings(self: Any, pixel_values_videos: Tensor, ids: Tensor | None = None) -> Tensor:
    """VJEPA2Embeddings: pixels [B, T, C, H, W]; a clip shorter than a patch is repeated."""
    pixels = pixel_values_videos.transpose(1, 2).to(self.patch_embeddings.proj.weight.dtype)
    if pixels.shape[2] < self.config.tubelet_size:
        pixels = pixels.repeat(1, 1, self.config.tubelet_size, 1, 1)
    return self.patch_embeddings(pixels, ids)


def encoder(
    self: Any,
    pixel_values_videos: Tensor | None = None,
    *,
    angle_dtype: AngleType,
    context_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """VJEPA2Encoder with one Rope; of the patches `context_ids` [masks * B, K] alone where a masked model asks it."""
    from transformers.modeling_outputs import BaseModelOutput

    kept = () if context_ids is None else (context_ids,)
    x = self.embeddings(pixel_values_videos, *kept)
    rope = _rope(self.layer[0].attention, x, context_ids, angle_dtype)
    for layer in self.layer:
        x = layer(x, rope, **kwargs)[0]
    return BaseModelOutput(last_hidden_state=self.layernorm(x))


def predictor_embeddings(
    self: Any, hidden_states: Tensor, context_mask: list[Tensor], target_mask: list[Tensor], mask_index: int = 1
) -> tuple[Tensor, Tensor]:
    """VJEPA2PredictorEmbeddings: [context | mask tokens] and their ids, of contexts [masks * B, Kc, E]."""
    context = self.predictor_embeddings(hidden_states)
    context_ids, target_ids = (
        _joined(name, masks).to(context.device) for name, masks in _named(context_mask, target_mask)
    )
    token = self.mask_tokens[mask_index % self.num_mask_tokens]  # [1, 1, P]
    targets = token.expand(*target_ids.shape, -1)
    return torch.cat([context, targets], 1), torch.cat([context_ids, target_ids], 1)


def predictor(
    self: Any,
    encoder_hidden_states: Tensor,
    context_mask: list[Tensor],
    target_mask: list[Tensor],
    *,
    angle_dtype: AngleType,
    fused: bool,
    shortened: bool,
    masked: bool = False,
    **kwargs: Any,
) -> Any:
    """VJEPA2Predictor: attention minds no order, so that nothing is sorted and predictions are the last rows.

    fused: whether its layers take a Rope. shortened: whether the last one is `last_layer`.
    masked: encoder_hidden_states are those of context_mask already.
    """
    from transformers.modeling_outputs import BaseModelOutput

    context = encoder_hidden_states if masked else gather(encoder_hidden_states, context_mask)
    x, ids = self.embeddings(context, context_mask, target_mask)
    at, first = _rope(self.layer[0].attention, x, ids, angle_dtype) if fused else ids, context.shape[1]
    *layers, last = self.layer
    for layer in layers:
        x = layer(x, at, **kwargs)[0]
    if shortened:
        x = last(x, _looking(at, first), first=first, **kwargs)[0]
    else:
        x = last(x, at, **kwargs)[0][:, first:]
    return BaseModelOutput(last_hidden_state=self.proj(self.layernorm(x)))


def _looking(rope: Rope, first: int) -> Rope:
    """`rope` where rows from `first` on are queries, and all are keys."""
    options: dict[str, Any] = dict(frequencies=rope.frequencies, angle_dtype=rope.angle_dtype)
    return Rope(rope.positions[:, first:], rope.positions, pairing=rope.pairing, **options)


def last_layer(
    self: Any, hidden_states: Tensor, position_mask: Tensor | Rope | None = None, *, first: int = 0, **kwargs: Any
) -> tuple[Tensor, None]:
    """VJEPA2Layer at the rows from `first` on, [B, N, E] -> [B, N - first, E]: those before are only looked at."""
    found, _ = self.attention(self.norm1(hidden_states), position_mask, first=first)
    x = self.drop_path(found) + hidden_states[:, first:]
    return self.drop_path(self.mlp(self.norm2(x))) + x, None


def masked_model(
    self: Any,
    pixel_values_videos: Tensor,
    context_mask: list[Tensor] | None = None,
    target_mask: list[Tensor] | None = None,
    skip_predictor: bool = False,
    **kwargs: Any,
) -> Any:
    """VJEPA2Model, whose encoder sees the patches of context_mask alone; without one, as it was."""
    if context_mask is None:
        return type(self).forward(self, pixel_values_videos, None, target_mask, skip_predictor, **kwargs)
    from transformers.models.vjepa2 import modeling_vjepa2 as outputs

    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.pop(name, getattr(self.config, name, False)):
            remedy = "register a forward hook on the layers"
            fail("VJEPA2Model with a masked encoder", name, "be left out with context_mask", True, remedy)
    return_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
    ids = _joined("context_mask", context_mask).to(pixel_values_videos.device)
    context = self.encoder(pixel_values_videos=pixel_values_videos, context_ids=ids, **kwargs).last_hidden_state
    predicted = None
    if not skip_predictor:
        if target_mask is None:
            fail("VJEPA2Model", "target_mask", "be given with context_mask", None, "or pass skip_predictor=True")
        found = self.predictor(context, context_mask, target_mask, masked=True, **kwargs)
        predicted = outputs.VJEPA2WithMaskedInputPredictorOutput(last_hidden_state=found.last_hidden_state)
    result = outputs.VJEPA2WithMaskedInputModelOutput(
        last_hidden_state=context, masked_hidden_state=context, predictor_output=predicted
    )
    return result if return_dict else result.to_tuple()


def gather(x: Tensor, masks: list[Tensor]) -> Tensor:
    """x [B, N, E] at ids [B, K] of each mask -> [masks * B, K, E], mask-major."""
    _check_masks("context_mask", masks)
    kept = [x.gather(1, ids.to(x.device, torch.long).unsqueeze(-1).expand(-1, -1, x.shape[-1])) for ids in masks]
    return kept[0] if len(kept) == 1 else torch.cat(kept)


def _named(context_mask: list[Tensor], target_mask: list[Tensor]) -> tuple[tuple[str, list[Tensor]], ...]:
    if len(context_mask) != len(target_mask):
        counts = f"{len(context_mask)} and {len(target_mask)}"
        fail("VJEPA2Predictor", "context_mask and target_mask", "hold as many masks", counts, "repeat the shorter list")
    return ("context_mask", context_mask), ("target_mask", target_mask)


def _joined(name: str, masks: list[Tensor]) -> Tensor:
    """Ids [masks * B, K], int64, of a list of masks [B, K]."""
    _check_masks(name, masks)
    return (masks[0] if len(masks) == 1 else torch.cat(list(masks))).long()


def _check_masks(name: str, masks: list[Tensor]) -> None:
    if not isinstance(masks, list | tuple) or not masks or any(ids.dim() != 2 for ids in masks):
        fail("VJEPA2Model", name, "be a list of ids [B, K]", type(masks).__name__, "pass [ids]", TypeError)
    if any(ids.shape != masks[0].shape for ids in masks[1:]):
        shapes = [tuple(ids.shape) for ids in masks]
        fail(
            "VJEPA2Model", name, "hold masks of one shape", shapes, "call the model for each, or cut them to one length"
        )


def pooler_self_attention(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """VJEPA2PoolerSelfAttention."""
    if attention_mask is not None or (self.training and self.dropout):
        return type(self).forward(self, hidden_states, attention_mask)
    return self.out_proj(_attend(self, hidden_states, hidden_states, hidden_states)), None


def pooler_cross_attention(
    self: Any, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """VJEPA2PoolerCrossAttention."""
    if attention_mask is not None or (self.training and self.dropout):
        return type(self).forward(self, queries, keys, values, attention_mask)
    return _attend(self, queries, keys, values), None


def _attend(self: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    parts = (self.q_proj(queries), self.k_proj(keys), self.v_proj(values))
    q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
    return jk.masked_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
