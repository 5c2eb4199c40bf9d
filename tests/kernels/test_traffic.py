"""Bytes that Triton kernels touch, counted in the interpreter, over the least that have to move."""

import os
from math import prod
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels.cost import total
from jepa_kernels.ops import OPS
from jepa_kernels.ops.embed_patches.triton import _parts
from jepa_kernels.profiling.notes import Notes

pytestmark = pytest.mark.interp
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    from jepa_kernels.verify.interpreter import TRAFFIC, WORK

BANDWIDTH = 4.3e12  # bytes a second, read and written: what an H200 copies at
PRODUCTS = 790e12  # bf16 operations a second
EXPONENTIALS = 3.7e12  # a second
CACHE = 7.8e12  # bytes a second from the L2 cache: what products in tiles of 128 x 128 at 500e12 operations fetch
LAUNCH_S = 2e-6


def ema(shadow: bool):
    target, online = torch.zeros(100_000), torch.ones(100_000)
    copies = [torch.zeros(100_000, dtype=torch.bfloat16)] if shadow else None
    jk.ema_update([target], [online], 0.9, shadow=copies, backend="triton")
    return 100_000 * (14 if shadow else 12)


def adamw(shadows: bool):
    """Parameter, both moments and target read and written, gradient read; two copies written."""
    params, grads, exp_avgs, exp_avg_sqs, targets = ([x] for x in torch.rand(5, 100_000))
    copies = {n: [torch.zeros(100_000).bfloat16()] for n in ("online_shadow", "target_shadow")} if shadows else {}
    state = exp_avgs, exp_avg_sqs, [torch.zeros(())]
    jk.adamw_ema(params, grads, *state, targets, lr=1e-3, momentum=0.996, **copies, backend="triton")
    return 100_000 * (40 if shadows else 36)


def norm(dtype: torch.dtype):
    jk.grad_norm([torch.ones(100_000, dtype=dtype)], backend="triton")
    return 100_000 * dtype.itemsize


def loss(dtype: torch.dtype, channels: int, **options):
    """Forward with the gradient: pred and chosen targets read, gradient written; a norm is read from the cache."""
    ids = torch.arange(6).expand(4, 6).reshape(-1)
    pred = torch.randn(24, channels, dtype=dtype, requires_grad=True)
    target = torch.randn(2, 9, channels, dtype=dtype)
    jk.latent_loss(pred, target, ids, packing=Packing.uniform(4, 6), **options, backend="triton")
    norm = 24 * channels * 2 * dtype.itemsize if "norm" in options else 0
    return 3 * pred.numel() * pred.element_size() + norm


def weights():
    """Ids of contexts read and their weights written; targets come from the cache, once for 64 contexts."""
    ids = torch.arange(1024).view(4, 256)
    context, target = ids[:, :64].contiguous(), ids[:, 64:].contiguous()
    jk.distance_weights(context, target, (4, 16, 16), backend="triton")
    return 12 * context.numel() + 8 * target.numel()


def spread(dtype: torch.dtype):
    """Rows are read for their norms and, from the cache but counted here, for their sums; sums of 64 rows in fp32."""
    z = torch.ones(640, 1408, dtype=dtype)
    jk.collapse_stats(z, backend="triton")
    return z.numel() * dtype.itemsize


def gather(backward: bool):
    """Contexts of I-JEPA: 111 of 256 tokens kept. Forward copies them; backward writes every token once."""
    ids, packing = Packing.from_ids([torch.arange(n) * 2 for n in (100, 122)])
    x = torch.randn(2, 256, 1280).bfloat16().requires_grad_()
    out = jk.gather_tokens(x, ids, packing, backend="triton")
    if backward:
        TRAFFIC.clear()
        torch.autograd.grad(out, x, torch.ones_like(out))
    return 2 * (out.numel() + (x if backward else out).numel())


def rope(stage: str):
    """Queries and keys of two clips read and written, and the table of each; programs share no heads at full size."""
    leaves = [torch.randn(2, 40, 22, 64).bfloat16().transpose(1, 2).requires_grad_() for _ in range(2)]
    table = jk.Rope(torch.rand(2, 40, 3) * 9, pairing="tiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jepa_kernels.ops.rope.triton.PROGRAMS", 1)
        both = jk.rope_qk(*leaves, table, backend="triton")
        if stage == "backward":
            TRAFFIC.clear()
            torch.autograd.grad(both, leaves, [x.detach() for x in leaves])
    return 2 * sum(x.numel() * 2 for x in leaves) + table.turns(64)[0].numel() * 4


def assembled(backward: bool):
    """Sequences written, and read back for their gradients; a row of a table for each, from the cache."""
    packings = [Packing.uniform(*shape) for shape in ((2, 40), (8, 60), (8, 100))]
    named = dict(zip(("context_packing", "target_packing", "packing"), packings, strict=True))
    context = torch.zeros(80, 384, dtype=torch.bfloat16, requires_grad=backward)
    token, pos = torch.zeros(2, 384, dtype=torch.bfloat16, requires_grad=backward), torch.zeros(64, 384).bfloat16()
    ids = torch.arange(40).repeat(2), torch.arange(60).repeat(8)
    out = jk.assemble_tokens(context, token, *ids, pos, **named, backend="triton")
    if not backward:
        return (3 * 800 * 384) * 2 + 800 * 8
    TRAFFIC.clear()
    torch.autograd.grad(out, [context, token], torch.ones_like(out))
    parts = 800 // 128 + 2  # sums of 128 rows, in fp32, written and read
    return (800 + 80) * 384 * 2 + 2 * parts * 384 * 4


NORM = (torch.ones(1408, dtype=torch.bfloat16), torch.zeros(1408, dtype=torch.bfloat16), 1e-6)
# Name, a small call that returns its floor in bytes, launches, the floor of the published size in bytes, the bytes over
# the floor's that it may touch, and the modelled time in microseconds that it must stay under on an H200. What a
# backward gather counts above its floor are searches in the ids: 2 KB an image, read from the nearest cache.
CASES = [
    ("adamw_ema-vit_h14", lambda: adamw(False), 1, 632e6 * 36, 1.04, 5300),
    ("adamw_ema-vit_h14-shadows", lambda: adamw(True), 1, 632e6 * 40, 1.04, 5890),
    ("assemble_tokens-vjepa2", lambda: assembled(False), 1, 48 * (1480 + 508) * 384 * 2, 1.04, 22),
    ("assemble_tokens-vjepa2-backward", lambda: assembled(True), 2, 48 * (1480 + 508) * 384 * 2, 1.04, 24),
    ("collapse_stats-vjepa2_g-bf16", lambda: spread(torch.bfloat16), 3, 24 * 1470 * 1408 * 2, 2.4, 62),
    ("collapse_stats-vjepa2_g-fp32", lambda: spread(torch.float32), 3, 24 * 1470 * 1408 * 4, 2.3, 112),
    ("distance_weights-vjepa21", weights, 1, 24 * 1024 * (12 + 16 * 8), 1.04, 4),
    ("ema_update-vit_h14", lambda: ema(False), 1, 632e6 * 12, 1.04, 1770),
    ("ema_update-vit_h14-shadow", lambda: ema(True), 1, 632e6 * 14, 1.04, 2065),
    ("gather_tokens-vit_h14-forward", lambda: gather(False), 1, 14208 * 1280 * 4, 1.04, 20),
    ("gather_tokens-vit_h14-backward", lambda: gather(True), 2, (14208 + 32768) * 1280 * 2, 1.04, 34),
    ("grad_norm-vit_h14-fp32", lambda: norm(torch.float32), 2, 632e6 * 4, 1.04, 595),
    ("grad_norm-vit_h14-bf16", lambda: norm(torch.bfloat16), 2, 632e6 * 2, 1.04, 300),
    ("latent_loss-vit_h14-bf16", lambda: loss(torch.bfloat16, 1280), 2, 21504 * 1280 * 6, 1.04, 45),
    ("latent_loss-vit_h14-fp32", lambda: loss(torch.float32, 1280), 2, 21504 * 1280 * 12, 1.04, 85),
    ("latent_loss-vit_g-bf16", lambda: loss(torch.bfloat16, 1408), 2, 23328 * 1408 * 6, 1.04, 53),
    ("latent_loss-vjepa2_g-norm", lambda: loss(torch.bfloat16, 1408, norm=NORM), 2, 23328 * 1408 * 6, 1.04, 53),
    ("latent_loss-vjepa21-levels", lambda: loss(torch.bfloat16, 6656, levels=4), 2, 12 * 1470 * 6656 * 6, 1.04, 175),
    ("rope-vjepa2_g-n2048-forward", lambda: rope("forward"), 1, 2 * 2 * 2 * 24 * 22 * 2048 * 64, 1.04, 170),
    ("rope-vjepa2_g-n2048-backward", lambda: rope("backward"), 1, 2 * 2 * 2 * 24 * 22 * 2048 * 64, 1.04, 170),
]


@pytest.mark.parametrize("name, call, launches, full, most, limit", CASES, ids=[c[0] for c in CASES])
def test_bytes_touched_stay_near_the_floor(name, call, launches, full, most, limit, record_property):
    TRAFFIC.clear()
    floor = call()
    ratio = TRAFFIC.total() / floor
    modelled = (full * ratio / BANDWIDTH + launches * LAUNCH_S) * 1e6
    record_property("bytes_over_floor", round(ratio, 4))
    record_property("modelled_us", round(modelled, 1))
    print(f"{name}: {ratio:.3f} of the floor's bytes, {modelled:.0f} us modelled")
    assert 1.0 <= ratio < most and modelled < limit


def one_mask():
    """Every target that is named is read once, as the formula says; masks that share targets find them in the cache."""
    pred = torch.randn(24, 1280).bfloat16().requires_grad_()
    ids = torch.arange(12).expand(2, 12).reshape(-1)
    jk.latent_loss(pred, torch.randn(2, 16, 1280).bfloat16(), ids, packing=Packing.uniform(2, 12), backend="triton")


def attend():
    jk.masked_attention(
        *(torch.randn(256, 1, 80).bfloat16() for _ in range(3)), Packing.uniform(1, 256), backend="triton"
    )


class Watched(TorchDispatchMode):
    """Lets every call through; ops of long lists then go through the dispatcher, where they are noted."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


# Not those that read a row of a small table for each token, from the cache.
FROM_MEMORY = ("adamw", "assemble_tokens-vjepa2-backward", "distance", "ema", "gather", "grad_norm", "rope")
STATED = [(c[0], c[1]) for c in CASES if c[0].startswith(FROM_MEMORY)]
STATED += [("latent_loss", one_mask), ("masked_attention", attend)]


@pytest.mark.parametrize("name, call", STATED, ids=[c[0] for c in STATED])
def test_ops_state_the_bytes_that_kernels_touch(name, call):
    """`cost.py`, which profiles take: within 5 % of what is counted."""
    notes = Notes()
    notes.begin()
    TRAFFIC.clear()
    WORK.clear()
    try:
        with Watched():
            call()
    finally:
        notes.end()
    stage = "backward" if name.endswith("backward") else "forward"
    stated = total(note.cost() for note in notes if note.stage == stage)
    assert stated.bytes == pytest.approx(TRAFFIC.total(), rel=0.05)
    if name == "masked_attention":
        assert stated.flops == pytest.approx(2 * WORK["multiply_adds"], rel=0.05)


CONTEXTS = (42, 66, 84, 96, 101, 111, 117, 123, 128, 132, 156, 176)  # of I-JEPA: patches kept, 111 in the mean
# Name, lengths of a sample, D, sequences and heads of the published size, the least useful share of issued products
# forward and backward, and the most bytes over the floor's, forward and backward. What streams reads its keys once for
# 64 or 128 queries, from the L2 cache: its bytes are modelled at the cache's rate.
ATTENTION = [
    ("ijepa_target_n256", (256,), 80, 128, 16, (0.99, 0.71), (1.02, 2.2)),
    ("ijepa_contexts_mean_111", CONTEXTS, 80, 128, 16, (0.7, 0.48), (1.02, 1.35)),
    ("ijepa_predictor_n112", (112, 96, 134), 24, 512, 16, (0.49, 0.3), (1.05, 1.6)),  # tiles of 64: faster, measured
    ("ijepa_l16_n196", (196,), 64, 128, 16, (0.58, 0.4), (1.02, 2.4)),
    ("vjepa2_predictor_n1480", (1480,), 32, 24, 12, (0.9, None), (None, None)),
    ("vjepa2_context_n508", (508,), 64, 24, 22, (0.95, 0.68), (None, None)),
    ("vjepa2_target_n2048", (2048,), 64, 24, 16, (0.99, None), (None, None)),
    ("vjepa2_ac_frames", (8 * 258,), 64, 8, 16, (0.86, None), (None, None)),
]
FRAMES = {"vjepa2_ac_frames": 258}


def pairs_of(n: int, frame_size: int | None) -> int:
    """Of a query and a key that it sees, in a sequence of n."""
    frames = n // (frame_size or n)
    return (n // frames) ** 2 * frames * (frames + 1) // 2


@pytest.mark.parametrize(
    "name, lengths, width, sequences, heads, shares, ratios", ATTENTION, ids=[c[0] for c in ATTENTION]
)
def test_attention_stays_near_its_floors(name, lengths, width, sequences, heads, shares, ratios, record_property):
    """Products and exponentials issued, and bytes, scaled from one head of a sample to the published size."""
    leaves = [torch.randn(sum(lengths), 1, width).bfloat16().requires_grad_() for _ in range(3)]
    frame_size = FRAMES.get(name)
    pairs, tensor = sum(pairs_of(n, frame_size) for n in lengths), 2 * leaves[0].numel()
    scale = sequences / len(lengths) * heads
    for stage, share, ratio, products, tensors in zip(
        ("forward", "backward"), shares, ratios, (2, 5), (4, 8), strict=True
    ):
        TRAFFIC.clear()
        WORK.clear()
        if stage == "forward":
            packing = Packing.from_lengths(lengths)
            out = jk.masked_attention(*leaves, packing, frame_size=frame_size, backend="triton")
        elif share is not None:
            torch.autograd.grad(out, leaves, torch.randn_like(out))
        else:
            continue
        useful = products * pairs * width / WORK["multiply_adds"]
        bytes_over_floor = TRAFFIC.total() / (tensors * tensor)
        floors = [
            scale * tensors * tensor / BANDWIDTH,
            scale * 2 * products * pairs * width / PRODUCTS,
            scale * pairs / EXPONENTIALS,
        ]
        issued = WORK["exp2"] / pairs
        rate = BANDWIDTH if ratio is not None else CACHE
        over = (max(bytes_over_floor * BANDWIDTH / rate, 1.0), 1 / useful, issued)
        modelled = max(f * x for f, x in zip(floors, over, strict=True)) + LAUNCH_S
        record_property(f"{stage}_useful_share", round(useful, 3))
        record_property(f"{stage}_bytes_over_floor", round(bytes_over_floor, 3))
        record_property(f"{stage}_modelled_us", round(modelled * 1e6, 1))
        print(
            f"{name} {stage}: {useful:.2f} of products useful, {bytes_over_floor:.2f} of the floor's bytes, "
            f"{modelled * 1e6:.0f} us modelled, floor {max(floors) * 1e6:.0f} us"
        )
        assert useful >= share
        assert ratio is None or bytes_over_floor <= ratio
        assert stage == "backward" or modelled <= 1.35 * max(floors)


def test_info_nce_stays_near_its_floors(record_property):
    """Products, bytes and exponentials of 512 pairs of 256 channels, forward scaled to 24 000 of 1536.

    Tiles of 128 x 256 fetch embeddings from the L2 cache while products run; so do exponentials.
    """
    leaves = [torch.randn(512, 256).bfloat16().requires_grad_() for _ in range(2)]

    def loss_and_read(pairs: int) -> tuple[torch.Tensor, int]:
        TRAFFIC.clear()
        WORK.clear()
        return jk.info_nce(*(x[:pairs] for x in leaves), 0.07, backend="triton"), TRAFFIC["read"]

    half = loss_and_read(256)[1]
    loss, whole = loss_and_read(512)
    tiles = 2 * (whole - 2 * half)  # what grows with the square of pairs; norms and pairs' own sums do not
    useful, scale = 512 * 512 * 256 / WORK["multiply_adds"], (24_000 / 512) ** 2
    floor, fetched = 2 * 24_000**2 * 1536 / PRODUCTS, scale * tiles * 1536 / 256
    modelled = max(floor / useful, fetched / CACHE, scale * WORK["exp2"] / EXPONENTIALS) + 3 * LAUNCH_S
    record_property("modelled_us", round(modelled * 1e6, 1))
    print(f"info_nce forward: {fetched / 1e9:.1f} GB from the cache, {modelled * 1e6:.0f} us modelled, "
          f"floor {floor * 1e6:.0f} us")  # fmt: skip
    assert useful == 1 and modelled <= 1.5 * floor
    WORK.clear()
    torch.autograd.grad(loss, leaves)
    assert WORK["multiply_adds"] == 3 * 512 * 512 * 256, "S once more, and a product for each side"


# Name, kernel of the convolution, rows and E of the published size, the least useful share of issued products forward
# and for the weight's gradient, and the most modelled microseconds. Products take tiles of 256 x 128 in steps of 64.
EMBED = [
    ("ijepa_vit_h14", (3, 14, 14), 8960, 1280, (0.91, 0.91), (31, 41)),
    ("vjepa2_vit_g_short", (3, 2, 16, 16), 12192, 1408, (0.99, 0.91), (102, 118)),
]


def tiles(n: int, size: int) -> int:
    return -(-n // size)


class Issued(NamedTuple):
    """Multiply-adds; bytes that the product reads, that other kernels read, and that all write on the way."""

    products: int
    read: int
    beside: int
    written: int


def embed_forward(rows: int, embed_dim: int, size: int) -> Issued:
    """A tile reads its rows of the copied patches, filled with zeros up to whole tiles and steps, and of the weight."""
    depth, down, across = 64 * tiles(size, 64), tiles(rows, 256), tiles(embed_dim, 128)
    read = 2 * down * (256 * depth * across + embed_dim * size)
    return Issued(down * across * 256 * 128 * depth, read, 2 * rows * size, 2 * 256 * down * depth)


def embed_backward(rows: int, embed_dim: int, size: int) -> Issued:
    """Of the weight's gradient: its tiles read all rows, a part of them each; sums of parts are written and read."""
    depth, steps, down, across = 64 * tiles(size, 64), 64 * tiles(rows, 64), tiles(embed_dim, 256), tiles(size, 128)
    read = 2 * (rows * embed_dim * across + steps * depth * down)
    sums = 4 * _parts(down * across, rows) * embed_dim * size
    copied = 2 * 256 * tiles(rows, 256) * depth
    return Issued(down * across * 256 * 128 * steps, read, 2 * rows * size + sums, copied + sums)


@pytest.mark.parametrize("name, kernel, rows, embed_dim, shares, limits", EMBED, ids=[c[0] for c in EMBED])
def test_embed_patches_stays_near_its_floors(name, kernel, rows, embed_dim, shares, limits, record_property):
    """What a small call counts is what the code says; that is modelled at the published size.

    Operands of products come from the L2 cache while tensor cores multiply; copies and parts pass through memory.
    """
    size, count = prod(kernel), 8 ** (len(kernel) - 1)
    pixels = torch.zeros(2048 // count, 3, *[8 * n for n in kernel[1:]], dtype=torch.bfloat16)
    weight = torch.zeros(256, *kernel, dtype=torch.bfloat16, requires_grad=True)
    floor = 2 * rows * embed_dim * size / PRODUCTS
    for stage, issued, share, limit in zip(
        ("forward", "backward"), (embed_forward, embed_backward), shares, limits, strict=True
    ):
        TRAFFIC.clear()
        WORK.clear()
        if stage == "forward":
            out = jk.embed_patches(pixels, None, weight, backend="triton")
        else:
            torch.autograd.grad(out, weight, torch.ones_like(out))
        products, read, beside, _ = issued(2048, 256, size)
        assert (WORK["multiply_adds"], TRAFFIC["read"]) == (products, read + beside)
        products, read, beside, written = issued(rows, embed_dim, size)
        useful, launches = rows * embed_dim * size / products, 2 if stage == "forward" else 3
        modelled = max(floor / useful, read / CACHE) + (beside + written) / BANDWIDTH + launches * LAUNCH_S
        record_property(f"{stage}_useful_share", round(useful, 3))
        record_property(f"{stage}_modelled_us", round(modelled * 1e6, 1))
        print(
            f"{name} {stage}: {useful:.2f} of products useful, {read / 1e6:.0f} MB from the cache, "
            f"{(beside + written) / 1e6:.0f} MB through memory, {modelled * 1e6:.0f} us modelled, "
            f"floor {floor * 1e6:.0f} us"
        )
        assert useful >= share and modelled * 1e6 <= limit


def test_sigreg_stays_near_its_floor(record_property):
    """Forward at 4096 x 512 and 1000 slices, scaled from 256 x 128 and 125: three products of halves."""
    rows, width, slices = 4096, 512, 1000
    TRAFFIC.clear()
    WORK.clear()
    jk.sigreg(torch.zeros(256, 128), slices=125, backend="triton")
    useful = 3 * 256 * 128 * 125 / WORK["multiply_adds"]
    floor, scale = 3 * 2 * rows * width * slices / PRODUCTS, rows * width * slices / (256 * 128 * 125)
    modelled = max(floor / useful, scale * TRAFFIC["read"] / CACHE) + 5 * LAUNCH_S
    record_property("useful_share", round(useful, 3))
    record_property("modelled_us", round(modelled * 1e6, 1))
    print(f"sigreg: {useful:.2f} of products useful, {modelled * 1e6:.0f} us modelled, floor {floor * 1e6:.0f} us")
    assert useful >= 0.97 and modelled * 1e6 <= 55


def test_every_op_with_a_triton_kernel_is_counted():
    from jepa_kernels._core.info import kernels

    others = {"embed_patches", "info_nce", "masked_attention", "sigreg"}
    counted = {name.split("-")[0] for name, *_ in CASES} | others
    assert counted == {op for op in OPS if any(k.backend == "triton" for k in kernels(op))}
