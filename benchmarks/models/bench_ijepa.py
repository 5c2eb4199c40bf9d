"""I-JEPA's training step on the photos: fused kernels against plain PyTorch, same weights, crops and masks."""

from functools import partial

import torch

from benchmarks.step import Step
from benchmarks.workload import each
from jepa_kernels.data import photo_batch
from jepa_kernels.masks import MaskBatch, MultiBlock2d
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig, vit_small


def build(config: IJEPAConfig) -> IJEPA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return IJEPA(config)


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


def workload(name: str, config: IJEPAConfig, batch: int, truncate: bool, **options: bool) -> Step:
    sampler = MultiBlock2d(config.crop_size // config.patch_size, truncate=truncate)
    return Step(
        name,
        model=partial(build, config),
        pixels=partial(photo_batch, batch, config.crop_size),
        masks=partial(sampler, batch, step=0),
        flops=partial(step_flops, config),
        **options,
    )


SMALL = vit_small(predictor_depth=6)  # the paper's depth below ViT-L

WORKLOADS = (
    workload("vit_small_16_truncated", SMALL, 4, truncate=True, compile=True),
    workload("vit_small_16_packed", SMALL, 4, truncate=False, compile=True),
    workload("smoke_truncated", vit_small(depth=2, predictor_depth=2), 2, truncate=True, smoke=True),
)


@each("ijepa", WORKLOADS)
def test_ijepa(bench_step, op, workload, stage, dtype):
    bench_step(op, workload, stage, dtype)
