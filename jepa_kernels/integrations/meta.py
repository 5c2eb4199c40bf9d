"""Modules written like Meta's I-JEPA, V-JEPA and V-JEPA 2 code on the kernels, recognised by their shape.

Nothing of their packages is imported: attribute names, signatures and, of rotary positions, numbers tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.integrations.layers import EMBEDS, against_kernel, against_product, embed, linear_layers, stands_for
from jepa_kernels.integrations.patching import Patch, Replacement, apply, own_forward, seeded_input
from jepa_kernels.integrations.ropes import Ropes
from jepa_kernels.rotary import Rope

ATTENTION = ("qkv", "proj", "num_heads", "scale", "attn_drop", "proj_drop")
ROPE = ("d_dim", "h_dim", "w_dim", "grid_size")
SIGNATURES = ("x",), ("x", "mask"), ("x", "mask", "attn_mask")  # of I-JEPA, V-JEPA and V-JEPA 2 without rope
ROPE_SIGNATURE = ("x", "mask", "attn_mask", "T", "H_patches", "W_patches")
BLOCK_SIGNATURES = ("x", "return_attention"), ("x", "return_attention", "mask")


def patch(
    model: nn.Module,
    *,
    only: str | Sequence[str] | None = None,
    verify: bool = True,
    angle_dtype: torch.dtype | None = None,
) -> Patch:
    """Run attention, rotary positions and patch embedding of networks written like Meta's on the kernels.

    Attention (attributes qkv, proj, num_heads, scale) reads queries, keys and values where the qkv product left them.
    With rotary positions (d_dim, h_dim, w_dim, grid_size) they turn on the way in, by a table made once for all layers
    of a forward; the pairing is that of the `rotate_queries_or_keys` beside the class. Where attention gives its
    weights too (I-JEPA, V-JEPA), they are None, except to a block called with return_attention=True. `PatchEmbed` and
    `PatchEmbed3D` become one product over pixels read in place. Linear layers of blocks, fp32 on the CPU, multiply by
    `linear` where that leads. Encoders and predictors, wrappers of several masks and probes keep their own forward;
    calls with attn_mask run attention's own.

    model: a network, or a module that holds several. only: names of modules; None: all that can be.
    angle_dtype: of the products of positions and frequencies; None: as the unpatched model rounds them, which in bf16
        and under autocast is more coarsely than float32.
    verify: compare each replaced module alone before and after, within the error budget.
    Left alone, with the reason: attention among action tokens, causal, with a `mask` that changes its numbers, with
    dropout of its weights or with heads that no kernel takes. Raises ValueError for another signature, and ValueError
    and RuntimeError as `patching.apply`.
    Source: I-JEPA (arXiv:2301.08243), V-JEPA (arXiv:2404.08471), V-JEPA 2 (arXiv:2506.09985).
    """
    ropes = Ropes(angle_dtype)
    found = {name: _found(module, ropes) for name, module in model.named_modules()}
    replacements = {name: r for name, r in found.items() if isinstance(r, Replacement)}
    skipped = {name: why for name, why in found.items() if isinstance(why, str)}
    replacements |= linear_layers(model, [name for name, m in model.named_modules() if _has(m, *ATTENTION)])
    run = partial(_each_alone, names=tuple(replacements)) if verify else None
    return apply(model, replacements, skipped, source=f"module {type(model).__module__}", only=only, run=run)


def _found(module: Any, ropes: Ropes) -> Replacement | str | None:
    """What takes the place of a module's forward, or why nothing does; None: it is nothing that could be replaced."""
    own = own_forward(module, type(module).__name__)
    if _has(module, *ATTENTION):
        return own or _against_attention(module) or _attention_replacement(module, ropes)
    if _has(module, "proj", "patch_size"):
        parameters = ("x", "kwargs") if _signature(module) == ("x", "kwargs") else ("x",)
        return own or against_product(module.proj) or Replacement(_patch_embed, EMBEDS, parameters)
    if _has(module, "attn", "norm1") and _signature(module) in BLOCK_SIGNATURES:
        return own or Replacement(_block, "attention's weights computed where they are asked for", _signature(module))
    return None


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _signature(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _against_attention(attention: Any) -> str | None:
    """Why it must keep its own forward."""
    if not _has(attention.qkv, "in_features", "out_features"):
        return f"its qkv is {type(attention.qkv).__name__}, which does not tell its in_features and out_features"
    width = attention.qkv.out_features // 3 // attention.num_heads
    if "action_tokens" in _signature(attention):
        return "action tokens stand among its patches"
    if getattr(attention, "is_causal", False):
        return "it is causal"
    if _has(attention, *ROPE):
        if {attention.d_dim, attention.h_dim, attention.w_dim} != {2 * (width // 3 // 2)}:
            return "its axes turn another number of channels than published"
        if _pairing(attention) is None:
            return "no rotate_queries_or_keys(x, pos) of a known pairing stands beside it"
    elif "mask" in _signature(attention) and not _ignores_mask(attention):
        return "its `mask` is more than the ids of its tokens"
    return against_kernel(width, _dropout(attention))


def _dropout(attention: Any) -> float:
    """Of the weights; published code gives SDPA the probability of another dropout, in evaluation too."""
    return attention.proj_drop_prob if getattr(attention, "use_sdpa", False) else attention.attn_drop.p


def _attention_replacement(attention: Any, ropes: Ropes) -> Replacement:
    if _has(attention, *ROPE):
        turned = partial(_rope_attention, ropes=ropes, pairing=_pairing(attention) or "")
        return Replacement(turned, "attention that turns queries and keys on the way in", ROPE_SIGNATURE)
    signature = _signature(attention)
    if signature not in SIGNATURES:  # refused, with its names
        return Replacement(_attention, "", SIGNATURES[-1])
    plain = partial(_attention, gives_weights=_gives_weights(attention))
    return Replacement(plain, "attention of the qkv product read in place", signature)


def _pairing(attention: nn.Module) -> str | None:
    """How the function beside the class turns pairs of channels, told by its numbers."""
    rotate = inspect.unwrap(type(attention).forward).__globals__.get("rotate_queries_or_keys")
    with torch.device("cpu"):  # whatever torch.set_default_device names
        x = torch.randn(1, 1, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        places = torch.arange(5)
    try:
        turned = rotate(x, pos=places)
    except TypeError:  # there is none, or one that takes something else
        return None
    for pairing in ("tiled", "interleaved"):
        if torch.allclose(turned, jk.rope(x, places[:, None], pairing=pairing, backend="reference"), rtol=0, atol=1e-5):
            return pairing
    return None


def _gives_weights(attention: Any) -> bool:
    """Whether its own forward gives (output, weights)."""
    return isinstance(_own_output(attention), tuple)


def _ignores_mask(attention: Any) -> bool:
    """Whether no mask changes its own output: not ids, nor what is added to logits, nor the keys that are seen."""
    like = seeded_input(attention, 1)
    ids = torch.ones(4, 4, dtype=torch.long, device=like.device).tril()
    try:
        outs = [_own_output(attention, *mask) for mask in ((), (ids,), (ids.to(like),), (ids.bool(),))]
        first, *others = (out[0] if isinstance(out, tuple) else out for out in outs)
        return all(torch.equal(first, out) for out in others)
    except Exception:  # of code that is not ours: of a mask that it reads
        return False


def _own_output(attention: Any, *mask: Tensor) -> Any:
    """Of four drawn tokens, by its own forward; dropout draws the same numbers every time."""
    x = seeded_input(attention, 1, 4, attention.qkv.in_features)
    with torch.no_grad(), torch.random.fork_rng([x.device.index] if x.is_cuda else []):
        return type(attention).forward(attention, x, *mask)


def _attend(attention: Any, qkv: Tensor, rope: Rope | None = None) -> Tensor:
    scale = None if getattr(attention, "use_sdpa", False) else attention.scale  # which SDPA was never given
    out = jk.masked_attention_qkv(qkv, rope=rope, scale=scale)
    return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))


def _attention(
    self: Any, x: Tensor, mask: Tensor | None = None, attn_mask: Tensor | None = None, *, gives_weights: bool
) -> Any:
    """mask: ids of the tokens, which attention without positions does not read."""
    if attn_mask is not None:
        return type(self).forward(self, x, mask, attn_mask)
    if _dropout(self):  # set since the patch
        return type(self).forward(self, x) if mask is None else type(self).forward(self, x, mask)
    out = _attend(self, self.qkv(x).unflatten(-1, (3, self.num_heads, -1)))
    return (out, None) if gives_weights else out


def _rope_attention(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    T: int | None = None,
    H_patches: int | None = None,
    W_patches: int | None = None,
    *,
    ropes: Ropes,
    pairing: str,
) -> Tensor:
    if attn_mask is not None or _dropout(self):
        return type(self).forward(self, x, mask, attn_mask, T, H_patches, W_patches)
    grid = (self.grid_size, self.grid_size) if H_patches is None or W_patches is None else (H_patches, W_patches)
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
    return _attend(self, qkv, ropes.of(qkv, mask, grid, pairing))


def _block(self: Any, x: Tensor, return_attention: bool = False, mask: Tensor | None = None) -> Tensor:
    if return_attention:
        return type(self.attn).forward(self.attn, self.norm1(x))[1]
    given = {} if mask is None else {"mask": mask}
    return type(self).forward(self, x, **given)


def _patch_embed(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
    if not stands_for(self.proj, x):
        return type(self).forward(self, x, **kwargs)  # which says what it minds
    return embed(self.proj, x)


def _each_alone(model: nn.Module, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Outputs of every attention and patch embedding among `names`, of drawn inputs, side by side."""
    found: dict[str, list[Tensor]] = {}
    for module in map(model.get_submodule, names):
        for what, out in _outputs(module).items():
            found.setdefault(what, []).append(out.flatten())
    return {what: torch.cat(outs) for what, outs in found.items()}


def _outputs(module: Any) -> dict[str, Tensor]:
    if _has(module, "attn"):  # a block: of what it holds
        return {}
    if isinstance(module, nn.Linear):
        return {}  # of a few drawn rows PyTorch's own product: the kernel is held by its op's suite
    if isinstance(module.proj, nn.Conv2d | nn.Conv3d):
        sides = (2 * size for size in module.proj.kernel_size)
        return {"patches": module(seeded_input(module, 2, module.proj.in_channels, *sides))}
    if not any(p.is_floating_point() for p in module.parameters()):
        remedy = "pass verify=False, and compare outputs yourself"
        fail("patch", f"{type(module).__name__}", "hold floating weights, to be verified", "none", remedy)
    tokens = seeded_input(module, 2, 12, module.qkv.in_features)
    if not _has(module, *ROPE):
        out = module(tokens)
        return {"attention": out[0] if isinstance(out, tuple) else out}
    kept = torch.tensor([[0, 1, 4, 6, 11], [2, 3, 5, 8, 20]], device=tokens.device)
    return {
        "attention": module(tokens, T=2, H_patches=2, W_patches=3),
        "attention of kept patches": module(tokens[:, :5], kept),
    }
