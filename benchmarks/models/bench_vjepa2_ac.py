"""V-JEPA 2-AC's plans: rollouts that keep keys and values, against every prefix predicted anew."""

from functools import partial
from typing import Any

import torch

from benchmarks.planning import Planning
from benchmarks.workload import each
from jepa_kernels.models.vjepa2_ac import WorldModel, WorldModelConfig, vit_giant
from jepa_kernels.training.flops import blocks

# An encoder of one block: plans begin with latents.
SIZES = dict(depth=1, embed_dim=384, num_heads=6, predictor_embed_dim=384, predictor_depth=6, predictor_num_heads=6)
SMALL = WorldModelConfig(crop_size=128, num_frames=8, rope_grid=None, **SIZES)  # 64 patches and two tokens a frame
TINY = WorldModelConfig(crop_size=32, num_frames=8, rope_grid=None, **{**SIZES, "predictor_depth": 2})


def build(config: WorldModelConfig) -> WorldModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WorldModel(config)


def flops(config: WorldModelConfig, w: Planning) -> float:
    """Of our form: every frame of every sample once, the first one's patches embedded once for all."""
    dim, frame, samples = config.predictor_embed_dim, (config.crop_size // config.patch_size) ** 2, w.samples
    tokens, pairs = frame + 2, (frame + 2) ** 2
    predicted = sum(blocks(tokens, (n + 1) * pairs, dim, config.predictor_depth, 4.0) for n in range(w.horizon))
    shared = 2 * (tokens - 1) * dim * 3 * dim  # the first block's product of all tokens but the action's
    projections = 2 * frame * config.embed_dim * dim * (2 * w.horizon - 1)
    return float(w.iterations * samples * (predicted + projections - shared))


def workload(name: str, config: WorldModelConfig, *counts: int, **options: Any) -> Planning:
    return Planning(name, partial(build, config), *counts, partial(flops, config), **options)


CHECKED = workload("checked", TINY, 12, 3, 2)
WORKLOADS = (
    # Behind the last iteration our plan itself is imagined: once in ten as published, and not each time as of one.
    workload(
        "predictor_384_6_layers_64_samples_4_steps_2_iterations",
        *(SMALL, 64, 4, 2),
        rival_iterations=1,
        small=CHECKED,
    ),
    workload(
        "vit_giant_400_samples_2_steps",
        vit_giant(depth=1),
        *(400, 2, 10),
        rivals=("published", "published_autocast"),
        rival_iterations=2,  # of 10: about 34 s in fp32
        dtypes=("bfloat16",),
        devices=("cuda",),
        small=CHECKED,
    ),
    workload("smoke_12_samples_3_steps", TINY, 12, 3, 2, smoke=True),
)


@each("vjepa2_ac", WORKLOADS)
def test_vjepa2_ac(bench_planning, op, workload, stage, dtype):
    bench_planning(op, workload, stage, dtype)
