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
from jepa_kernels.training.flops import jepa_step


def build(config: IJEPAConfig, **options: Any) -> IJEPA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return IJEPA(config, **options)


def step_flops(config: IJEPAConfig, masks: MaskBatch) -> float:
    side = config.crop_size // config.patch_size
    return jepa_step(config, (side, side), masks).flops


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
