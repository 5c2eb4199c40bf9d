"""Where an episode begins, where it should end, and how far from there a state is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jepa_kernels._core.check import fail
from jepa_kernels.pusht.episodes import collect
from jepa_kernels.pusht.simulator import FRAME_SKIP, centre

RADIUS = 45.0  # pixels: the block's radius of gyration, so that the arc is what its turn moves it by
AGENT_WEIGHT = 0.1  # what matters is the block
LEAST = 40.0  # pixels that the block's centre lies from the goal's at the start
AWAY = (5, 10)  # actions of the script from start to goal: 25 to 50 steps of gym-pusht
STEPS = 40  # of an episode that starts and goals are taken from


class Distance(NamedTuple):
    """How far states [..] are from a goal: pixels, of the 512 of the table's side.

    total: block + turn + AGENT_WEIGHT * agent. block: between the centres of gravity. turn: the block's, the shorter
    way round, as the arc at RADIUS, at most 141. agent: between the agents' centres. Velocities do not count.
    """

    total: np.ndarray
    block: np.ndarray
    turn: np.ndarray
    agent: np.ndarray


def distance(state: np.ndarray, goal: np.ndarray) -> Distance:
    """The distance of states [.., 10] from a goal [10], in the order of simulator.STATE: float64 [..] each."""
    block = np.linalg.norm(centre(state) - centre(goal), axis=-1)
    turn = RADIUS * np.abs((state[..., 6] - goal[6] + math.pi) % math.tau - math.pi)
    agent = np.linalg.norm(state[..., :2] - goal[:2], axis=-1)
    return Distance(block + turn + AGENT_WEIGHT * agent, block, turn, agent)


@dataclass(frozen=True)
class Task:
    """Get from `start` to `goal`, states [10] that a held-out episode went through, `actions` actions apart."""

    episode: int
    start: np.ndarray
    goal: np.ndarray
    actions: int


def tasks(count: int, *, frame_skip: int = FRAME_SKIP, seed: int = 0) -> list[Task]:
    """`count` tasks, one from each held-out episode that has one, a function of the arguments alone.

    The block's centre has LEAST pixels to go or more. Task i is the same for every count.
    """
    if count < 1:
        fail("tasks", "count", "be at least 1", count, "pass the number of episodes to plan")
    found: list[Task] = []
    episode = 0
    while len(found) < count:  # nearly every one has a task
        states = collect("held_out", episode, steps=STEPS, size=1, frame_skip=frame_skip, seed=seed).states
        found += _task(episode, states, np.random.default_rng([seed, episode]))
        episode += 1
    return found


def _task(number: int, states: np.ndarray, rng: np.random.Generator) -> list[Task]:
    actions = int(rng.integers(AWAY[0], AWAY[1] + 1))
    moved = np.linalg.norm(centre(states[actions:]) - centre(states[:-actions]), axis=-1)
    starts = np.flatnonzero(moved >= LEAST)
    if not len(starts):
        return []
    first = rng.choice(starts)
    return [Task(number, states[first], states[first + actions], actions)]
