"""Published settings of planners, as arguments of `cem`: `cem(world, context, goal, **PUBLISHED["vjepa2_ac"])`.

| name | source | cost |
|---|---|---|
| vjepa2_ac | defaults of `WorldModel` (github.com/facebookresearch/vjepa2, notebooks) | L1 of the last frame |
| vjepa2_ac_notebook | its notebook's call, with shorter steps and longer memory of std | the same |
| vjepa2_ac_cem | defaults of its `cem` | the same |
| jepa_wm_droid | JEPA-WMs (arXiv:2512.24497), DROID and RoboCasa; 3 or 1 actions taken | L2 of the last frame |
| jepa_wm_metaworld | the same, MetaWorld; 3 taken | the same |
| jepa_wm_pusht | the same, PushT, Maze and Wall; 6 taken | the same |
| lewm | LeWorldModel (arXiv:2603.19312); the horizon is yours | L2 of the last frame |
| eb_jepa | EB-JEPA's planning example (github.com/facebookresearch/eb_jepa) | summed over frames |

L1 of the last frame is the cost of a goal given alone; the others: `cost=costs.goal_distance(goal, "l2")`, and for the
last one `frames="all"` besides, a mean in place of the sum. V-JEPA 2's two further options are
`fixed({axis: value})`, and `fixed({-1: 1.0}, first_step=k)` for its `close_gripper=k`, in the space's `constrain`.

Which frames the world model sees is its own matter: of JEPA-WMs' rows the last two, numbered from 0 anew, which is the
`window` of `vjepa2_ac.vj2ac_droid` and `jepa_wm_droid`; of lewm's the last three, its config's `history`; of V-JEPA
2's all so far.
"""

from typing import Any

from jepa_kernels.planning.space import ActionSpace, Numbers, clip_norm, dead_zone, without_rotation


def _droid(longest: float) -> ActionSpace:
    """Translations of at most `longest` metres along each axis, no rotation, and the gripper."""
    limit = (longest, longest, longest, 0.75)
    grip = dead_zone(-1, 0.25)
    return ActionSpace((*limit[:3], 1.0), limit, to_world=without_rotation, finish=grip)


def _counts(horizon: int, samples: int, iterations: int, elites: int) -> dict[str, int]:
    return dict(horizon=horizon, samples=samples, iterations=iterations, elites=elites)


def _momenta(mean: Numbers, std: Numbers) -> dict[str, Any]:
    return dict(momentum_mean=mean, momentum_std=std, sampling="steps")


def _gripper_apart(momentum: float) -> Numbers:
    return (momentum, momentum, momentum, 0.15)


_JEPA_WM_DROID = ActionSpace(0.1, (*[0.1] * 6, 0.75))

PUBLISHED: dict[str, dict[str, Any]] = {
    "vjepa2_ac": {**_counts(2, 400, 10, 10), **_momenta(0.15, 0.15), "space": _droid(0.05)},
    "vjepa2_ac_notebook": {**_counts(2, 25, 2, 10), **_momenta(0.15, _gripper_apart(0.75)), "space": _droid(0.075)},
    "vjepa2_ac_cem": {
        **_counts(1, 100, 100, 10),
        **_momenta(_gripper_apart(0.25), _gripper_apart(0.95)),
        "space": _droid(0.05),
    },
    "jepa_wm_droid": {**_counts(3, 300, 15, 10), "include_mean": True, "space": _JEPA_WM_DROID},
    "jepa_wm_metaworld": {**_counts(6, 300, 15, 10), "include_mean": True},
    "jepa_wm_pusht": {**_counts(6, 300, 30, 10), "include_mean": True},
    "lewm": dict(samples=300, iterations=30, elites=30, include_mean=True),
    "eb_jepa": {**_counts(90, 200, 20, 20), "space": ActionSpace(constrain=(clip_norm((slice(None), 2.45)),))},
}
