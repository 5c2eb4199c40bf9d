"""Host code into rows: results equal to the last bit first, then time. For what runs in data-loader workers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks import timing
from benchmarks.measure import OURS, Interrupted, Settings
from benchmarks.rows import Row, failed, key, repro, timed_row

Call = Callable[[], Any]


@dataclass(frozen=True)
class Host:
    """One call of a function of the host.

    name      as in the row, e.g. "multiblock2d_b128"
    ours      the call that is timed
    expected  what `ours` must return, stated another way
    plain     plain(result) -> what of a result is compared, with ==
    rivals    {name: call that does the same work}
    bytes     that a call has to write
    """

    name: str
    ours: Call
    expected: Call
    plain: Callable[[Any], Any]
    rivals: dict[str, Call]
    bytes: float
    smoke: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("forward",)
    dtypes: ClassVar[tuple[str, ...]] = ("int64",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)


class HostRun:
    """One (name, workload)."""

    def __init__(self, name: str, workload: Host, stage: str, dtype: str, settings: Settings):
        self.name, self.workload, self.stage, self.dtype, self.settings = name, workload, stage, dtype, settings
        self.group = f"{name}/{workload.name}/{stage}/{dtype}"

    def common(self) -> Row:
        w = self.workload
        equal = w.plain(w.ours()) == w.plain(w.expected())
        return {
            "kind": "host",
            "name": self.name,
            "workload": w.name,
            "pass": self.stage,
            "dtype": self.dtype,
            "device": "cpu",
            "backend": "cpu",
            "parity": {"pass": equal, "max_err": 0.0 if equal else None, "budget": 0.0, "tensor": "result"},
            "bytes": w.bytes,
            "flops": None,
            "threads": self.settings.threads,
            **dict.fromkeys(("share_of_peak", "peak_bytes")),
        }

    def rows(self, drive: Callable[..., object] = timing.loop) -> list[Row]:
        """Measure. A red parity fails every row and times nothing."""
        s, common = self.settings, self.common()
        rivals = {n: f for n, f in self.workload.rivals.items() if s.baseline in (None, n)}
        if not common["parity"]["pass"]:
            return self.finish([failed(common, n, "parity: not equal") for n in rivals])
        calls = {OURS: self.workload.ours, **rivals}
        times = timing.interleave(calls, budget_s=s.budget_s, rounds=(s.min_rounds, 300), drive=drive)
        found = self.finish([timed_row(common, n, times.of(OURS), times.of(n), times.interrupted) for n in rivals])
        if times.interrupted:
            raise Interrupted(found)
        return found

    def finish(self, found: list[Row]) -> list[Row]:
        return [{**row, "repro": repro(key(row), "cpu", self.settings.threads)} for row in found]
