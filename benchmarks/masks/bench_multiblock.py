"""Mask samplers at the published batches, against the published collators: Python loops over images."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.host import Host
from benchmarks.rival_forms.collators import Collator2d, Collator3d, PhiloxDraws, Rows, TorchDraws, seeded
from benchmarks.workload import each
from jepa_kernels.masks import LONG_RANGE, SHORT_RANGE, MaskBatch, MultiBlock2d, MultiBlock3d

STATE = torch.Generator().manual_seed(1).get_state()
IMAGE, VIDEO = (16, 16), (8, 16, 16)  # 224 pixels in patches of 14; 16 frames of 256 pixels in tubelets of 2 x 16 x 16
SPECS = (SHORT_RANGE, LONG_RANGE)
Drawn = list[tuple[Rows, Rows]]  # one for each kind of mask


def plain(drawn: MaskBatch | Drawn) -> tuple[list[list[int]], ...]:
    """Contexts and targets as lists, whoever drew them."""
    if not isinstance(drawn, MaskBatch):
        return tuple([row.tolist() for part in side for row in part] for side in zip(*drawn, strict=True))
    pairs = ((drawn.context_ids, drawn.context_lengths), (drawn.target_ids, drawn.target_lengths))
    return tuple([row.tolist() for row in np.split(i.reshape(-1), np.cumsum(n)[:-1])] for i, n in pairs)


def generator() -> torch.Generator:
    made = torch.Generator()
    made.set_state(STATE)
    return made


def published_2d(batch: int) -> Drawn:
    return [Collator2d(IMAGE)(batch, seeded(0), TorchDraws(generator()))]


def published_3d(batch: int) -> Drawn:
    places = TorchDraws(generator())
    return [Collator3d(VIDEO, **vars(spec))(batch, seeded(0), places) for spec in SPECS]


def packed_2d(batch: int) -> Drawn:
    draws = PhiloxDraws(0, 0)
    return [Collator2d(IMAGE, edge=1, truncate=False)(batch, draws, draws)]


def packed_3d(batch: int) -> Drawn:
    streams = [PhiloxDraws(0, 0, stream) for stream in range(len(SPECS))]
    specs = zip(SPECS, streams, strict=True)
    return [Collator3d(VIDEO, **vars(spec), truncate=False)(batch, draws, draws) for spec, draws in specs]


def workloads(
    name: str, batch: int, sampler: type, grid: tuple[int, ...], published: Callable[[int], Drawn],
    packed: Callable[[int], Drawn],
) -> tuple[Host, Host]:  # fmt: skip
    """As published, bit for bit; and packed, against the collator whose place it takes."""
    rivals = {"published": partial(published, batch)}

    def workload(name: str, ours: Callable[[], MaskBatch], expected: Callable[[int], Drawn]) -> Host:
        masks = ours()
        written = masks.context_ids.nbytes + masks.target_ids.nbytes
        return Host(name, ours, partial(expected, batch), plain, rivals, written)

    upstream, default = sampler(grid, upstream=True), sampler(grid)
    return (
        workload(name, lambda: upstream(batch, step=0, generator=generator()), published),
        workload(f"{name}_packed", lambda: default(batch, step=0), packed),
    )


WORKLOADS = (
    *workloads("multiblock2d_b128", 128, MultiBlock2d, IMAGE, published_2d, packed_2d),
    *workloads("multiblock3d_b24", 24, MultiBlock3d, VIDEO, published_3d, packed_3d),
)


@each("masks", WORKLOADS)
def test_masks(bench_host, op, workload, stage, dtype):
    bench_host(op, workload, stage, dtype)
