"""Planning: the actions whose imagined future costs least. `cem`, `mppi`, `gradient`, and what they are told.

plan = jk.planning.cem(world, context, goal, horizon=3, samples=300, iterations=15, elites=10)
plan.actions  # [3, A]
"""

from jepa_kernels.planning import costs
from jepa_kernels.planning.cem import cem
from jepa_kernels.planning.gradient import gradient
from jepa_kernels.planning.graphs import PlanGraph
from jepa_kernels.planning.mppi import mppi
from jepa_kernels.planning.plan import Plan
from jepa_kernels.planning.published import PUBLISHED
from jepa_kernels.planning.space import ActionSpace, clip_norm, dead_zone, fixed, without_rotation

__all__ = [
    "PUBLISHED",
    "ActionSpace",
    "Plan",
    "PlanGraph",
    "cem",
    "clip_norm",
    "costs",
    "dead_zone",
    "fixed",
    "gradient",
    "mppi",
    "without_rotation",
]
