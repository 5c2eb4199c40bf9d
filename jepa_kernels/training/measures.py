"""What a row of metrics.jsonl tells of a step beyond its loss: rates, shares, waits, the target encoder's distance.

tokens_per_s: tokens of the context encoder and the predictor (`flops.Work`), of all ranks. images_per_s, clips_per_s:
the batch. Both per step_s, the seconds from when the loop asked for the batch to the end of the step, of which it
waited data_wait_s for the batch; a GPU works on while the loop asks: there step_s tells how often steps are queued.
share_of_peak: the formulas' FLOPs of the step (`flops`), of all ranks, per second, over `peak_flops` of all ranks.
ema_distance: |target - online| / |online| over the trained weights, every logging.every steps.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import jepa_kernels as jk

SIDES = {"cpu": 768}  # of the product that shows the peak, a square one
SIDE = 8192
ROUNDS = 5
CHUNK = 2**26  # weights whose differences are held at a time
BOARD = "tensorboard"  # the folder of event files, and the package that reads them


class Step(NamedTuple):
    """What is known of a step on the host, and numbers of it by name, on the device: means over ranks."""

    row: dict[str, Any]
    names: Sequence[str]
    numbers: Tensor

    def measured(self) -> dict[str, float]:
        """The numbers, on the host: this waits for them."""
        return dict(zip(self.names, self.numbers.tolist(), strict=True))


class Meter:
    """Rows of the log out of the steps of a loop, without a wait for the step that has just been queued:

        for batch in meter.timed(feed):
            for row in meter.rows(step(batch)): ...
        for row in meter.rest(): ...

    On the CPU `rows` gives the step's own row; from a GPU numbers are copied to page-locked memory behind the step, and
    read in the next one, which gives the row of the step before.

    count: inputs of a step, of all ranks, called `inputs`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None, world: int, inputs: str, count: int) -> None:
        self.peak = world * peak_flops(device, dtype or torch.float32)
        self.world, self.inputs, self.count, self._later = world, inputs, count, device.type == "cuda"
        self._asked = self._came = time.perf_counter()
        self._under_way: list[tuple[Step, Any]] = []  # at most one

    def timed(self, feed: Iterable[Any]) -> Iterator[Any]:
        """The batches of `feed`; what the loop did with one, all of it, is no part of the next one's time."""
        batches = iter(feed)
        while True:
            self._asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._came = time.perf_counter()
            yield batch

    def rows(self, step: Step) -> list[dict[str, Any]]:
        """The rows whose numbers are there, after this step."""
        ready = []
        if self._later:
            copy = step.numbers.to("cpu", non_blocking=True)  # page-locked
            arrived = torch.cuda.Event()
            arrived.record()
            ready, self._under_way = self.rest(), [(step._replace(numbers=copy), arrived)]
        step.row["data_wait_s"], step.row["step_s"] = self._came - self._asked, time.perf_counter() - self._asked
        return ready if self._later else [self._finished(step)]

    def rest(self) -> list[dict[str, Any]]:
        """Those still under way, waited for."""
        ready, self._under_way = self._under_way, []
        for _, arrived in ready:
            arrived.synchronize()
        return [self._finished(step) for step, _ in ready]

    def _finished(self, step: Step) -> dict[str, Any]:
        found = step.measured()
        tokens, flops = (self.world * found.pop(name) for name in ("tokens", "flops"))
        if "online" in found:
            found["ema_distance"] = (found.pop("moved") / max(found.pop("online"), 1e-30)) ** 0.5
        at, *schedule = step.row.items()
        seconds = step.row["step_s"]
        rates = {"tokens_per_s": tokens, f"{self.inputs}_per_s": self.count, "share_of_peak": flops / self.peak}
        return dict([at]) | found | dict(schedule) | {name: value / seconds for name, value in rates.items()}


@lru_cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square matrix products, in about a second at most where one is quick; nothing
    random is drawn from the global state."""
    side = SIDES.get(device.type, SIDE)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) <= ROUNDS and sum(seconds) < 1:
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def ema_squares(pairs: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """{"moved": the sum of squares of target - online, "online": of online}, {online weight: its target}; fp32 [].

    Of this rank's parts where they are DTensors: the ratio of the means over ranks is that of the whole, be they
    sharded or replicated.
    """
    online, targets = ([getattr(p, "_local_tensor", p) for p in side] for side in (pairs, pairs.values()))
    total = torch.zeros(2, device=online[0].device)
    for some in _chunks([p.numel() for p in online]):
        own = online[some]
        sums = jk.grad_norm(torch._foreach_sub(targets[some], own)), jk.grad_norm(own)
        total += torch.stack(sums).square()
    return {"moved": total[0], "online": total[1]}


def _chunks(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of tensors that together have at most CHUNK elements, or one each."""
    first, held = 0, 0
    for i, size in enumerate(sizes):
        if held and held + size > CHUNK:
            yield slice(first, i)
            first, held = i, 0
        held += size
    yield slice(first, len(sizes))


@contextmanager
def board(out: Path, step: int) -> Iterator[Any]:
    """What writes a row into TensorBoard's event files in OUT/tensorboard; without the package it writes nothing.

    step: finished before; what files of an interrupted run tell of later ones is purged.
    """
    if importlib.util.find_spec(BOARD) is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    def show(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, row["step"])

    with SummaryWriter(str(out / BOARD), purge_step=step + 1) as writer:
        yield show
