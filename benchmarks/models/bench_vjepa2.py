"""V-JEPA 2's training step, both published masks of every clip: fused kernels against the published form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.published_vjepa2 import Published
from benchmarks.step import Step
from benchmarks.workload import each
from jepa_kernels.masks import MaskBatch, MultiBlock3d
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config, vit_large
from jepa_kernels.training.flops import jepa_step
from jepa_kernels.video import clip_batch


def build(config: VJEPA2Config, kind: type[VJEPA2] = VJEPA2, **options: Any) -> VJEPA2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config, **options)


def grid_of(config: VJEPA2Config) -> tuple[int, int, int]:
    side = config.crop_size // config.patch_size
    return config.num_frames // config.tubelet_size, side, side


def real(config: VJEPA2Config, batch: int) -> Tensor:
    return clip_batch(batch, config.num_frames, config.crop_size)


def noise(config: VJEPA2Config, batch: int) -> Tensor:
    """Pixels for machines without the videos."""
    shape = batch, config.in_chans, config.num_frames, config.crop_size, config.crop_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def step_flops(config: VJEPA2Config, masks: MaskBatch) -> float:
    return jepa_step(config, grid_of(config), masks).flops


def workload(
    name: str,
    config: VJEPA2Config,
    batch: int,
    *,
    packed: bool = False,
    pixels: Callable[[VJEPA2Config, int], Tensor] = noise,
    **options: Any,
) -> Step:
    """packed: every patch that is drawn, per token; else masks cut to rectangles, per step."""
    truncated = partial(MultiBlock3d(grid_of(config), truncate=True), batch, step=0)
    kept = partial(MultiBlock3d(grid_of(config)), batch, step=0)
    return Step(
        name,
        model=partial(build, config),
        pixels=partial(pixels, config, batch),
        masks=kept if packed else truncated,
        flops=partial(step_flops, config),
        published=partial(build, config, Published),
        cut=truncated if packed else None,
        **{"rivals": ("published",), **options},
    )


# Published training has one mask token with a gradient, as all masks share the first.
ONE_TOKEN = {"num_mask_tokens": 1}
SMALL = vit_large(crop_size=96, num_frames=4, embed_dim=128, num_heads=2, depth=2, predictor_depth=2, **ONE_TOKEN)
# Half as many frames and a sixth of the layers, encoder and predictor in their proportion: seconds instead of minutes.
WIDE = vit_large(num_frames=8, depth=4, predictor_depth=2, **ONE_TOKEN)


def on_cpu(name: str, **options: Any) -> Step:
    """ViT-L's width, a few of its layers."""
    return workload(name, WIDE, 2, pixels=real, small=workload(name, SMALL, 2, **options), **options)


def on_gpu(name: str, packed: bool, rivals: tuple[str, ...]) -> Step:
    """ViT-L as published, 24 clips a step under autocast to bf16."""
    small = workload(name, SMALL, 4, packed=packed, tuned=True)
    given = dict(dtypes=("bfloat16",), devices=("cuda",), tuned=True, small=small, rivals=rivals)
    return workload(name, vit_large(**ONE_TOKEN), 24, packed=packed, **given)


WORKLOADS = (
    on_cpu("vit_l_4_layers_truncated", rivals=("reference",), named=("published",)),
    on_cpu("vit_l_4_layers_packed_per_token", packed=True, rivals=("reference", "published")),
    on_gpu("vit_l_b24_truncated", packed=False, rivals=("published", "reference", "compile")),
    on_gpu("vit_l_b24_packed_per_token", packed=True, rivals=("published", "compile")),
    workload("smoke_truncated", SMALL, 2, smoke=True),
)


@each("vjepa2", WORKLOADS)
def test_vjepa2(bench_step, op, workload, stage, dtype):
    bench_step(op, workload, stage, dtype)
