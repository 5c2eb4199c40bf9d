"""What a run compiles at its first steps, and the memory that its steps share, made ready before."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from jepa_kernels._core import extension, triton
from jepa_kernels._core.check import fail, usable_device
from jepa_kernels.configs import Config, read
from jepa_kernels.masks import MaskBatch
from jepa_kernels.packing import Packing
from jepa_kernels.training.feed import Feed
from jepa_kernels.training.ranks import Ranks
from jepa_kernels.training.trainer import Trainer

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did; str() of it says so.

    steps: the run's steps that were taken, in order. seconds: of each. again: of the last one, taken once more.
    shapes: how many shapes the run's first steps have; None: they have no masks, or lengths that compile nothing.
    kernels: names of Triton kernels that were compiled, and loaded: they lay in its cache on disk. graphs: of
    torch.compile. blocks: bytes of memory that wait for outputs of CPU kernels (see `empty_cache`).
    """

    device: str
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    again: float
    shapes: int | None
    kernels: tuple[str, ...]
    loaded: tuple[str, ...]
    graphs: int
    blocks: int

    def __str__(self) -> str:
        each = f", one for each of {self.shapes} shapes" if self.shapes else ""
        lines = [
            f"warmup on {self.device}: {len(self.steps)} steps{each}, {sum(self.seconds):.1f} s",
            f"  a step takes {self.again:.3g} s from now on; the first one took {self.seconds[0]:.3g} s",
            f"  Triton: {self._triton()}",
            f"  torch.compile: {self.graphs} graphs" if self.graphs else "  torch.compile: not asked for",
        ]
        if torch.device(self.device).type == "cpu":
            lines.append(f"  CPU kernels were compiled with the package; {self.blocks / 1e6:.0f} MB wait for outputs")
        return "\n".join(lines)

    def _triton(self) -> str:
        if triton.interpreting():
            return "its interpreter compiles nothing"
        if not self.kernels and not self.loaded:
            return "nothing to compile"
        return f"{len(self.kernels)} kernels compiled, {len(self.loaded)} loaded from its cache"


def warmup(
    config: Config | str, *, device: torch.device | str | None = None, world: int = 1, steps: int = 100
) -> Warmup:
    """Compile what a training run will need before its step 1, by steps on networks that are thrown away.

    config: of the run: a Config, a shipped name, or a YAML file. device: None: the GPU where there is one.
    world: processes that share the run's batches, each of which calls this on its own device. Shards of FSDP2 and
        buckets of DDP are not made: they compile nothing.
    steps: of so many first steps of the run the shapes are found. With buckets each shape has a step; else lengths
        compile nothing anew, and the steps with the fewest and the most tokens are taken, so that one of the largest
        has been in memory too.

    Triton's kernels and the graphs of torch.compile (`parallel.compile`) stay in this process and in their caches on
    disk; on a CPU there are no kernels to compile, and the memory that outputs take in turn is there. The run itself
    is as without: random states are put back. Call it before the run's own networks are in memory.
    Raises ValueError for a config or a device that is not there.
    """
    config = read(config) if isinstance(config, str) else config
    if steps < 1:
        fail("warmup", "steps", "be at least 1", steps, "leave it out for 100")
    named = device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = usable_device("warmup", "device", str(named))
    feed = Feed(config, Ranks(world=world))
    chosen, shapes = _chosen(feed, min(steps, len(feed)))
    graphs, seconds = _graphs(), []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), compiling() as kernels:
        trainer = Trainer(config, device)
        for step in [*chosen, chosen[-1]]:
            parts, started = feed[step], time.perf_counter()
            trainer.advance(parts)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    del trainer
    gc.collect()  # a network and its hooks hold one another
    if device.type == "cuda":
        torch.cuda.empty_cache()
    compiled, loaded = (tuple(name for name, hit in kernels if hit == wanted) for wanted in (False, True))
    took, new = tuple(seconds[:-1]), _graphs() - graphs
    return Warmup(str(device), tuple(chosen), took, seconds[-1], shapes, compiled, loaded, new, _waiting())


def _chosen(feed: Feed, steps: int) -> tuple[list[int], int | None]:
    """The steps to take, and how many shapes they are of, where shapes are what is compiled for."""
    if feed.masks is None:
        return [0], None
    drawn = [feed.given(step) for step in range(steps)]
    if all(m.packed and not m.bucket for masks in drawn for m in masks):
        tokens = [sum(len(m.context_ids) + len(m.target_ids) for m in masks) for masks in drawn]
        return sorted({tokens.index(min(tokens)), tokens.index(max(tokens))}), None
    first: dict[Shape, int] = {}
    for step, masks in enumerate(drawn):
        for shape in map(_shape, masks):
            first.setdefault(shape, step)
    return sorted(set(first.values())), len(first)


def _shape(masks: MaskBatch) -> Shape:
    """What compiled code may depend on."""
    if not masks.packed:
        return masks.context_ids.shape, masks.target_ids.shape
    on_host: Any = masks.to("cpu")
    packings: list[Packing] = [on_host.context_packing, on_host.target_packing, on_host.pairs.packing]
    return tuple((p.tokens, p.max_seqlen) for p in packings)


@contextmanager
def compiling() -> Iterator[list[tuple[str, bool]]]:
    """The Triton kernels that are compiled meanwhile: (name, whether it lay in the cache on disk)."""
    found: list[tuple[str, bool]] = []
    if triton.reason("cuda") is not None or triton.interpreting():
        yield found
        return
    from triton import knobs

    before = knobs.compilation.listener

    def listen(**what: Any) -> None:
        found.append((what["src"].name, what["cache_hit"]))
        if before is not None:
            before(**what)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def _graphs() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


def _waiting() -> int:
    module = extension.load()
    return 0 if isinstance(module, str) else module.block_bytes()["waiting"]
