"""Who acts: chance, or a planner that looks at frames, or one that looks at the simulator's own state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.models.world import Context, World
from jepa_kernels.planning import ActionSpace, cem, costs
from jepa_kernels.pusht.goals import Task, distance
from jepa_kernels.pusht.simulator import ACTION_DIM, Simulator


@dataclass(frozen=True)
class Search:
    """How each plan is searched, by the cross-entropy method; see planning.cem."""

    horizon: int = 6
    samples: int = 128
    iterations: int = 3
    elites: int = 12
    std: float = 0.7
    history: int = 3  # frames that the world is shown, the current one among them
    take: int = 1  # actions of a plan that are taken before the next one
    frames: str = "all"  # imagined ones that count: all, or last, with which a block that has arrived is pushed on


class Policy(Protocol):
    """Acts in one episode after another."""

    def begin(self, task: Task, seed: int) -> None:
        """Forget the last episode; `seed` is all that chance depends on."""

    def act(self, simulator: Simulator) -> np.ndarray:
        """The next action [2]."""

    invalid: int  # samples of this episode's plans whose energy was NaN


class Random:
    """Uniform actions."""

    invalid = 0

    def begin(self, task: Task, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def act(self, simulator: Simulator) -> np.ndarray:
        return self.rng.uniform(-1, 1, ACTION_DIM)


class Planned:
    """Looks, plans, takes the first actions, and plans again; each plan starts from the rest of the last one.

    look: what the world knows of the simulator, latents [N, E]. cost: of a task. search: see Search.
    """

    def __init__(
        self, world: World, look: Callable[[Simulator], Tensor], cost: Callable[[Task], costs.Cost], search: Search
    ) -> None:
        self.world, self.look, self.cost, self.search = world, look, cost, search

    def begin(self, task: Task, seed: int) -> None:
        self.seed, self.goal_cost, self.invalid = seed, self.cost(task), 0
        self.latents: list[Tensor] = []
        self.actions: list[Tensor] = []
        self.mean: Tensor | None = None
        self.coming: list[Tensor] = []

    def act(self, simulator: Simulator) -> np.ndarray:
        self.latents.append(self.look(simulator))
        if not self.coming:
            self.coming = self._plan()
        self.actions.append(self.coming.pop(0))
        return self.actions[-1].double().numpy()

    def _plan(self) -> list[Tensor]:
        s, taken = self.search, len(self.actions)
        seen, between = self.latents[-s.history :], self.actions[max(0, taken - s.history + 1) :]
        plan = cem(
            self.world,
            Context(torch.stack(seen), torch.stack(between) if between else None),
            cost=self.goal_cost,
            horizon=s.horizon,
            samples=s.samples,
            iterations=s.iterations,
            elites=s.elites,
            space=ActionSpace(std=s.std, limit=1.0),
            include_mean=True,
            mean=self.mean,
            seed=self.seed + taken,
        )
        self.mean = plan.shifted(s.take)
        self.invalid += int(plan.invalid.sum())
        return list(plan.actions[: s.take])


class TrueWorld:
    """The simulator as a world model: its latents are states, float64 [.., 1, 10]. No model can imagine better."""

    action_dim = ACTION_DIM

    def __init__(self, frame_skip: int) -> None:
        self.simulator = Simulator(1, frame_skip)

    def imagine(self, context: Context, samples: int, horizon: int) -> Callable[[Tensor], Tensor]:
        """Actions [S, horizon, 2] -> states [S, horizon, 1, 10], from the context's last state on."""
        state = context.latents[-1, 0].numpy()
        return lambda actions: torch.from_numpy(self.simulator.rollout(state, actions.numpy()))[:, :, None]

    def encode(self, frames: Tensor) -> NoReturn:
        fail("TrueWorld", "frames", "be states", "pictures", "call Simulator.state", NotImplementedError)

    def unroll(self, context: Context, actions: Tensor) -> NoReturn:
        fail("TrueWorld", "unroll", "have gradients", "a simulator without", "use imagine", NotImplementedError)


def goal_frame(simulator: Simulator, task: Task) -> np.ndarray:
    """What the goal looks like, uint8 [3, size, size]; moves the simulator there."""
    simulator.set(task.goal)
    return simulator.frame()


def encoded(world: World, frames: np.ndarray) -> Tensor:
    """Latents [T, N, E] of frames uint8 [T, 3, H, W]."""
    return world.encode(torch.from_numpy(frames))


def energy(world: World, goal: np.ndarray, frames: str = "last") -> costs.Cost:
    """What a planner with this world minimises: the squared distance of latents from those of the goal's frame."""
    return costs.goal_distance(encoded(world, goal[None])[0], "l2", frames=frames)


def planned(world: World, size: int, frame_skip: int, search: Search) -> Planned:
    """The planner with a world model: sees frames of `size` pixels a side, and a picture of the goal."""
    elsewhere = Simulator(size, frame_skip)
    return Planned(
        world,
        lambda simulator: encoded(world, simulator.frame()[None])[0],
        lambda task: energy(world, goal_frame(elsewhere, task), search.frames),
        search,
    )


def ceiling(frame_skip: int, search: Search) -> Planned:
    """The planner on the simulator's own state and distance, with fewer samples: physics are slow."""

    def cost(task: Task) -> costs.Cost:
        return lambda states, actions: torch.from_numpy(distance(states[:, :, 0].numpy(), task.goal).total).mean(1)

    return Planned(TrueWorld(frame_skip), lambda simulator: torch.from_numpy(simulator.state())[None], cost, search)


def policies(names: list[str], world: World, size: int, frame_skip: int, search: Search) -> dict[str, Policy]:
    """Those of POLICIES asked for, by name, in the order of POLICIES."""
    make: dict[str, Callable[[], Policy]] = {
        "random": Random,
        "greedy": lambda: planned(world, size, frame_skip, replace(search, horizon=1, take=1)),
        "cem": lambda: planned(world, size, frame_skip, search),
        "simulator": lambda: ceiling(frame_skip, CEILING),
    }
    return {name: make[name]() for name in POLICIES if name in names}


POLICIES = {
    "random": "random actions",
    "greedy": "one step ahead, world model",
    "cem": "CEM, world model",
    "simulator": "CEM, true state (ceiling)",
}
CEILING = Search(horizon=6, samples=32, iterations=2, elites=4, history=1)
