"""A profile's line of time in numbers: by part, by operation, against the floor, and in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jepa_kernels.cost import Cost
from jepa_kernels.profiling import peaks, products
from jepa_kernels.profiling.events import HOST, NOTED, OTHER, OURS, STEP, Event, Slice, marks, timeline
from jepa_kernels.profiling.notes import Note

LONGEST = 3  # gaps that are told in words
ORDER = (
    "data",
    "target",
    "context",
    "predictor",
    "projector",
    "loss",
    "backward",
    "optimizer",
    "optimizer + EMA",
    "EMA",
)


@dataclass
class Part:
    """Seconds of a step: in operations of ours and of torch, in none, and in noting calls for this profile."""

    name: str
    ours: float = 0.0
    torch: float = 0.0
    host: float = 0.0
    profiling: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ours + self.torch + self.host + self.profiling


@dataclass
class Op:
    """What one operation does in a step, all its calls together. floor: the least seconds that they take here."""

    kind: str
    name: str
    backend: str
    dtype: str
    backward: bool
    calls: float = 0.0
    seconds: float = 0.0
    bytes: float | None = None
    flops: float | None = None
    floor: float | None = None
    roofs: dict[str, float] = field(default_factory=dict)  # {unit: seconds of the floor that it sets}

    @property
    def label(self) -> str:
        """`masked_attention backward`."""
        for stage in ("forward", "backward", "moments", "turns"):
            if self.kind == OURS and self.name.endswith(f"_{stage}"):
                return f"{self.name.removesuffix(f'_{stage}')} {stage}"
        return f"{self.name} in backward" if self.backward else self.name

    @property
    def bound(self) -> str | None:
        """GB/s or GFLOP/s: the roof that most of the floor is of."""
        return max(self.roofs, key=lambda unit: self.roofs[unit]) if self.roofs else None

    def rate(self, what: float | None) -> float | None:
        """Billions a second."""
        return what / self.seconds / 1e9 if what is not None and self.seconds else None

    def share(self) -> float | None:
        """Of what this machine was seen to do at best."""
        return self.floor / self.seconds if self.floor is not None and self.seconds else None


@dataclass
class Gap:
    """A stretch in which no operation ran."""

    part: str
    after: str
    before: str
    seconds: float


@dataclass
class Summary:
    """Everything that a report shows. Numbers are those of one step: means over the steps."""

    steps: int
    seconds: float
    device: str
    parts: list[Part]
    ops: list[Op]
    gaps: list[Gap]
    words: list[str]
    peaks: dict[str, Any]

    @property
    def accounted(self) -> float:
        """The share of a step that lies in a named part or in an operation."""
        outside = sum(p.host for p in self.parts if p.name == OTHER)
        return 1 - outside / self.seconds if self.seconds else 0.0

    @property
    def in_operations(self) -> float:
        """The share of a step in which an operation of ours or of torch runs."""
        return sum(p.ours + p.torch for p in self.parts) / self.seconds if self.seconds else 0.0

    def plain(self) -> dict[str, Any]:
        """Of numbers, names and lists alone."""
        parts = [{**asdict(p), "seconds": p.seconds, "share": p.seconds / self.seconds} for p in self.parts]
        ops = [
            {
                **asdict(o),
                "label": o.label,
                "bound": o.bound,
                "gb_per_s": o.rate(o.bytes),
                "gflop_per_s": o.rate(o.flops),
                "share_of_peak": o.share(),
            }
            for o in self.ops
        ]
        known = dict(accounted=self.accounted, in_operations=self.in_operations, parts=parts, ops=ops)
        return {**asdict(self), **known}


def summarise(
    events: Sequence[Event], notes: Sequence[Note], roofs: Callable[[str], dict[str, Any]]
) -> tuple[Summary, list[Slice]]:
    """The numbers, and the slices that they are of. roofs: a device -> its peaks."""
    costs = noted(events, notes)
    slices, on_device = timeline([*events, *_delays(costs)])
    steps = steps_of(events)
    slices = _named_optimizer(_cut(slices, events), notes)
    device = "cuda" if on_device else "cpu"
    measured = roofs(device)
    seconds = sum(s.end - s.start for s in slices) / steps / 1e9
    found = Summary(steps, seconds, device, _parts(slices, steps), _ops(slices, costs, steps, measured),
                    _gaps(slices, steps), [], measured)  # fmt: skip
    found.words = words(found)
    return found, slices


def steps_of(events: Sequence[Event]) -> int:
    """As many as were marked; else as the optimizer that stepped most often did; at least one."""
    marked = sum(e.name == STEP for e in events)
    if marked:
        return marked
    counts: dict[str, int] = defaultdict(int)
    for e in events:
        if e.name.startswith("Optimizer.step#"):
            counts[e.name] += 1
    return max(counts.values(), default=1)


def noted(events: Sequence[Event], notes: Sequence[Note]) -> dict[Event, Note]:
    """What each call of a kernel was noted with: the calls of one name come in the same order in both."""
    waiting: dict[str, list[Note]] = defaultdict(list)
    for note in reversed(notes):
        waiting[note.event].append(note)
    calls = sorted((e for e in events if not e.device and waiting.get(e.name)), key=lambda e: e.start)
    return {e: waiting[e.name].pop() for e in calls if waiting[e.name]}


def _delays(costs: dict[Event, Note]) -> list[Event]:
    """What noting took, before each kernel."""
    return [
        Event(NOTED, e.thread, e.start, min(e.start + note.delay_ns, e.end))
        for e, note in costs.items()
        if note.delay_ns < e.end - e.start
    ]


def _cut(slices: list[Slice], events: Sequence[Event]) -> list[Slice]:
    """Up to the last marked step, where steps are marked."""
    ends = marks(events)
    if not ends:
        return slices
    last = ends[-1]
    return [s._replace(end=min(s.end, last)) for s in slices if s.start < last]


def _named_optimizer(slices: list[Slice], notes: Sequence[Note]) -> list[Slice]:
    """A step of AdamWEMA that moves targets is the moving average too."""
    if not any(note.op == "adamw_ema" and any(t.shape != (0,) for t in note.args[5]) for note in notes):
        return slices
    return [s._replace(part="optimizer + EMA") if s.part == "optimizer" else s for s in slices]


def _parts(slices: Sequence[Slice], steps: int) -> list[Part]:
    found: dict[str, Part] = {}
    for s in slices:
        part = found.setdefault(s.part, Part(s.part))
        setattr(part, s.kind, getattr(part, s.kind) + (s.end - s.start) / steps / 1e9)
    known = [found.pop(name) for name in ORDER if name in found]
    outside = [found.pop(OTHER)] if OTHER in found else []
    return [*known, *sorted(found.values(), key=lambda p: -p.seconds), *outside]


def _ops(slices: Sequence[Slice], notes: dict[Event, Note], steps: int, roofs: dict[str, Any]) -> list[Op]:
    found: dict[tuple[Any, ...], Op] = {}
    counted: set[Event] = set()
    for s in slices:
        if s.kind in (HOST, NOTED) or s.owner is None:
            continue
        note = notes.get(s.owner)
        dtype = products.dtype(s.owner) if note is None else note.dtype
        key = s.kind, s.name, note.backend if note else "torch", dtype, s.part == "backward"
        op = found.setdefault(key, Op(*key))
        op.seconds += (s.end - s.start) / steps / 1e9
        if s.owner not in counted:
            counted.add(s.owner)
            op.calls += 1 / steps
            cost = products.cost(s.owner) if note is None else note.cost()
            if cost is not None:
                _add(op, cost, dtype, steps, roofs)
    return sorted(found.values(), key=lambda op: -op.seconds)


def _add(op: Op, cost: Cost, dtype: str, steps: int, roofs: dict[str, Any]) -> None:
    least = peaks.floor(cost, dtype, roofs)
    op.bytes, op.flops = (op.bytes or 0.0) + cost.bytes / steps, (op.flops or 0.0) + cost.flops / steps
    op.floor = (op.floor or 0.0) + least.seconds / steps
    op.roofs[least.of] = op.roofs.get(least.of, 0.0) + least.seconds / steps


def _gaps(slices: Sequence[Slice], steps: int) -> list[Gap]:
    """The longest stretches without an operation, of all steps."""
    found, busy, started, last = [], "the start", 0, "the start"
    waiting: Slice | None = None
    for s in [*slices, None]:
        if s is not None and s.kind in (HOST, NOTED):
            if waiting is None:
                waiting, started, last = s, s.start, busy
            elif s.end - s.start > waiting.end - waiting.start:
                waiting = s  # the part in which most of it lies
            continue
        if waiting is not None:
            end = slices[-1].end if s is None else s.start
            found.append(Gap(waiting.part, last, "the end" if s is None else s.name, (end - started) / 1e9))
            waiting = None
        busy = busy if s is None else s.name
    return sorted(found, key=lambda gap: -gap.seconds)[:LONGEST]


def words(found: Summary) -> list[str]:
    """The operations that lose most to their floors, each in a sentence, and what the host loses, and where."""
    above = [(op.seconds - op.floor, op) for op in found.ops if op.floor is not None and op.seconds > op.floor]
    said = [_lost(gap, op, found) for gap, op in sorted(above, key=lambda pair: -pair[0])[:LONGEST]]
    idle = sum(p.host for p in found.parts)
    if idle and found.gaps:
        most = max(found.parts, key=lambda p: p.host)
        said.append(
            f"no operation runs for {duration(idle)}, {percent(idle / found.seconds)} of the step, "
            f"{duration(most.host)} of it {most.name if most.name == OTHER else f'in {most.name}'}"
        )
    if found.gaps:
        waits = "; ".join(f"{duration(g.seconds)} after {g.after}, before {g.before} ({g.part})" for g in found.gaps)
        said.append(f"the longest waits for an operation: {waits}")
    return said


def _lost(gap: float, op: Op, found: Summary) -> str:
    memory = max(found.peaks[name] for name in peaks.BANDWIDTHS)
    if op.bound == "GB/s":
        roof = f"memory at {memory:.3g} GB/s"
    else:
        least = Cost(0.0, 1.0)
        roof = f"arithmetic at {peaks.floor(least, op.dtype, found.peaks).rate:.3g} GFLOP/s"
    times = f" in {op.calls:.3g} calls" if op.calls > 1 else ""
    return (
        f"{op.label} takes {duration(op.seconds)}{times}, its floor is {duration(op.floor)} ({roof}): "
        f"{duration(gap)}, {percent(gap / found.seconds)} of the step"
    )


def duration(seconds: float | None) -> str:
    """Three digits and the unit that suits them."""
    if seconds is None:
        return "-"
    for factor, unit in ((1e-6, "us"), (1e-3, "ms"), (1.0, "s")):
        if seconds < 999.5 * factor or unit == "s":
            break
    return f"{seconds / factor:.3g} {unit}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


__all__ = ["Gap", "Op", "Part", "Summary", "duration", "percent", "summarise"]
