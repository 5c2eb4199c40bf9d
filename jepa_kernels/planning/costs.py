"""What a plan is judged by: functions of imagined latents [S, H, N, E] and actions [S, H, A] -> [S].

Lower is better. Any function of that form is a cost; these are the usual ones. A sample's energy may depend on that
sample alone: planners may show them in parts. Energies are float32, of float64 latents float64, and differentiable.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kernels._core.check import check_tensor, fail, is_number

Cost = Callable[[Tensor, Tensor], Tensor]
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda x, goal: (x - goal).abs().mean((-2, -1)),
    "l2": lambda x, goal: (x - goal).square().mean((-2, -1)),
    # 1 - cosine, from the unit vectors: near the goal nothing cancels.
    "cosine": lambda x, goal: (F.normalize(x, dim=-1) - F.normalize(goal, dim=-1)).square().sum(-1).mean(-1) / 2,
}


def goal_distance(goal: Tensor, kind: str = "l1", *, frames: str = "last") -> Cost:
    """The distance of imagined frames from the goal [N, E], a frame's latents.

    kind: "l1": mean |z - goal| (V-JEPA 2-AC). "l2": mean (z - goal)^2 (JEPA-WMs, LeWorldModel). "cosine": 1 - the mean
        of the tokens' cosines.
    frames: "last": of the last frame alone; "all": mean over the frames.
    """
    check_tensor("goal_distance", "goal", goal, "N E")
    if kind not in DISTANCES:
        fail("goal_distance", "kind", f"be one of {', '.join(DISTANCES)}", repr(kind), "leave it out for l1")
    if frames not in ("last", "all"):
        fail("goal_distance", "frames", "be last or all", repr(frames), "leave it out for the last frame")
    distance, wide_goal = DISTANCES[kind], _wide(goal)

    def cost(latents: Tensor, actions: Tensor) -> Tensor:
        if latents.shape[-2:] != goal.shape:
            wanted = f"have the shape of an imagined frame, {tuple(latents.shape[-2:])}"
            fail("goal_distance", "goal", wanted, tuple(goal.shape), "encode it with this world")
        judged = latents[:, -1:] if frames == "last" else latents
        return distance(_wide(judged), wide_goal).mean(1)

    return cost


def effort(latents: Tensor, actions: Tensor) -> Tensor:
    """How much is done: the mean over steps of |a|^2, the squared length of the world's action."""
    return _wide(actions).square().sum(-1).mean(-1)


def guardrail(clearance: Callable[[Tensor], Tensor], *, margin: float = 0.0, hard: bool = False) -> Cost:
    """A region to keep out of: latents [S, H, N, E] -> clearance [S, H], how far outside, negative inside.

    The sum over frames of max(0, margin - clearance): nothing outside, the deeper the more inside. hard: infinite for a
    sample with any frame nearer than the margin; it can't be an elite then, though the mean of samples that pass on
    both sides may lead through the middle: return the best one.
    Of one token a frame that is a position: `guardrail(lambda z: (z[:, :, 0] - center).norm(dim=-1) - radius)`.
    """

    def cost(latents: Tensor, actions: Tensor) -> Tensor:
        missing = margin - _wide(clearance(latents))
        if missing.shape != latents.shape[:2]:
            wanted = f"give a number for each frame of a sample, {tuple(latents.shape[:2])}"
            fail("guardrail", "clearance", wanted, tuple(missing.shape), "reduce over tokens and channels")
        if hard:
            missing = missing.masked_fill(missing > 0, math.inf)
        return missing.clamp(min=0).sum(-1)

    return cost


def critic(value: Callable[[Tensor], Tensor]) -> Cost:
    """Minus a learned value of the last frame: latents [S, N, E] -> [S] or [S, 1], higher is better."""

    def cost(latents: Tensor, actions: Tensor) -> Tensor:
        values, samples = value(latents[:, -1]), len(latents)
        if values.shape not in ((samples,), (samples, 1)):
            wanted = f"give one number a sample, ({samples},) or ({samples}, 1)"
            fail("critic", "value", wanted, tuple(values.shape), "reduce over the rest")
        return -_wide(values).flatten()

    return cost


def weighted(*terms: tuple[float, Cost]) -> Cost:
    """The sum of weight * cost: `weighted((1.0, goal_distance(goal)), (0.1, effort))`.

    A cost of weight 0 is not asked: 0 times infinity would be NaN.
    """
    if not terms:
        fail("weighted", "terms", "be one or more (weight, cost)", "none", "pass goal_distance(goal) alone")
    counted = [(weight, term) for weight, term in terms if not is_number(weight) or weight != 0]
    counted = counted or [(0.0, effort)]  # nothing, with a gradient

    def cost(latents: Tensor, actions: Tensor) -> Tensor:
        first, *others = (weight * term(latents, actions) for weight, term in counted)
        return sum(others, first)

    return cost


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
