"""timm's vision transformers on the kernels, I-JEPA's published ones (`vit_huge_patch14_gap_224`, ...) among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.integrations.layers import EMBEDS, against_kernel, against_product, embed, linear_layers, stands_for
from jepa_kernels.integrations.patching import Patch, Replacement, apply, own_forward, seeded_input


def patch(model: nn.Module, *, only: str | Sequence[str] | None = None, verify: bool = True) -> Patch:
    """Run attention and patch embedding of a timm ViT on the kernels, in this instance alone.

    `Attention` reads queries, keys and values where the qkv product left them (or after q_norm and k_norm);
    `PatchEmbed` is one product over pixels read in place; blocks whose weights are fp32 on the CPU multiply by `linear`
    where that leads. All else stays timm's: norms, scales, gates, dropout.
    Calls with attn_mask or is_causal run timm's own forward. Left alone, with the reason: attention of another form
    (rotary, differential, pooling), with attn_drop or with heads that no kernel takes; a patch embedding that pads,
    overlaps or keeps the grid.

    model: a VisionTransformer of timm, or a module that holds one. only: names of modules; None: all that can be.
    verify: compare the features of one drawn image before and after, of every ViT in the model, within the error
        budget.
    Raises ImportError without a timm that has these classes; ValueError and RuntimeError as `patching.apply`.
    """
    attention, patch_embed = _classes()
    replacements: dict[str, Replacement] = {}
    skipped: dict[str, str] = {}
    attentions = [name for name, module in model.named_modules() if hasattr(module, "fused_attn")]  # timm's mark
    for name, module in model.named_modules():
        if type(module) is attention:
            why, replacement = _against_attention(module), ATTENTION
        elif type(module) is patch_embed:
            why, replacement = _against_patch_embed(module), PATCH_EMBED
        elif name in attentions:
            why = f"{type(module).__name__} is attention of another form"
        else:
            continue
        if why is None:
            replacements[name] = replacement
        else:
            skipped[name] = why
    replacements |= linear_layers(model, attentions)
    run = _features if verify else None
    return apply(model, replacements, skipped, source=f"timm {version('timm')}", only=only, run=run)


def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    try:
        from timm.layers import Attention, PatchEmbed
    except ImportError as error:
        remedy = 'pip install "timm>=1.0.31"'
        fail(
            "patch", "timm", "be installed and have layers.Attention and layers.PatchEmbed", error, remedy, ImportError
        )
    return Attention, PatchEmbed


def _attention(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    if attn_mask is not None or is_causal or (self.training and self.attn_drop.p):
        return type(self).forward(self, x, attn_mask, is_causal)
    gate = None if self.gate is None else self.gate(x).sigmoid()
    out = _attend(self, self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)))
    out = self.norm(out.transpose(1, 2).flatten(2))
    return self.proj_drop(self.proj(out if gate is None else out * gate))


def _attend(self: Any, qkv: Tensor) -> Tensor:
    scale = None if self.fused_attn else self.scale  # which timm's fused attention is never given
    if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
        return jk.masked_attention_qkv(qkv, scale=scale)
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return jk.masked_attention(self.q_norm(q), self.k_norm(k), v, scale=scale)


def _patch_embed(self: Any, x: Tensor) -> Tensor:
    if not stands_for(self.proj, x):
        return type(self).forward(self, x)
    uneven = any(n % size for n, size in zip(x.shape[-2:], self.patch_size, strict=True))
    other = self.strict_img_size and tuple(x.shape[-2:]) != self.img_size
    if self.img_size is not None and (uneven or other):
        return type(self).forward(self, x)  # which says what it minds
    return self.norm(embed(self.proj, x))


ATTENTION = Replacement(_attention, "attention of the qkv product read in place", ("x", "attn_mask", "is_causal"))
PATCH_EMBED = Replacement(_patch_embed, EMBEDS, ("x",))


def _against_attention(attention: Any) -> str | None:
    return own_forward(attention, "Attention") or against_kernel(attention.head_dim, attention.attn_drop.p)


def _against_patch_embed(patch_embed: Any) -> str | None:
    if patch_embed.dynamic_img_pad:
        return "it pads images"
    if not patch_embed.flatten:
        return "it keeps the grid of patches"
    return own_forward(patch_embed, "PatchEmbed") or against_product(patch_embed.proj)


def _features(model: nn.Module) -> Mapping[str, Tensor]:
    """Tokens of one drawn image, by every transformer in the model."""
    found: dict[str, Tensor] = {}
    vit: Any
    for name, vit in model.named_modules():
        embedding: Any = getattr(vit, "patch_embed", None)
        if hasattr(vit, "forward_features") and getattr(embedding, "img_size", None) is not None:
            image = seeded_input(vit, 1, embedding.proj.in_channels, *embedding.img_size)
            found[f"features of {name}" if name else "features"] = vit.forward_features(image)
    if not found:
        remedy = "pass verify=False, and compare outputs yourself"
        fail("patch", "model", "hold a timm ViT with an image size, to be verified", type(model).__name__, remedy)
    return found
