"""I-JEPA's training step on the photos: fused kernels against plain PyTorch, same weights, crops and masks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import Step
from benchmarks.workload import each
from jepa_kernels.data import photo_batch
from jepa_kernels.masks import MaskBatch, MultiBlock2d
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig, vit_huge_14, vit_small


def build(config: IJEPAConfig, **options: Any) -> IJEPA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return IJEPA(config, **options)


def vit_flops(tokens: float, pairs: float, dim: int, depth: int, mlp_ratio: float) -> float:
    """Forward pass of `depth` blocks: qkv, projection and MLP per token, scores and weighted sums per pair."""
    return depth * (2 * tokens * dim * dim * (4 + 2 * mlp_ratio) + 4 * pairs * dim)


def step_flops(config: IJEPAConfig, masks: MaskBatch) -> float:
    """Forward of the target encoder; forward and backward (twice the forward) of context encoder and predictor."""
    c, p = masks.context_lengths, config.predictor_embed_dim
    both = c[None] + masks.target_lengths.reshape(-1, masks.batch)  # sequences [context | target] of the predictor
    patches = (config.crop_size // config.patch_size) ** 2
    embed = 2 * config.in_chans * config.patch_size**2 * config.embed_dim  # of one patch
    encode = partial(vit_flops, dim=config.embed_dim, depth=config.depth, mlp_ratio=config.mlp_ratio)
    target = masks.batch * (patches * embed + encode(patches, patches**2))
    context = 3 * encode(c.sum(), (c**2).sum()) + 2 * c.sum() * embed  # no gradient of pixels
    targets = masks.target_lengths.sum()
    predictor = vit_flops(both.sum(), (both**2).sum(), p, config.predictor_depth - 1, 4.0)
    seen = 2 * both.sum() * p * p * 2 + 4 * ((both - c) * both).sum() * p  # keys, values; scores of targets
    predictor += seen + 2 * targets * p * p * (2 + 2 * 4.0)
    projections = 2 * config.embed_dim * p * (c.sum() + targets)
    return float(target + context + 3 * (predictor + projections))


def noise(batch: int, size: int) -> Tensor:
    """Pixels for machines without the photos."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def workload(
    name: str,
    config: IJEPAConfig,
    batch: int,
    truncate: bool,
    pixels: Callable[[int, int], Tensor] = photo_batch,
    **options: Any,
) -> Step:
    sampler = MultiBlock2d(config.crop_size // config.patch_size, truncate=truncate)
    return Step(
        name,
        model=partial(build, config),
        pixels=partial(pixels, batch, config.crop_size),
        masks=partial(sampler, batch, step=0),
        flops=partial(step_flops, config),
        **options,
    )


def on_gpu(name: str, truncate: bool, **options: Any) -> Step:
    """ViT-H/14 as published, 128 images a step under autocast to bf16."""
    small = workload(name, vit_huge_14(depth=2, predictor_depth=2), 4, truncate, noise, tuned=True)
    given = dict(pixels=noise, dtypes=("bfloat16",), devices=("cuda",), tuned=True, small=small, **options)
    return workload(name, vit_huge_14(), 128, truncate, **given)


SMALL = vit_small(predictor_depth=6)  # the paper's depth below ViT-L

WORKLOADS = (
    workload("vit_small_16_truncated", SMALL, 4, truncate=True, named=("compile",)),
    workload("vit_small_16_packed", SMALL, 4, truncate=False, named=("compile",)),
    on_gpu("vit_h14_b128_truncated", truncate=True, rivals=("reference", "sdpa", "compile")),
    on_gpu("vit_h14_b128_packed", truncate=False, rivals=("sdpa", "compile")),
    workload("smoke_truncated", vit_small(depth=2, predictor_depth=2), 2, truncate=True, smoke=True),
)


@each("ijepa", WORKLOADS)
def test_ijepa(bench_step, op, workload, stage, dtype):
    bench_step(op, workload, stage, dtype)
