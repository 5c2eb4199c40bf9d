"""LeJEPA's training step: all views in one packed pass and fused SIGReg, against an eager recipe."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.crops import Crops
from benchmarks.models.published_lejepa import Published
from benchmarks.workload import each
from jepa_kernels.models.lejepa import LeJEPA, ViTConfig, digits, vit_small
from jepa_kernels.training.flops import lejepa_step

GLOBAL, LOCAL = 2, 6


def build(config: ViTConfig, kind: type[LeJEPA] = LeJEPA) -> LeJEPA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind.of(config)


def noise(config: ViTConfig, local: int, batch: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    sides = ((GLOBAL, config.crop_size), (LOCAL, local))
    large, small = (torch.randint(0, 256, (batch, n, 3, s, s), generator=g, dtype=torch.uint8) for n, s in sides)
    return large, small


def patches(config: ViTConfig, local: int) -> list[tuple[int, int]]:
    """(views, patches of each) for both sizes."""
    return [(n, (s // config.patch_size) ** 2) for n, s in ((GLOBAL, config.crop_size), (LOCAL, local))]


def workload(name: str, config: ViTConfig, local: int, batch: int, **options: Any) -> Crops:
    return Crops(
        name,
        model=partial(build, config),
        recipe=partial(build, config, Published),
        views=partial(noise, config, local, batch),
        tokens=batch * sum(n * p for n, p in patches(config, local)),
        flops=lejepa_step(config, [(batch * GLOBAL, config.crop_size), (batch * LOCAL, local)]).flops,
        **options,
    )


TINY = vit_small(crop_size=64, embed_dim=192, num_heads=3, proj_hidden=512)
SMALL = vit_small(crop_size=32, embed_dim=64, num_heads=2, depth=2, proj_hidden=64, proj_dim=16, slices=128)
CHECKED = workload("small", SMALL, 16, 8)

WORKLOADS = (
    workload("vit_tiny_16_64px", replace(TINY, patch_size=16), 32, 32, small=CHECKED),
    workload("vit_tiny_8_64px", TINY, 32, 16, small=CHECKED),  # four times the patches: little but products
    workload("train_digits", digits(), 14, 64, small=CHECKED),  # of `python -m jepa_kernels train lejepa`
    workload("smoke_digits", digits(depth=1, slices=128), 14, 16, small=CHECKED, smoke=True),
)


@each("lejepa", WORKLOADS)
def test_lejepa(bench_crops, op, workload, stage, dtype):
    bench_crops(op, workload, stage, dtype)
