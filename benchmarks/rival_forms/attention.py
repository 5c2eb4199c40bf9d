"""Attention: SDPA's backends, varlen, nested and flexible attention, padding and loops."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rival_forms.form import Form, Run, timed

# name: batch, heads, tokens, head dim (I-JEPA ViT-H/14 and L/16, V-JEPA 2 ViT-g, their predictors)
DENSE = {
    "ijepa_h14_target": (128, 16, 256, 80),
    "ijepa_h14_context_70": (128, 16, 70, 80),
    "ijepa_h14_predictor_d24": (512, 16, 112, 24),
    "ijepa_l16": (128, 16, 196, 64),
    "vjepa2_l_target": (24, 16, 2048, 64),
    "vjepa2_g_context_508": (24, 22, 508, 64),
    "vjepa2_g_context_128": (24, 22, 128, 64),
    "vjepa2_predictor_d32": (24, 12, 1480, 32),
}
BACKENDS = {
    "sdpa": None,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
RAGGED = (128, 16, 80)  # images, heads, head dim; lengths of I-JEPA's contexts, 111 on average
FRAMES = (8, 16, 8, 258, 64)  # V-JEPA 2-AC: batch, heads, frames, tokens a frame, head dim


def sdpa(backend: SDPBackend | None) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def heads_first(batch: int, heads: int, tokens: int, dim: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of the output of one QKV product, [batch, heads, tokens, dim]."""
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=dtype)
    return [x.transpose(1, 2) for x in qkv.unbind(2)]


def attention_cost(pairs: float, tokens: float, heads: int, dim: int, stage: str, item: int) -> dict[str, float]:
    """pairs: query-key pairs of all sequences; tensors: q, k, v, o, and again with gradients for backward."""
    flops, tensors = (4, 4) if stage == "forward" else (14, 12)
    return dict(flops=flops * pairs * heads * dim, bytes=tensors * tokens * heads * dim * item)


def dense_attention(small: bool) -> Iterator[Form]:
    item = 4 if small else 2
    for workload, (batch, heads, tokens, dim) in DENSE.items():
        batch, heads, tokens = (2, 2, min(tokens, 128)) if small else (batch, heads, tokens)
        for stage in ("forward", "backward"):
            cost = attention_cost(batch * tokens**2, batch * tokens, heads, dim, stage, item)
            for name, backend in BACKENDS.items():

                def make(device, dtype, shape=(batch, heads, tokens, dim), stage=stage, backend=backend):
                    return timed(stage, sdpa(backend), *heads_first(*shape, device, dtype))

                yield Form(name, workload, make, stage=stage, **cost)


def ragged_lengths(images: int) -> list[int]:
    return (75 + torch.randperm(73, generator=torch.Generator().manual_seed(0))).repeat(2)[:images].tolist()


def ragged_attention(small: bool) -> Iterator[Form]:
    images, heads, dim = (4, 2, 80) if small else RAGGED
    lengths = ragged_lengths(images)
    total, longest = sum(lengths), max(lengths)
    pairs = sum(n * n for n in lengths)

    def packed(device: str, dtype: torch.dtype) -> list[Tensor]:
        return list(torch.randn(3, total, heads, dim, device=device, dtype=dtype).unbind(0))

    def varlen(device: str, dtype: torch.dtype, stage: str) -> Run:
        from torch.nn.attention.varlen import varlen_attn

        cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return timed(stage, lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest), *packed(device, dtype))

    def loop(device: str, dtype: torch.dtype, stage: str) -> Run:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
            return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1)

        return timed(stage, run, *packed(device, dtype))

    def padded(device: str, dtype: torch.dtype, stage: str) -> Run:
        keep = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        mask = keep[:, None, None, :]
        inputs = heads_first(images, heads, longest, dim, device, dtype)
        return timed(stage, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), *inputs)

    def nested(device: str, dtype: torch.dtype, stage: str) -> Run:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device)

        def run(*packed: Tensor) -> Tensor:
            q, k, v = (torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in packed)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

        return timed(stage, run, *packed(device, dtype))

    def flex(device: str, dtype: torch.dtype, stage: str) -> Run:
        document = torch.repeat_interleave(torch.arange(images), torch.tensor(lengths)).to(device)
        mask = block_mask(lambda b, h, q, k: document[q] == document[k], total, device)
        inputs = [x.transpose(0, 1)[None] for x in packed(device, dtype)]
        return timed(stage, lambda q, k, v: compiled_flex()(q, k, v, block_mask=mask), *inputs)

    for stage in ("forward", "backward"):
        cost = attention_cost(pairs, total, heads, dim, stage, 4 if small else 2)
        for form in (varlen, loop, padded, nested, flex):

            def make(device, dtype, form=form, stage=stage):
                return form(device, dtype, stage)

            yield Form(form.__name__, "ijepa_h14_context_ragged", make, stage=stage, compiles=form is flex, **cost)

    def build(device: str, dtype: torch.dtype) -> Run:
        document = torch.repeat_interleave(torch.arange(images), torch.tensor(lengths)).to(device)
        return lambda: block_mask(lambda b, h, q, k: document[q] == document[k], total, device)

    yield Form("flex_create_block_mask", "ijepa_h14_context_ragged", build, bytes=8 * total)


def block_mask(mask: Callable[..., Tensor], tokens: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(mask, None, None, tokens, tokens, device=device)


def compiled_flex(cache: list[Any] = []) -> Any:  # noqa: B006 (compiled once a process)
    from torch.nn.attention.flex_attention import flex_attention

    if not cache:
        cache.append(torch.compile(flex_attention, dynamic=False))
    return cache[0]


def block_causal_attention(small: bool) -> Iterator[Form]:
    """Each frame sees itself and the frames before it."""
    batch, heads, frames, per_frame, dim = (1, 2, 4, 64, 64) if small else FRAMES
    tokens = frames * per_frame
    pairs = batch * per_frame**2 * frames * (frames + 1) / 2

    def masked(device: str, dtype: torch.dtype, stage: str) -> Run:
        frame = torch.arange(tokens, device=device) // per_frame
        mask = frame[:, None] >= frame[None, :]
        inputs = heads_first(batch, heads, tokens, dim, device, dtype)
        return timed(stage, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), *inputs)

    def flex(device: str, dtype: torch.dtype, stage: str) -> Run:
        mask = block_mask(lambda b, h, q, k: q // per_frame >= k // per_frame, tokens, device)
        inputs = heads_first(batch, heads, tokens, dim, device, dtype)
        return timed(stage, lambda q, k, v: compiled_flex()(q, k, v, block_mask=mask), *inputs)

    for stage in ("forward", "backward"):
        cost = attention_cost(pairs, batch * tokens, heads, dim, stage, 4 if small else 2)
        for name, form in (("sdpa_mask", masked), ("flex", flex)):

            def make(device, dtype, form=form, stage=stage):
                return form(device, dtype, stage)

            yield Form(name, "vjepa2_ac_block_causal", make, stage=stage, compiles=form is flex, **cost)
