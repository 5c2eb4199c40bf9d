"""The closed loop: an episode acted out, and what all episodes come to."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jepa_kernels.models.world import World
from jepa_kernels.pusht.goals import Task, distance
from jepa_kernels.pusht.policies import Policy, encoded, energy
from jepa_kernels.pusht.simulator import ACTION_DIM, Simulator


@dataclass(frozen=True)
class Trace:
    """
    states: float64 [actions + 1, 10]. actions: float64 [actions, 2].
    energies: float32 [actions + 1], of what was seen. invalid: samples of all plans whose energy was NaN.
    seconds: what the policy took to decide on them all.
    """

    states: np.ndarray
    actions: np.ndarray
    energies: np.ndarray
    invalid: int
    seconds: float


def run(task: Task, policy: Policy, world: World, simulator: Simulator, *, actions: int, seed: int) -> Trace:
    """Let a policy act `actions` times from the task's start; energies are the world model's, whoever acts."""
    policy.begin(task, seed)
    simulator.set(task.start)
    taken, states, frames = np.empty((actions, ACTION_DIM)), [simulator.state()], [simulator.frame()]
    seconds = 0.0
    for i in range(actions):
        began = time.perf_counter()
        taken[i] = policy.act(simulator)
        seconds += time.perf_counter() - began
        simulator.step(taken[i])
        states.append(simulator.state())
        frames.append(simulator.frame())
    simulator.set(task.goal)
    cost = energy(world, simulator.frame())
    seen = encoded(world, np.stack(frames))[:, None]
    energies = cost(seen, torch.empty(0)).numpy()
    return Trace(np.stack(states), taken, energies, policy.invalid, seconds)


def outcome(task: Task, traces: dict[str, Trace]) -> dict[str, Any]:
    """An episode as plan.json tells it: distances in pixels and energies after 0, 1, .. actions, for each policy."""
    rows: dict[str, Any] = {}
    for name, trace in traces.items():
        parts = distance(trace.states, task.goal)._asdict()
        rows[name] = {part: [round(float(x), 3) for x in values] for part, values in parts.items()}
        rows[name] |= {
            "energy": [float(x) for x in trace.energies],
            "invalid_samples": trace.invalid,
            "seconds_per_action": trace.seconds / len(trace.actions),
        }
    return {"held_out_episode": task.episode, "script_actions": task.actions, "policies": rows}


def summary(episodes: list[dict[str, Any]], *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Of each policy: the median distance after the last action, and its ratio to random's median.

    Intervals: bootstrap, 95 %, over episodes; a draw takes the same episodes of every policy. The ratio is None where
    random did not run. invalid_samples: of all plans, those whose energy was NaN.
    """
    ends = {name: np.array([e["policies"][name]["total"][-1] for e in episodes]) for name in episodes[0]["policies"]}
    rows = np.random.default_rng(seed).integers(len(episodes), size=(draws, len(episodes)))
    medians = {name: np.median(values[rows], 1) for name, values in ends.items()}
    result = {}
    for name, values in ends.items():
        ratio = ci = None
        if "random" in ends:
            ratio = float(np.median(values) / np.median(ends["random"]))
            ci = _interval(medians[name] / medians["random"])
        result[name] = {
            "median_distance": float(np.median(values)),
            "ci95": _interval(medians[name]),
            "ratio_to_random": ratio,
            "ratio_ci95": ci,
            "invalid_samples": sum(e["policies"][name]["invalid_samples"] for e in episodes),
        }
    return result


def _interval(values: np.ndarray) -> list[float]:
    return [float(x) for x in np.quantile(values, [0.025, 0.975])]
