"""`jk.profile`: records what a loop does, with parts and operations named, and reports it."""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import record_function

from jepa_kernels._core.check import fail
from jepa_kernels.about import cores
from jepa_kernels.profiling import peaks
from jepa_kernels.profiling.events import STEP, WINDOW, Event, read
from jepa_kernels.profiling.notes import Notes
from jepa_kernels.profiling.parts import Ranges

if TYPE_CHECKING:
    from jepa_kernels.profiling.report import Report

OP = "profile"


class profile:
    """Record a training loop, its parts and its operations named:

        with jk.profile() as p:
            for batch in batches:
                step(batch)
                p.step()
        print(p.report())  # .table(), .save(folder), .summary

    Parts are the networks, loss and target of a model of ours, the backward pass, optimizers, `nn.EMA` and the waits
    for a DataLoader, in any loop; and whatever the loop names by `torch.profiler.record_function`, the innermost range
    counting. Operations are our kernels, with bytes and FLOPs by each op's formulas, torch's products, by the formulas
    of its flop counter, and torch's others, by time alone.

    model: of ours, or what wraps one; None: it is found when it is first called, by a hook of all modules, which
        compiled code notices: pass it where blocks are compiled.

    An exception in the block passes, and what was recorded until then is reported. One profile at a time: another one
    in it, or inside of torch's own profiler, raises RuntimeError. What the profile itself costs: a microsecond or two
    for each event of torch's profiler, and noting our calls, which is shown and in no operation's time.
    """

    _running = False

    def __init__(self, model: nn.Module | None = None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            fail(OP, "model", "be a module", type(model).__name__, "leave it out: it is found", TypeError)
        self._model, self._notes = model, Notes()
        self._profiler: Any = None
        self._events: list[Event] | None = None
        self._busy: dict[str, Any] = {}

    def __enter__(self) -> profile:
        if self._profiler is not None:
            fail(OP, "a profile", "be entered once", "a second time", "make another with jk.profile()", RuntimeError)
        if profile._running or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            wanted, remedy = "be the only one", "end that one first, or leave this one out"
            fail(OP, "a profile", wanted, "another one, or torch's, around it", remedy, RuntimeError)
        # The engine of torch.profiler, whose own start imports the compiler, for seconds.
        device = "cuda" if torch.cuda.is_available() else None
        profiler = torch.autograd.profiler.profile(use_device=device, record_shapes=True, use_kineto=True)
        with record_function(WINDOW):  # the first range of a process takes half a second
            pass
        with ExitStack() as undo:  # at once, where something of it fails
            undo.enter_context(profiler)
            profile._running = True
            undo.callback(setattr, profile, "_running", False)
            undo.enter_context(Ranges(self._model))
            undo.callback(self._notes.end)
            self._notes.begin()
            undo.enter_context(record_function(WINDOW))
            if device is not None:
                undo.callback(torch.cuda.synchronize)
            self._undo = undo.pop_all()
        self._profiler = profiler
        return self

    def step(self) -> None:
        """Mark the end of a step. Where none is marked, a step of the optimizer is one."""
        with record_function(STEP):
            pass

    def __exit__(self, *_: Any) -> None:
        self._undo.close()
        self._busy = _busy()

    def events(self) -> list[Event]:
        """What torch's profiler saw, in plain numbers."""
        if self._profiler is None or profile._running:
            fail(OP, "report", "come after the block", "no finished profile", "leave `with` first", RuntimeError)
        if self._events is None:
            self._events = read(self._profiler)
        return self._events

    def report(self, **about: Any) -> Report:
        """The report; measures this machine's peaks once a process. about: what to show beside, such as the model."""
        from jepa_kernels.profiling.report import Report

        about = {**self._busy, **about}
        threads = torch.get_num_threads()
        roofs = functools.partial(peaks.of, threads=threads)
        return Report(self.events(), self._notes, roofs, self._profiler.export_chrome_trace, about)


def _busy() -> dict[str, Any]:
    """The machine's load, where it is known and greater than its cores."""
    if not hasattr(os, "getloadavg"):
        return {}
    load, there = os.getloadavg()[0], cores()
    return {"load": load, "cores": there} if load > there else {}
