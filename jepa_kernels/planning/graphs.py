"""CUDA graphs of an iteration and of a whole plan: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.planning.plan import Plan

T = TypeVar("T")
Step = Callable[[Tensor, Any], tuple[Any, Tensor]]  # (row, state) -> (state, energies [S])


def check_graph(planner: str, graph: bool | PlanGraph, device: torch.device) -> None:
    """No graph is asked for, or there is CUDA to record it."""
    if graph and device.type != "cuda":
        actual = f"{'True' if graph is True else type(graph).__name__} on {device}"
        fail(planner, "graph", "be False where there is no CUDA", actual, "leave it out")


def recorded(function: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """A function as a CUDA graph: what replays it, and its results, which every replay writes anew.

    It must have run before: kernels are compiled then, and libraries have made their workspaces.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def steps(step: Step, rows: Tensor, state: Any, graph: bool) -> tuple[Any, Tensor]:
    """A step for each row: the last state, and all energies [rows, S].

    graph: all but the first replay a CUDA graph of it.
    """
    energies = []
    for n, row in enumerate(rows):
        if graph and n == 1:
            step = recorded_step(step, row, state)
        state, found = step(row, state)
        energies.append(found.clone() if graph else found)
    return state, torch.stack(energies)


def recorded_step(step: Step, row: Tensor, state: Any) -> Step:
    """`step` of a search as a CUDA graph. What it returns is overwritten by the next one."""
    row, state = row.clone(), type(state)(*(x.clone() for x in state))

    def move() -> Tensor:
        after, energies = step(row, state)
        for kept, new in zip(state, after, strict=True):
            kept.copy_(new)
        return energies

    replay, energies = recorded(move)

    def replayed(next_row: Tensor, before: Any) -> tuple[Any, Tensor]:
        row.copy_(next_row)  # before is the state that the last replay left
        replay()
        return state, energies

    return replayed


class PlanGraph:
    """A whole plan as one CUDA graph, kept for the plans that follow: pass the same one as `graph=` every time.

    The first call with it records the plan, all later ones copy their context, goal, mean and noise in and replay:
    no launch of a kernel by itself, no wait. World, cost, space and options must be the same objects or numbers, and
    contexts of the same shapes; what a cost refers to besides is read where it lay, so change it in place.
    It holds the memory of one plan.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], list[Tensor | None], Callable[[], None], Plan] | None = None

    def run(
        self, planner: str, settings: tuple[Any, ...], inputs: list[Tensor | None], search: Callable[..., Plan]
    ) -> Plan:
        """search(*inputs), recorded the first time."""
        settings = (planner, *settings, *((None if x is None else (x.shape, x.dtype, x.device)) for x in inputs))
        if self._kept is None:
            search(*inputs)
            kept = [None if x is None else x.clone() for x in inputs]
            self._kept = (settings, kept, *recorded(lambda: search(*kept)))
        known, kept, replay, plan = self._kept
        if not all(a is b or (not callable(a) and a == b) for a, b in zip(known, settings, strict=True)):
            fail(planner, "graph", "be used with the options it was made for", "others", "take a new PlanGraph")
        for mine, given in zip(kept, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        replay()
        return Plan(*(getattr(plan, field.name).clone() for field in fields(plan)))
