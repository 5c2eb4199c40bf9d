"""Forwards for the modules of Hugging Face's IJepa, and the plan of its patch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.integrations.huggingface.implementations import against_attention
from jepa_kernels.integrations.layers import EMBEDS, against_product, embed, linear_layers, stands_for
from jepa_kernels.integrations.patching import Replacement, Run, kind_of, own_forward, seeded_input


def attention(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """IJepaAttention; with a mask, with dropout set since, or asked for weights by "eager", as it was."""
    dropped = self.training and self.attention_dropout
    if attention_mask is not None or dropped or self.config._attn_implementation == "eager":
        return type(self).forward(self, hidden_states, attention_mask, **kwargs)
    heads = self.num_attention_heads, self.head_dim
    parts = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
    q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in parts)
    out = jk.masked_attention(q, k, v, scale=self.scaling)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


def patch_embeddings(self: Any, pixel_values: Tensor) -> Tensor:
    """IJepaPatchEmbeddings: pixels [B, C, H, W] -> [B, N, E]."""
    if not stands_for(self.projection, pixel_values):
        return type(self).forward(self, pixel_values)
    return embed(self.projection, pixel_values)


PARTS = {
    "IJepaAttention": Replacement(attention, "masked_attention", ("hidden_states", "attention_mask", "kwargs")),
    "IJepaPatchEmbeddings": Replacement(patch_embeddings, EMBEDS, ("pixel_values",)),
}


def plan(model: nn.Module, **options: Any) -> tuple[dict[str, Replacement], dict[str, str], Run]:
    """Replacements and reasons against them, by module name, and the verification, of a model that holds IJepa."""
    for name, value in options.items():
        if value:
            fail("patch", name, "be left out for IJepa", value, "it is of VJEPA2")
    modules = {name: module for name, module in model.named_modules() if kind_of(module, PARTS)}
    skipped = {name: why for name, module in modules.items() if (why := _reason(module))}
    wanted = {name: PARTS[str(kind_of(m, PARTS))] for name, m in modules.items() if name not in skipped}
    attentions = [name for name, module in modules.items() if kind_of(module, ("IJepaAttention",))]
    return wanted | linear_layers(model, attentions), skipped, run


def _reason(module: Any) -> str | None:
    """Why a module keeps its own forward."""
    kind = str(kind_of(module, PARTS))
    if why := own_forward(module, kind):
        return why
    if kind == "IJepaPatchEmbeddings":
        return against_product(module.projection)
    return against_attention(module, module.head_dim, module.attention_dropout)


def run(model: Any) -> dict[str, Tensor]:
    """Embeddings of a whole image, the only size there are positions for, and all layers over a few of its tokens."""
    base = getattr(model, "ijepa", model)
    x = base.embeddings(seeded_input(model, 1, model.config.num_channels, *base.embeddings.image_size))
    tokens = x[:, :12]
    for layer in base.layers:
        tokens = layer(tokens)
    return {"embeddings": x, "features": base.layernorm(tokens)}
