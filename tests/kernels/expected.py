"""What each op's Triton kernels must look like in machine code, and the calls that show it: one entry an op.

Shapes decide what is compiled, not lengths, so the calls are small; channel counts are the published models'.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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


def loss(dtype: torch.dtype, channels: int, packed: bool = True, **options: object) -> Callable[[], object]:
    def make() -> Tensor:
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
    # 2048 lanes on 128 threads: 16 elements each of pred and target, read once: 32 bytes (bf16) or 64 (fp32) of both.
    once = {dtype: {forward: {r"LDG\.E\.128": 4 * dtype.itemsize // 2}} for dtype in (torch.float32, torch.bfloat16)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = f"packed-{dtype}"
        yield Call(name, loss(dtype, 1280), launches, wide, once.get(dtype, {}))
    for name, make in (
        ("rectangular", loss(torch.bfloat16, 1408, packed=False)),
        ("token", loss(torch.bfloat16, 1024, reduction="token")),
        ("l1", loss(torch.float32, 384, kind="l1")),
        ("l2-raw", loss(torch.float32, 384, kind="l2", normalize=False)),
        ("several-blocks", loss(torch.bfloat16, 6144)),
    ):
        yield Call(name, make, launches, wide, {}, HOPPER)
    for channels in (1, 37):
        yield Call(f"channels-{channels}", loss(torch.float32, channels), launches, (), {}, HOPPER)


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
    forward = "_embed_patches_forward_kernel"
    pixels, rows, total, weight, pos = (
        f"_embed_patches_backward_{stage}_kernel" for stage in ("pixels", "rows", "sum", "weight", "pos")
    )
    layer, gather = (forward, rows, total, weight, total, pos), ("LDGSTS.*",)
    every, wide = (forward, pixels, *layer[1:]), (forward, rows, weight)
    held = {forward: ("HGMMA.*", *gather), pixels: ("HGMMA.*",), weight: ("HGMMA.*", *gather)}
    for size in (14, 16):
        # Patches of 14 pixels begin at multiples of 2 only: copied by 4 bytes, asynchronously too.
        make = embed(torch.bfloat16, size, 1280)
        yield Call(f"p{size}-elsewhere", make, every, wide if size == 16 else (), {}, (80, 100), blocks=1)
        yield Call(f"p{size}", make, every, wide if size == 16 else (), {}, HOPPER, held)
        yield Call(f"p{size}-uint8", embed(torch.bfloat16, size, 1280, uint8=True), layer, (), {}, HOPPER, blocks=1)
    for name, make, launches in (
        ("float16", embed(torch.float16, 16, 1024), every),
        ("float32", embed(torch.float32, 14, 1280), every),
        ("clips", embed(torch.bfloat16, 16, 1408, tubelet=2), every),
        ("every-patch", embed(torch.bfloat16, 16, 768, whole=True), every),
    ):
        yield Call(name, make, launches, (), {}, HOPPER)
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
    forward, backward = launches = tuple(f"_gather_tokens_{stage}_kernel" for stage in ("forward", "backward"))
    # 16 rows of 256 channels on 128 threads: 32 elements each, moved once.
    once = {d: {k: {r"LDG\.E\.128": 2 * d.itemsize} for k in launches} for d in (torch.float32, torch.bfloat16)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        counts = once.get(dtype, {})
        yield Call(f"packed-{dtype}", gather(dtype, 1280), (forward, backward), launches, counts, blocks=8)
    yield Call("rectangular", gather(torch.bfloat16, 1408, False), (forward, backward), launches, {}, HOPPER, blocks=7)
    for channels in (1, 37):
        yield Call(f"channels-{channels}", gather(torch.float32, channels), (forward, backward), (), {}, HOPPER)


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
    for name, make, spilled in (
        ("frames-d64", attention(torch.bfloat16, 64, (516,), frame_size=258), 16),  # lengths: a second block fits
        ("ranges-d64", attention(torch.bfloat16, 64, (300,), key_ranges=ranges), 0),
    ):
        yield Call(name, make, long, long, {}, HOPPER, hgmma, spilled=spilled)
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


CALLS = {
    "assemble_tokens": tuple(assembled_calls()),
    "ema_update": tuple(ema_calls()),
    "embed_patches": tuple(embed_calls()),
    "gather_tokens": tuple(gather_calls()),
    "latent_loss": tuple(loss_calls()),
    "masked_attention": tuple(attention_calls()),
    "rope": tuple(rope_calls()),
}
