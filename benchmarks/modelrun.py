"""What runs of models share: parity first, then our calls and the rivals' in turns, then rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.measure import OURS, Interrupted, Settings, share_of_fma
from benchmarks.memory import peaks_and_seconds
from benchmarks.rows import Row, failed, finished, stated, timed_row


class ModelRun:
    """One (model, workload, stage, dtype). A subclass says what is checked, timed and counted."""

    kind = "model"
    rivals: Sequence[str] = ()
    fewest = 3  # rounds

    def __init__(self, name: str, workload: Any, stage: str, dtype: str, settings: Settings):
        self.name, self.workload, self.stage, self.dtype, self.settings = name, workload, stage, dtype, settings
        self.group = f"{name}/{workload.name}/{stage}/{dtype}"

    def parity(self) -> dict[str, Any]:
        """Ours within the error budget of plain PyTorch."""
        raise NotImplementedError

    def rival_error(self) -> str | None:
        """Why the rivals' time would mean nothing: they compute something else."""
        return None

    def functions(self) -> dict[str, Callable[[], object]]:
        """Ours and the rivals: the calls that are timed."""
        raise NotImplementedError

    def counted(self) -> dict[str, Any]:
        """What the rows say of the work, `flops` among it."""
        return {}

    def tokens_of_call(self, name: str) -> float:
        """What a row's times and FLOPs are divided by, where calls of the sides do other amounts of work."""
        return 1

    def common(self, parity: dict[str, Any]) -> Row:
        return stated(self.kind, self, parity, **self.counted())

    def rows(self, drive: Callable[..., object] = timing.loop) -> list[Row]:
        """Measure. A red parity, or a rival that computes something else, times nothing."""
        s, common = self.settings, self.common(self.parity())
        error = self.rival_error() if common["parity"]["pass"] else "parity: outside the error budget"
        if error:
            return [finished(failed(common, name, error), s) for name in self.rivals]
        functions = self.functions()
        memory, once = peaks_and_seconds(functions, s.device)
        rounds, clock = (self.fewest, 50), timing.Clock(s.device)
        times = timing.interleave(
            functions, budget_s=4 * s.budget_s, rounds=rounds, clock=clock, drive=drive, once=once
        )
        found = [self.row(common, name, times, memory) for name in functions if name != OURS]
        if times.interrupted:
            raise Interrupted(found)
        return found

    def row(self, common: Row, name: str, times: timing.Times, memory: dict[str, int]) -> Row:
        ours, theirs = (times.of(n) / self.tokens_of_call(n) for n in (OURS, name))
        row = timed_row(common, name, ours, theirs, times.interrupted)
        row |= {"peak_bytes": memory.get(OURS), "baseline_peak_bytes": memory.get(name)}
        if row["ours_us"] is not None:
            row |= self.rates(common, name, times)
        return finished(row, self.settings)

    def rates(self, common: Row, name: str, times: timing.Times) -> dict[str, Any]:
        """What follows from the times."""
        flops = common["flops"]
        seconds = float(np.median(times.of(OURS))) / self.tokens_of_call(OURS)
        return {} if flops is None else {"share_of_peak": share_of_fma(self.settings, flops / seconds)}
