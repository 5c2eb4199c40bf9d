"""Interleaved timing: every function takes its turn in every round, so that drift of the machine hits all alike."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jepa_kernels.profiling.clock import Clock, Function

SHORTEST_SAMPLE_S = 2e-4  # faster calls are repeated within one sample
FEWEST_ROUNDS, OVERRUN = 3, 3.0


@dataclass
class Times:
    """Seconds per call of every function, one value a round."""

    seconds: dict[str, list[float]]
    interrupted: bool = False
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()))

    def of(self, name: str) -> np.ndarray:
        """The complete rounds of one function."""
        return np.array(self.seconds[name][: self.rounds])


def loop(target: Function, setup: Function, rounds: int) -> None:
    """Plain driver of the rounds; pytest-benchmark's pedantic mode is the other one."""
    for _ in range(rounds):
        setup()
        target()


def interleave(
    functions: dict[str, Function],
    *,
    budget_s: float = 2.0,
    rounds: tuple[int, int] = (7, 200),
    clock: Callable[[Function, int], float] | None = None,
    drive: Callable[[Function, Function, int], object] = loop,
    once: dict[str, float] | None = None,
) -> Times:
    """Time all functions in turn. The first one is ours; the others go before it, in an order that rotates.

    As many rounds as fit into the budget, within `rounds`; but where the least of them would take OVERRUN times the
    budget, on a slow or busy machine, fewer. Ctrl-C ends it early: the rounds so far are returned, marked interrupted.
    once: about the seconds of a call of each, where they have run already; else each is called until warm.
    """
    clock = clock or Clock()
    ours, *others = functions
    times = Times({name: [] for name in functions})
    try:
        once = once or {name: _warm(function, clock) for name, function in functions.items()}
        times.calls = {name: max(1, round(SHORTEST_SAMPLE_S / max(s, 1e-9))) for name, s in once.items()}
        per_round = sum(once[name] * times.calls[name] for name in functions)
        least = min(rounds[0], max(FEWEST_ROUNDS, OVERRUN * budget_s / per_round))
        count = int(min(max(budget_s / per_round, least), rounds[1]))
        turn = iter(range(count + 1))

        def sample(name: str) -> None:
            times.seconds[name].append(clock(functions[name], times.calls[name]))

        def setup() -> None:
            start = next(turn) % max(len(others), 1)
            for name in others[start:] + others[:start]:
                sample(name)

        gc.collect()
        gc.disable()
        drive(lambda: sample(ours), setup, count)
    except KeyboardInterrupt:
        times.interrupted = True
    finally:
        gc.enable()
    return times


def _warm(function: Function, clock: Callable[[Function, int], float]) -> float:
    """Compile, fill caches, and estimate one call."""
    first = clock(function, 1)
    return min(clock(function, 1) for _ in range(1 if first > 1 else 2))
