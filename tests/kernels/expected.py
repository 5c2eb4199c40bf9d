"""What each op's Triton kernels must look like in machine code, and the calls that show it: one entry an op.

Shapes decide what is compiled, not lengths, so the calls are small; channel counts are the published models'.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import jepa_kernels as jk
from jepa_kernels import Packing

EVERY = (80, 90, 100)  # capabilities: A100, H100 and H200, B200
HOPPER = (90,)


@dataclass(frozen=True)
class Call:
    """One call of a public function, and what it must launch and hold.

    launches      kernels in order, forward and backward
    wide          kernels that must load 16 bytes an instruction (not where a row's width is odd)
    counts        {kernel: {instruction pattern: how many}}
    capabilities  GPUs it is compiled for
    holds         {kernel: instruction patterns that it must hold}
    blocks        how many blocks of each kernel must fit a multiprocessor's registers
    spilled       bytes of registers that a kernel may spill
    """

    name: str
    make: Callable[[], object]
    launches: tuple[str, ...]
    wide: tuple[str, ...] = ()
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    capabilities: tuple[int, ...] = EVERY
    holds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: int = 2
    spilled: int = 0


def ema(online: torch.dtype, shadow: torch.dtype | None, form: str) -> Callable[[], object]:
    def make() -> None:
        target = [torch.zeros(100), torch.zeros(7, 3)]
        copies = None if shadow is None else [torch.zeros_like(t, dtype=shadow) for t in target]
        weights = [torch.zeros_like(t, dtype=online) for t in target]
        jk.ema_update(target, weights, 0.996, shadow=copies, form=form, backend="triton")

    return make


def ema_calls() -> Iterator[Call]:
    kernel = "_ema_update_forward_kernel"
    # Every multiplication rounded as the form says: ptxas may fuse none of them.
    unfused = {kernel: {"FFMA.*": 0}}
    pairs = ((torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))
    for online, shadow in (*pairs, (torch.float16, torch.float16), (torch.bfloat16, torch.float32)):
        capabilities = EVERY if (online, shadow) in pairs else HOPPER
        yield Call(f"lerp-{online}-{shadow}", ema(online, shadow, "lerp"), (kernel,), (kernel,), {}, capabilities)
    for form, counts in (("ijepa", unfused), ("vjepa2", {})):
        yield Call(form, ema(torch.float32, None, form), (kernel,), (kernel,), counts, HOPPER)


def adamw(
    grad: torch.dtype | None, shadows: torch.dtype | None, targets: bool = True, **options: object
) -> Callable[[], object]:
    def make() -> None:
        params, exp_avgs, exp_avg_sqs, averages = ([torch.zeros(100), torch.zeros(7, 3)] for _ in range(4))
        copies = None if shadows is None else [torch.zeros_like(p, dtype=shadows) for p in params]
        jk.adamw_ema(
            params,
            [None if grad is None else torch.zeros_like(p, dtype=grad) for p in params],
            exp_avgs,
            exp_avg_sqs,
            [torch.zeros(()), torch.zeros(())],
            averages if targets else None,
            lr=1e-3,
            online_shadow=copies,
            target_shadow=copies and [c.clone() for c in copies] if targets else None,
            **options,
            backend="triton",
        )

    return make


def adamw_calls() -> Iterator[Call]:
    kernel = "_adamw_ema_forward_kernel"
    scaler = dict(grad_scale=2.0, found_inf=torch.zeros(()))
    # Of parameter, gradient, both moments and target: 16 bytes of fp32 read, and written, by a thread at a time.
    for name, make, loads, stores in (
        ("shadows", adamw(torch.float32, torch.bfloat16), 5, 4),
        ("low-grads", adamw(torch.bfloat16, torch.bfloat16, **scaler), 4, 4),
        ("alone", adamw(torch.float32, None, targets=False), 4, 3),
        ("half-grads", adamw(torch.float16, torch.float16, targets=False, maximize=True), 3, 3),
    ):
        counts = {kernel: {r"LDG\.E\.128": loads, r"STG\.E\.128": stores}}
        yield Call(name, make, (kernel,), (kernel,), counts, EVERY if stores == 4 else HOPPER, blocks=4)
    yield Call("average-alone", adamw(None, torch.bfloat16), (kernel,), (kernel,), {}, HOPPER, blocks=6)


def norm(dtype: torch.dtype) -> Callable[[], object]:
    return lambda: jk.grad_norm([torch.zeros(100, dtype=dtype), torch.zeros(7, 3, dtype=dtype)], backend="triton")


def norm_calls() -> Iterator[Call]:
    forward, total = launches = tuple(f"_grad_norm_{stage}_kernel" for stage in ("forward", "sum"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # A thread has 16 elements in flight, later 16 sums of chunks.
        counts = {forward: {r"LDG\.E\.128": dtype.itemsize}, total: {"LDG.E.64": 16}}
        yield Call(str(dtype), norm(dtype), launches, (), counts, holds={forward: ("DFMA",)}, blocks=1)


def weights(packed: bool) -> Callable[[], object]:
    def make() -> Tensor:
        context, target = torch.arange(3).repeat(4, 1), torch.arange(3, 8).repeat(4, 1)
        if not packed:
            return jk.distance_weights(context, target, (2, 4, 4), backend="triton")
        both = dict(packing=Packing.uniform(4, 3), target_packing=Packing.uniform(4, 5))
        return jk.distance_weights(context.flatten(), target.flatten(), (2, 4, 4), **both, backend="triton")

    return make


def weights_calls() -> Iterator[Call]:
    for name, packed in (("packed", True), ("rectangular", False)):
        yield Call(name, weights(packed), ("_distance_weights_forward_kernel",), blocks=4)


def loss(
    dtype: torch.dtype, channels: int, packed: bool = True, normed: bool = False, weighted: bool = False, **options: Any
) -> Callable[[], object]:
    def make() -> Tensor:
        if normed:
            options["norm"] = (torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype), 1e-6)
        if weighted:
            options["weight"] = torch.ones((12,) if packed else (4, 3))
        ids, pred = torch.arange(3).repeat(4, 1), torch.zeros(4, 3, channels, dtype=dtype)
        target = torch.zeros(2, 9, channels, dtype=dtype)
        if packed:
            packing = Packing.uniform(4, 3)
            leaf = pred.flatten(0, 1).requires_grad_()
            out = jk.latent_loss(leaf, target, ids.flatten(), packing=packing, **options, backend="triton")
        else:
            leaf = pred.requires_grad_()
            out = jk.latent_loss(leaf, target, ids, **options, backend="triton")
        return torch.autograd.grad(out, leaf, torch.tensor(2.0))[0]

    return make


def loss_calls() -> Iterator[Call]:
    forward, total, backward = (f"_latent_loss_{stage}_kernel" for stage in ("forward", "sum", "backward"))
    launches, wide = (forward, total, backward), (forward, backward)
    # 1280 channels on 32 threads: 40 each of pred and of target, read once: 80 bytes (bf16) or 160 (fp32) of both.
    once = {dtype: {forward: {r"LDG\.E\.128": 5 * dtype.itemsize}} for dtype in (torch.float32, torch.bfloat16)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = f"packed-{dtype}"
        yield Call(name, loss(dtype, 1280), launches, wide, once.get(dtype, {}))
    for name, make in (
        ("rectangular", loss(torch.bfloat16, 1408, packed=False)),
        ("token", loss(torch.bfloat16, 1024, reduction="token")),
        ("l1", loss(torch.float32, 384, kind="l1")),
        ("l2-raw", loss(torch.float32, 384, kind="l2", normalize=False)),
        ("several-blocks", loss(torch.bfloat16, 6144)),
        ("normed", loss(torch.bfloat16, 1408, normed=True, kind="l1")),
        ("normed-several-blocks", loss(torch.bfloat16, 6144, normed=True)),
        ("levels", loss(torch.bfloat16, 6656, levels=4, weighted=True, kind="l1")),
        ("normed-levels", loss(torch.bfloat16, 3072, packed=False, levels=4, normed=True, weighted=True)),
        ("power", loss(torch.float32, 1024, kind="l1", power=1.5)),
    ):
        yield Call(name, make, launches, wide, {}, HOPPER)
    for channels in (1, 37):
        yield Call(f"channels-{channels}", loss(torch.float32, channels), launches, (), {}, HOPPER)


def contrast(dtype: torch.dtype, channels: int, **options: object) -> Callable[[], object]:
    """Forward, and the gradients of both sides and of the temperature."""

    def make() -> object:
        leaves = [torch.zeros(40, channels, dtype=dtype, requires_grad=True) for _ in range(2)]
        leaves.append(torch.tensor(0.1, requires_grad=True))
        return torch.autograd.grad(jk.info_nce(*leaves, **options, backend="triton"), leaves)

    return make


def contrast_calls() -> Iterator[Call]:
    pair, forward, merge, backward, product, normalize = (
        f"_info_nce_{stage}_kernel" for stage in ("pair", "forward", "merge", "backward", "product", "normalize")
    )
    launches = (pair, forward, merge, merge, pair, backward, product, normalize, product, normalize)
    held = {kernel: ("HGMMA.*", "UTMALDG.*") for kernel in (forward, backward, product)}
    # 128 x 256 products and their sums fill the registers of one block a multiprocessor.
    make, full = contrast(torch.bfloat16, 1536), dict(blocks=1, spilled=264)  # where backward takes halves apart
    yield Call("bfloat16-sm_80", make, launches, (), {}, (80,), blocks=1)
    yield Call("bfloat16-sm_100", make, launches, (), {}, (100,), blocks=1, spilled=472)
    yield Call("bfloat16-sm_120", make, launches, (), {}, (120,), blocks=1, spilled=16)
    yield Call("bfloat16", make, launches, (), {}, HOPPER, held, **full)
    yield Call("as-they-are", contrast(torch.bfloat16, 512, normalize=False), launches, (), {}, HOPPER, held, **full)
    make = contrast(torch.bfloat16, 1024, label_smoothing=0.1, duplicates=torch.arange(40))
    held = {kernel: ("HGMMA.*", "UTMALDG.*") for kernel in (forward, backward)}
    yield Call("smoothed", make, launches, (), {}, HOPPER, held, blocks=1)
    gathers = {kernel: ("HGMMA.*",) for kernel in (forward, backward)}
    yield Call("float16", contrast(torch.float16, 768), launches, (), {}, HOPPER, gathers, blocks=1, spilled=520)
    unaligned = {**gathers, product: ("HGMMA.*", "LDGSTS.*")}  # rows of 68 bytes can't be copied past registers
    yield Call("even", contrast(torch.bfloat16, 34), launches, (), {}, HOPPER, unaligned, blocks=1, spilled=216)
    yield Call("float32", contrast(torch.float32, 512), launches, (), {}, HOPPER, blocks=1, spilled=80)
    yield Call("odd", contrast(torch.float32, 33), launches, (), {}, HOPPER, blocks=1, spilled=96)


def embed(
    dtype: torch.dtype, size: int, embed_dim: int, *, tubelet: int = 0, uint8: bool = False, whole: bool = False
) -> Callable[[], object]:
    """Forward, and every gradient that there is."""

    def make() -> object:
        sides, kernel = (4, 2 * size, 2 * size)[not tubelet :], (tubelet, size, size)[not tubelet :]
        pixels = torch.zeros(2, 3, *sides, dtype=torch.uint8 if uint8 else dtype, requires_grad=not uint8)
        weight = torch.zeros(embed_dim, 3, *kernel, dtype=dtype, requires_grad=True)
        count = 4 * (4 // tubelet if tubelet else 1)
        bias, pos = (torch.zeros(*n, embed_dim, dtype=dtype, requires_grad=True) for n in ((), (count,)))
        rows = dict(ids=None) if whole else dict(ids=torch.arange(3).repeat(4), packing=Packing.uniform(4, 3))
        statistics = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3)) if uint8 else {}
        out = jk.embed_patches(pixels, weight=weight, bias=bias, pos_embed=pos, **rows, **statistics, backend="triton")
        return torch.autograd.grad(out, [pixels, weight, bias, pos][uint8:], torch.zeros_like(out))

    return make


def embed_calls() -> Iterator[Call]:
    copy, forward = (f"_embed_patches_{stage}_kernel" for stage in ("copy", "forward"))
    pixels, bias, total, weight, pos = (
        f"_embed_patches_backward_{stage}_kernel" for stage in ("pixels", "bias", "sum", "weight", "pos")
    )
    layer = (copy, forward, bias, total, copy, weight, total, pos)
    every = (copy, forward, pixels, *layer[2:])
    held = {pixels: ("HGMMA.*",), **dict.fromkeys((forward, weight), ("HGMMA.*", r"LDGSTS.*\.128"))}
    # Sums of 256 x 128 fill the registers of one block a multiprocessor; a few addresses wait on the stack meanwhile.
    for size, hopper, blackwell in ((14, 16, 80), (16, 0, 88)):
        make, uint8 = (embed(torch.bfloat16, size, 1280, uint8=u) for u in (False, True))
        wide = (forward, weight, copy)[: 2 + (size == 16)]  # patches of 14 pixels begin at multiples of 2 only
        for capability, spilled in ((80, 32), (100, blackwell)):
            yield Call(f"p{size}-elsewhere", make, every, wide, {}, (capability,), blocks=1, spilled=spilled)
        yield Call(f"p{size}", make, every, wide, {}, HOPPER, held, blocks=1, spilled=hopper)
        yield Call(f"p{size}-uint8", uint8, layer, (forward, weight), {}, HOPPER, blocks=1, spilled=hopper)
    for name, make, spilled in (
        ("float16", embed(torch.float16, 16, 1024), 0),
        ("clips", embed(torch.bfloat16, 16, 1408, tubelet=2), 0),
        ("every-patch", embed(torch.bfloat16, 16, 768, whole=True), 24),
    ):
        yield Call(name, make, every, (), {}, HOPPER, blocks=1, spilled=spilled)
    yield Call("float32", embed(torch.float32, 14, 1280), every, (), {}, HOPPER)
    yield Call("odd", embed(torch.float32, 5, 33), every, (), {}, HOPPER, blocks=1)


def gather(dtype: torch.dtype, channels: int, packed: bool = True) -> Callable[[], object]:
    def make() -> Tensor:
        x, ids = torch.zeros(2, 9, channels, dtype=dtype, requires_grad=True), torch.arange(3).repeat(4, 1)
        if packed:
            out = jk.gather_tokens(x, ids.flatten(), Packing.uniform(4, 3), backend="triton")
        else:
            out = jk.gather_tokens(x, ids, backend="triton")
        return torch.autograd.grad(out, x, torch.zeros_like(out))[0]

    return make


def gather_calls() -> Iterator[Call]:
    wide = forward, backward = tuple(f"_gather_tokens_{stage}_kernel" for stage in ("forward", "backward"))
    launches = (forward, "_gather_tokens_backward_search_kernel", backward)
    # 16 rows of 256 channels on 128 threads: 32 elements each, moved once.
    once = {d: {k: {r"LDG\.E\.128": 2 * d.itemsize} for k in wide} for d in (torch.float32, torch.bfloat16)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Call(f"packed-{dtype}", gather(dtype, 1280), launches, wide, once.get(dtype, {}), blocks=7)
    yield Call("rectangular", gather(torch.bfloat16, 1408, False), launches, wide, {}, HOPPER, blocks=7)
    for channels in (1, 37):
        yield Call(f"channels-{channels}", gather(torch.float32, channels), launches, (), {}, HOPPER)


def attention(
    dtype: torch.dtype, width: int, lengths: tuple[int, ...], heads: tuple[int, int] = (2, 2), **options: object
) -> Callable[[], object]:
    """Forward and backward of packed sequences; one length: dense."""

    def make() -> object:
        tokens = sum(lengths)
        shapes = [(tokens, heads[i > 0], width) for i in range(3)]
        if len(lengths) == 1:
            shapes = [(1, h, n, w) for n, h, w in shapes]
        else:
            options["packing"] = Packing.from_lengths(lengths)
        leaves = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        out = jk.masked_attention(*leaves, **options, backend="triton")
        return torch.autograd.grad(out, leaves, torch.zeros_like(out))

    return make


def attention_qkv(width: int) -> Callable[[], object]:
    def make() -> object:
        qkv = torch.zeros(60, 3, 2, width, dtype=torch.bfloat16, requires_grad=True)
        out = jk.masked_attention_qkv(qkv, Packing.from_lengths([40, 20]), backend="triton")
        return torch.autograd.grad(out, qkv, torch.zeros_like(out))

    return make


def attention_calls() -> Iterator[Call]:
    short, long = short_attention(), long_attention()
    turn, hgmma = "_masked_attention_turn_kernel", {kernel: ("HGMMA.*",) for kernel in (*short, *long)}
    few, rope = (40, 20), jk.Rope(torch.zeros(60, 3))
    for width in (64, 80, 128):
        yield Call(f"elsewhere-d{width}", attention(torch.bfloat16, width, few), long, long, {}, (80, 100))
    for name, make, spilled in (
        ("float16-d64", attention(torch.float16, 64, few), 0),
        ("rope-d64", attention(torch.bfloat16, 64, few, rope=rope), 32),  # addresses of turns
        ("grouped-d64", attention(torch.bfloat16, 64, few, heads=(4, 2)), 0),
        ("qkv-d24", attention_qkv(24), 0),
    ):
        yield Call(name, make, short, short, {}, HOPPER, hgmma, blocks=1, spilled=spilled)
    ranges = torch.zeros(300, 2, dtype=torch.int32)
    for name, make in (
        ("frames-d64", attention(torch.bfloat16, 64, (516,), frame_size=258)),
        ("ranges-d64", attention(torch.bfloat16, 64, (300,), key_ranges=ranges)),
    ):
        yield Call(name, make, long, long, {}, HOPPER, hgmma)
    yield Call("float32-d80", attention(torch.float32, 80, few), long, long, {}, HOPPER, blocks=1)
    turned = (turn, turn, long[0], turn, turn, *long[1:])
    rope = jk.Rope(torch.zeros(300, 3), pairing="tiled")
    yield Call("rope-d32", attention(torch.bfloat16, 32, (300,), rope=rope), turned, turned, {}, HOPPER, hgmma)


def short_attention() -> tuple[str, ...]:
    """The launches of sequences that stay on chip, forward and backward."""
    return tuple(f"_masked_attention_{stage}_short_kernel" for stage in ("forward", "backward"))


def long_attention() -> tuple[str, ...]:
    """The launches of sequences that stream."""
    return tuple(f"_masked_attention_{stage}_kernel" for stage in ("forward", "backward_q", "backward_kv"))


def rope(dtype: torch.dtype, width: int, axes: int = 3, **options: object) -> Callable[[], object]:
    """Forward and backward of queries and keys, views of one qkv."""

    def make() -> object:
        leaves = [x.detach().requires_grad_() for x in torch.zeros(9, 3, 4, width, dtype=dtype).unbind(1)[:2]]
        both = jk.rope_qk(*leaves, torch.zeros(9, axes), **options, backend="triton")
        return torch.autograd.grad(both, leaves, [torch.zeros_like(x) for x in both])

    return make


def rope_alone() -> Tensor:
    return jk.rope(torch.zeros(2, 4, 9, 64, dtype=torch.bfloat16), torch.zeros(9, 3), backend="triton")


def rope_calls() -> Iterator[Call]:
    kernel = "_rope_kernel"
    both = (kernel, kernel)
    for dtype in (torch.bfloat16, torch.float32):
        yield Call(f"tiled-d64-{dtype}", rope(dtype, 64, pairing="tiled"), both, both, blocks=8)
    for name, make in (
        ("d80", rope(torch.bfloat16, 80)),
        ("d88", rope(torch.float16, 88)),
        ("d24", rope(torch.bfloat16, 24)),
        ("d256", rope(torch.float32, 256)),
        ("half-d128", rope(torch.bfloat16, 128, 1, pairing="half")),
    ):
        yield Call(name, make, both, both, capabilities=HOPPER, blocks=4)
    yield Call("d33", rope(torch.float32, 33), both, capabilities=HOPPER, blocks=4)
    yield Call("alone", rope_alone, (kernel,), (kernel,), capabilities=HOPPER, blocks=8)


def assembled(
    dtype: torch.dtype, channels: int, *, pos: torch.dtype | None = None, packed: bool = True
) -> Callable[[], object]:
    def make() -> object:
        names, lengths = ("context_packing", "target_packing", "packing"), ((5, 3), (4, 4, 4, 4), (9, 7, 9, 7))
        packings = {n: Packing.from_lengths(x) for n, x in zip(names, lengths, strict=True)} if packed else {}
        context = torch.zeros(*((8,) if packed else (2, 4)), channels, dtype=dtype)
        ids = torch.arange(4).repeat(2, 1), torch.arange(4).repeat(4, 1)
        if packed:
            ids = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), ids[1].flatten()
        leaves = [context.requires_grad_(), torch.zeros(2, channels, dtype=pos or dtype, requires_grad=True)]
        table = None if pos is None else torch.zeros(9, channels, dtype=pos)
        out = jk.assemble_tokens(*leaves, *ids, table, **packings, backend="triton")
        return torch.autograd.grad(out, leaves, torch.zeros_like(out))

    return make


def assembled_calls() -> Iterator[Call]:
    launches = tuple(f"_assemble_tokens_{stage}_kernel" for stage in ("forward", "backward", "sum"))
    wide = launches[:2]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Call(f"packed-{dtype}", assembled(dtype, 384, pos=dtype), launches, wide)
    for name, make in (
        ("fp32-tables", assembled(torch.bfloat16, 384, pos=torch.float32)),
        ("rectangular", assembled(torch.bfloat16, 384, pos=torch.bfloat16, packed=False)),
        ("qkv-rows", assembled(torch.bfloat16, 1152)),
    ):
        yield Call(name, make, launches, wide, {}, HOPPER)
    for channels in (1, 37):
        yield Call(f"channels-{channels}", assembled(torch.float32, channels), launches, (), {}, HOPPER)


def slices_of(dtype: torch.dtype, channels: int, **options: int) -> Callable[[], object]:
    """Forward and backward of two views."""

    def make() -> Tensor:
        z, step = torch.zeros(2, 70, channels, dtype=dtype, requires_grad=True), torch.zeros((), dtype=torch.int64)
        loss = jk.sigreg(z, step=step, **options, backend="triton")
        return torch.autograd.grad(loss, z)[0]

    return make


def slices_calls() -> Iterator[Call]:
    drawn = ("directions", "halves")
    stages = (*drawn, "moments", "sum", "forward", *drawn, "factors", "derivative", "backward")
    launches = tuple(f"_sigreg_{stage}_kernel" for stage in stages)
    products = {launches[i]: ("HGMMA.*",) for i in (2, 8, 9)}
    # 128 x 128 projections and the turns of half of them fill the registers of one block a multiprocessor.
    for capability, spilled in ((80, 16), (100, 104)):
        name, make = f"e512-sm_{capability}", slices_of(torch.float32, 512)
        yield Call(name, make, launches, (), {}, (capability,), blocks=1, spilled=spilled)
    for dtype in (torch.float32, torch.bfloat16):
        yield Call(f"e512-{dtype}", slices_of(dtype, 512), launches, (), {}, HOPPER, products, blocks=1)
    for name, make in (
        ("float16", slices_of(torch.float16, 384)),
        ("many-knots", slices_of(torch.float32, 64, knots=64, slices=100)),
        ("odd", slices_of(torch.float32, 37, slices=33)),
    ):
        yield Call(name, make, launches, (), {}, HOPPER, blocks=1)


def spread_of(dtype: torch.dtype, channels: int, turned: bool = False) -> Callable[[], object]:
    def make() -> object:
        z = torch.zeros(channels, 70, dtype=dtype).T if turned else torch.zeros(70, channels, dtype=dtype)
        return jk.collapse_stats(z, backend="triton")

    return make


def spread_calls() -> Iterator[Call]:
    launches = tuple(f"_collapse_stats_{stage}_kernel" for stage in ("forward", "features", "sum"))
    wide = {launches[0]: (r"LDG\.E.*\.128",)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Call(f"e1280-{dtype}", spread_of(dtype, 1280), launches, holds=wide)
    yield Call("odd", spread_of(torch.float32, 37), launches, (), {}, HOPPER)
    yield Call("turned", spread_of(torch.bfloat16, 48, turned=True), launches, (), {}, HOPPER)


CALLS = {
    "adamw_ema": tuple(adamw_calls()),
    "assemble_tokens": tuple(assembled_calls()),
    "collapse_stats": tuple(spread_calls()),
    "distance_weights": tuple(weights_calls()),
    "ema_update": tuple(ema_calls()),
    "embed_patches": tuple(embed_calls()),
    "gather_tokens": tuple(gather_calls()),
    "grad_norm": tuple(norm_calls()),
    "info_nce": tuple(contrast_calls()),
    "latent_loss": tuple(loss_calls()),
    "masked_attention": tuple(attention_calls()),
    "rope": tuple(rope_calls()),
    "sigreg": tuple(slices_calls()),
}
