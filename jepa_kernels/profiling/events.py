"""Events of torch's profiler in plain numbers, and the line of time that they make: who was at work when.

A slice of time belongs to the innermost named range on the main thread, its part, and to one operation: a kernel of
ours, a product of torch, or the innermost other operation of torch. Where none runs it is the host's: Python,
autograd's bookkeeping, waiting. On a GPU the line is that of its kernels, each with the part and the operation that
launched it, and what lies between them is idle.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

OURS, TORCH, HOST, NOTED = "ours", "torch", "host", "profiling"
OTHER = "outside of parts"
STEP, WINDOW = "jepa_kernels.step", "jepa_kernels.profile"  # ranges of the profiler's own
KERNEL = "jepa_kernels::"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
ATTENTION = "aten::_scaled_dot_product"
# torch's own ranges, as parts.
NAMED = (
    (re.compile(r"Optimizer\.(step|zero_grad)#"), "optimizer"),
    (re.compile(r"enumerate\(DataLoader\)"), "data"),
)
NO_PARTS = re.compile(rf"{re.escape(STEP)}|{re.escape(WINDOW)}|ProfilerStep|## Call|Torch-Compiled|CompiledFunction")
COMPILED = re.compile(r"Torch-Compiled Region|## Call CompiledFxGraph")
OPERATION = re.compile(r"(?!autograd::|torch::autograd::)\w+::\w+$")


@dataclass(frozen=True, eq=False)
class Event:
    """start, end: nanoseconds. id: of a host event, which `linked` of a device's names."""

    name: str
    thread: int
    start: int
    end: int
    range: bool = False
    device: bool = False
    id: int = 0
    linked: int = 0
    shapes: Sequence[Any] = ()
    dtypes: Sequence[str] = ()
    values: Sequence[Any] = ()


class Slice(NamedTuple):
    """owner: the event of the operation; None for the host's."""

    start: int
    end: int
    part: str
    kind: str
    name: str
    owner: Event | None = None


def read(profiler: Any) -> list[Event]:
    """Of a torch.autograd.profiler.profile that has ended."""
    cpu, found = _device("CPU"), []
    for e in profiler.kineto_results.events():
        device = e.device_type() != cpu
        if device and e.is_user_annotation():
            continue  # ranges as the GPU saw them
        start, linked = e.start_ns(), e.linked_correlation_id()
        own = 0 if device or linked else e.correlation_id()  # launches, which link too, number themselves otherwise
        about = () if device else (e.shapes(), e.dtypes(), e.concrete_inputs())
        found.append(
            Event(e.name(), e.start_thread_id(), start, start + e.duration_ns(), e.is_user_annotation(), device,
                  own, linked, *about)
        )  # fmt: skip
    return found


def _device(name: str) -> Any:
    from torch.autograd import DeviceType

    return getattr(DeviceType, name)


def part_of(name: str) -> str:
    """The part that a range stands for."""
    return next((part for pattern, part in NAMED if pattern.match(name)), name)


def is_part(event: Event) -> bool:
    return event.range and not NO_PARTS.match(event.name)


def is_product(event: Event) -> bool:
    return event.name.removeprefix("aten::") in PRODUCTS or event.name.startswith(ATTENTION)


def owner(stack: Sequence[Event]) -> tuple[str, str, Event | None]:
    """(kind, name, event) of what runs inside of these nested events."""
    if stack and stack[-1].name == NOTED:
        return NOTED, NOTED, None
    for event in reversed(stack):
        if event.name.startswith(KERNEL):
            return OURS, event.name.removeprefix(KERNEL), event
    operations = [e for e in stack if not e.range and OPERATION.match(e.name)]
    if operations:
        event = next(filter(is_product, operations), operations[-1])
        return TORCH, event.name.split("::")[-1], event
    compiled = next((e for e in stack if COMPILED.match(e.name)), None)
    return (HOST, HOST, None) if compiled is None else (TORCH, "compiled graph", compiled)


class Line:
    """The time of one thread from `begin` to `end`, in slices without gaps; `owners`: {id of an event: its slice's}."""

    def __init__(self, events: Iterable[Event], begin: int, end: int, part_at: Callable[[int], str] | None = None):
        self.slices: list[Slice] = []
        self.owners: dict[int, Slice] = {}
        self._at, self._stack, self._part_at = begin, [], part_at  # type: ignore[var-annotated]
        for event in sorted(events, key=lambda e: (e.start, -e.end)):
            if event.start >= end or event.end <= begin:
                continue
            while self._stack and self._stack[-1].end <= event.start:
                self._until(self._stack[-1].end)
                self._stack.pop()
            self._until(event.start)
            self._stack.append(event)
            if event.id:
                self.owners[event.id] = self._slice(event.end)
        while self._stack:
            self._until(min(self._stack[-1].end, end))
            self._stack.pop()
        self._until(end)

    def _slice(self, end: int) -> Slice:
        part = next((part_of(e.name) for e in reversed(self._stack) if is_part(e)), None)
        if part is None:
            part = OTHER if self._part_at is None else self._part_at(self._at)
        return Slice(self._at, end, part, *owner(self._stack))

    def _until(self, end: int) -> None:
        if end <= self._at:
            return
        found = self._slice(end)
        last = self.slices[-1] if self.slices else None
        if last is not None and last[2:] == found[2:]:
            self.slices[-1] = last._replace(end=end)
        else:
            self.slices.append(found)
        self._at = end

    def part_at(self, time: int) -> str:
        i = bisect_right(self.slices, time, key=lambda s: s.start) - 1
        return self.slices[max(i, 0)].part if self.slices else OTHER


def marks(events: Sequence[Event]) -> list[int]:
    """When each marked step ended, in order: on a GPU not before the last kernel that was launched until its mark."""
    launched = {e.id: e.start for e in events if e.id}
    kernels = sorted((launched[e.linked], e.end) for e in events if e.device and e.linked in launched)
    ended, i, found = 0, 0, []
    for mark in sorted(e.start for e in events if e.name == STEP):
        while i < len(kernels) and kernels[i][0] < mark:
            ended, i = max(ended, kernels[i][1]), i + 1
        found.append(max(mark, ended))
    return found


def timeline(events: Sequence[Event]) -> tuple[list[Slice], bool]:
    """(slices of the whole profile, whether they are a device's)."""
    window = next(e for e in events if e.name == WINDOW)
    host = [e for e in events if not e.device]
    threads: dict[int, list[Event]] = {}
    for e in host:
        threads.setdefault(e.thread, []).append(e)
    main = Line(threads.pop(window.thread), window.start, window.end)
    backward = [own for own in threads.values() if any(e.name.startswith("autograd::engine") for e in own)]
    others = [Line(own, window.start, window.end, main.part_at) for own in backward]
    kernels = [e for e in events if e.device]
    if kernels:
        owners = {i: s for line in (*others, main) for i, s in line.owners.items()}
        return list(_device_slices(kernels, owners, window)), True
    busy = sorted((s for line in others for s in line.slices if s.kind != HOST), key=lambda s: s.start)
    return list(_filled(main.slices, busy)), False


def _device_slices(kernels: list[Event], owners: dict[int, Slice], window: Event) -> Iterator[Slice]:
    """Kernels in order, of several streams as one; between them nothing runs."""
    at, part = window.start, OTHER
    for k in sorted(kernels, key=lambda e: e.start):
        by = owners.get(k.linked)
        begin, end = max(k.start, at), min(k.end, window.end)
        if end <= begin:
            continue
        part = by.part if by is not None else part
        if begin > at:
            yield Slice(at, begin, part, HOST, "idle")
        known = by is not None and by.owner is not None
        yield Slice(begin, end, part, *(by[3:] if known and by is not None else (TORCH, k.name, k)))
        at = end
    if at < window.end:
        yield Slice(at, window.end, OTHER, HOST, "idle")


def _filled(main: list[Slice], busy: list[Slice]) -> Iterator[Slice]:
    """While the main thread does nothing, what another one does for it."""
    i = 0
    for own in main:
        at = own.start
        while own.kind == HOST and i < len(busy) and busy[i].start < own.end:
            other = busy[i]
            begin, end = max(other.start, at), min(other.end, own.end)
            if end > begin:
                if begin > at:
                    yield own._replace(start=at, end=begin)
                yield other._replace(start=begin, end=end)
                at = end
            if other.end > own.end:
                break
            i += 1
        while i < len(busy) and busy[i].end <= own.end:
            i += 1
        if at < own.end:
            yield own._replace(start=at)
