"""V-JEPA 2's masked encoder: both masks of every clip in one packed pass, against the published loop over masks."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.encoding import Encoding
from benchmarks.ops.bench_rope import published
from benchmarks.workload import each
from jepa_kernels import patch_positions
from jepa_kernels.masks import MultiBlock3d
from jepa_kernels.nn import Attention, Encoder
from jepa_kernels.training.flops import blocks

FRAMES, SIDE, PATCH, TUBELET = 16, 256, 16, 2
GRID = (FRAMES // TUBELET, SIDE // PATCH, SIDE // PATCH)
WIDTH, DEPTH, HEADS = 384, 12, 6  # ViT-S: a whole encoder in a second on two cores


def build(depth: int) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(SIDE, PATCH, WIDTH, depth, HEADS, tubelet_size=TUBELET, rope="tiled")


def clips(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, FRAMES, SIDE, SIDE, generator=generator)


def loop(encoder: Encoder, pixels: Tensor, masks: list[Tensor]) -> tuple[Tensor, ...]:
    """As the published code runs it: for each mask every patch is embedded, most are dropped, and queries and keys
    are turned by many small operations before SDPA."""
    return tuple(encode(encoder, pixels, ids) for ids in masks)


def encode(encoder: Encoder, pixels: Tensor, ids: Tensor) -> Tensor:
    proj = encoder.patch_embed.proj
    x = F.conv3d(pixels, proj.weight, proj.bias, stride=proj.stride).flatten(2).transpose(1, 2)
    x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))
    positions = patch_positions(ids, GRID)
    for block in encoder.blocks:
        x = x + attend(block.attn, block.norm1(x), positions)
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)


def attend(attention: Attention, x: Tensor, positions: Tensor) -> Tensor:
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(published(q, positions), published(k, positions), v)
    return attention.proj(out.transpose(1, 2).flatten(2))


def flops(depth: int, lengths: Any) -> float:
    """Forward, and a backward of twice as many but for the pixels."""
    embed = 2 * lengths.sum() * 3 * TUBELET * PATCH**2 * WIDTH
    return float(2 * embed + 3 * blocks(lengths.sum(), (lengths**2).sum(), WIDTH, depth, 4.0))


def workload(name: str, batch: int, depth: int, **options: Any) -> Encoding:
    return Encoding(
        name,
        model=partial(build, depth),
        shallow=partial(build, 1),
        pixels=partial(clips, batch),
        packed=partial(MultiBlock3d(GRID), batch, step=0),
        truncated=partial(MultiBlock3d(GRID, truncate=True), batch, step=0),
        masks=2,
        loop=loop,
        flops=partial(flops, depth),
        **options,
    )


WORKLOADS = (
    workload("vjepa2_vit_s_two_masks_per_token", batch=2, depth=DEPTH),
    workload("smoke_two_masks_per_token", batch=2, depth=1, smoke=True),
)


@each("encoder", WORKLOADS)
def test_encoder(bench_encoding, op, workload, stage, dtype):
    bench_encoding(op, workload, stage, dtype)
