"""The world of gym-pusht with its whole state in view, relative actions, and rollouts without pictures."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import numpy as np

from jepa_kernels._core.check import fail
from jepa_kernels.data import extra

STATE = (
    *("agent_x", "agent_y", "agent_vx", "agent_vy"),  # pixels, pixels / s
    *("block_x", "block_y", "block_angle", "block_vx", "block_vy", "block_spin"),  # the angle in radians, unbounded
)
ACTION_DIM = 2
REACH = 64.0  # pixels that an action of 1 moves the agent's target by
FRAME_SKIP = 5  # of 0.1 s each: by then the agent has come within 4 % of its target, and all but stopped
SIDE = 512  # pixels of the table, whose walls stand 5 from its edge
MARGIN = 20.0  # the agent's targets keep off the edge, so that all of its disc is seen
ASIDE = (50.0, 50.0, 256.0, 256.0, 0.0)  # a state in which nothing touches
GHOST = (144, 238, 144)  # light green
COLLISION_KIND = 0  # of every shape


class Simulator:
    """gym-pusht 0.1 as a function of its state: after `set(s)`, what follows depends on s and the actions alone.

    A step moves the agent's target by REACH x action from where the agent is, keeps it on the table, and holds it for
    `frame_skip` steps of gym-pusht, 0.1 s each. States are float64 [10], in the order of STATE, positions of bodies
    as pymunk tells them: the block's is the middle of its bar's outer edge.

    size: pixels per side of a frame. Needs the extra `plan`.

    Source: PushT of Chi et al. (arXiv:2303.04137), as gym-pusht 0.1.8 builds it.
    """

    def __init__(self, size: int = 64, frame_skip: int = FRAME_SKIP) -> None:
        if size < 1 or frame_skip < 1:
            counts = size, frame_skip
            fail("Simulator", "size and frame_skip", "be at least 1", counts, "pass pixels per side, and steps")
        self.size, self.frame_skip = size, frame_skip
        self._env = _make()
        self._env.reset(seed=0, options={"reset_to_state": ASIDE})
        self._substeps = int(1 / (self._env.dt * self._env.control_hz))

    def set(self, state: np.ndarray) -> None:
        """Put agent and block into `state` exactly, in a new space, which remembers no contact of the last one."""
        if np.shape(state) != (len(STATE),) or not np.isfinite(state).all():
            fail("Simulator", "state", f"hold {len(STATE)} finite numbers", np.shape(state), f"pass {', '.join(STATE)}")
        env = self._env
        env.reset(options={"reset_to_state": ASIDE})
        # Its callback counts contact points for `info` and takes longer than the physics.
        env.space.add_collision_handler(COLLISION_KIND, COLLISION_KIND).post_solve = _ignore
        x, y, vx, vy, block_x, block_y, angle, block_vx, block_vy, spin = (float(v) for v in state)
        env.agent.position, env.agent.velocity = (x, y), (vx, vy)
        env.block.angle = angle  # turns it about its centre of gravity: before the position, which that moves
        env.block.position, env.block.velocity = (block_x, block_y), (block_vx, block_vy)
        env.block.angular_velocity = spin
        env.space.reindex_shapes_for_body(env.agent)
        env.space.reindex_shapes_for_body(env.block)

    def state(self) -> np.ndarray:
        agent, block = self._env.agent, self._env.block
        pose = *block.position, block.angle
        return np.array([*agent.position, *agent.velocity, *pose, *block.velocity, block.angular_velocity])

    def target(self, action: np.ndarray) -> tuple[float, float]:
        """Where an action [2], in -1..1 and cut to it, sends the agent: pixels."""
        x, y = self._env.agent.position
        dx, dy = (REACH * min(1.0, max(-1.0, float(a))) for a in action)
        return _inside(x + dx), _inside(y + dy)

    def step(self, action: np.ndarray) -> None:
        """Act for `frame_skip` steps of gym-pusht: the same floats as its `step`, without reward and picture."""
        env = self._env
        agent, space, dt, k_p, k_v = env.agent, env.space, env.dt, env.k_p, env.k_v
        target_x, target_y = self.target(action)
        (x, y), (vx, vy) = agent.position, agent.velocity
        for _ in range(self.frame_skip * self._substeps):
            vx += (k_p * (target_x - x) + k_v * (0 - vx)) * dt
            vy += (k_p * (target_y - y) + k_v * (0 - vy)) * dt
            agent.velocity = vx, vy
            space.step(dt)
            x, y = agent.position

    def frame(self, ghost: np.ndarray | None = None) -> np.ndarray:
        """What is seen, uint8 [3, size, size]: gym-pusht's own shapes, averaged over the pixels that become one.

        A function of the state: gym-pusht's red marks at contacts, which tell of the step before, are left out, and
        its goal, since goals here are pictures. ghost: a state [10] whose block is drawn beneath, in green.
        """
        pygame = extra("pygame", "plan")
        env, screen = self._env, pygame.Surface((SIDE, SIDE))
        screen.fill((255, 255, 255))
        if ghost is not None:
            body = env.get_goal_pose_body(ghost[4:7])
            for shape in env.block.shapes:
                corners = [tuple(body.local_to_world(corner)) for corner in shape.get_vertices()]
                pygame.draw.polygon(screen, GHOST, corners)
        drawing = extra("gym_pusht.envs.pymunk_override", "plan").DrawOptions(screen)
        drawing.flags = drawing.DRAW_SHAPES
        env.space.debug_draw(drawing)
        picture = pygame.transform.smoothscale(screen, (self.size, self.size))
        return np.ascontiguousarray(pygame.surfarray.array3d(picture).transpose(2, 1, 0))

    def rollout(self, state: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """States after every step of each of `actions` [S, horizon, 2], all from `state`: float64 [S, horizon, 10]."""
        reached = np.empty((*actions.shape[:2], len(STATE)))
        for sequence, row in zip(actions, reached, strict=True):
            self.set(state)
            for i, action in enumerate(sequence):
                self.step(action)
                row[i] = self.state()
        return reached


def _inside(x: float) -> float:
    return min(SIDE - MARGIN, max(MARGIN, x))


CENTRE_OF_GRAVITY = 45.0  # pixels from the middle of the bar's outer edge, towards the foot


def centre(state: np.ndarray) -> np.ndarray:
    """The block's centre of gravity, pixels [.., 2], in states [.., 10]."""
    angle = state[..., 6]
    offset = np.stack([-np.sin(angle), np.cos(angle)], -1)
    return state[..., 4:6] + CENTRE_OF_GRAVITY * offset


def start(rng: np.random.Generator) -> np.ndarray:
    """A state at rest as gym-pusht draws it, the agent clear of the block."""
    while True:
        agent, block, angle = rng.uniform(50, 450, 2), rng.uniform(100, 400, 2), rng.uniform(-math.pi, math.pi)
        state = np.array([*agent, 0.0, 0.0, *block, angle, 0.0, 0.0, 0.0])
        on_table = (np.abs(centre(state) - SIDE / 2) < SIDE / 2 - 90).all()
        if on_table and np.linalg.norm(centre(state) - agent) > 100:
            return state


def _ignore(arbiter: Any, space: Any, data: Any) -> None:
    pass


def _make() -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draws into memory, with no display
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside gymnasium and pygame
        extra("gym_pusht", "plan")
        return extra("gym_pusht.envs.pusht", "plan").PushTEnv(obs_type="state")
