"""Poses of a robot's end effector, and how actions move them: on the device, in batch, without a host sync.

A pose is [..., 7]: position x, y, z; orientation as Euler angles in radians; closedness of the gripper in [0, 1].
The angles (a, b, c) turn about the fixed axes x, then y, then z: R = Rz(c) Ry(b) Rx(a), SciPy's `"xyz"`. Everything is
computed in float64 and rounded once to the input's dtype. Differentiable, except where a gripper is clipped.

Source: V-JEPA 2 (arXiv:2506.09985) section 3.1: actions are differences of poses.
"""

import torch
from torch import Tensor

from jepa_kernels._core.check import FLOATING, fail

POSE_DIM = 7
GIMBAL = 1e-7  # radians from a pole: nearer, only the sum or the difference of a and c is known


def next_pose(pose: Tensor, action: Tensor) -> Tensor:
    """The pose [..., 7] after an action [..., 7] = (dx, dy, dz, da, db, dc, dgripper); leading axes broadcast.

        position + d position,   R(da, db, dc) R(a, b, c) as Euler angles,   clip(gripper + dgripper, 0, 1)

    Angles as of `matrix_to_euler`; an action that does not turn leaves them, to rounding, if b lies in [-pi/2, pi/2].
    """
    pose, action, dtype = _pair("next_pose", pose, action, "pose", "action")
    turn, orientation = euler_to_matrix(torch.stack((action, pose))[..., 3:6])
    angles = matrix_to_euler(turn @ orientation)
    moved = pose + action
    return torch.cat((moved[..., :3], angles, moved[..., 6:].clamp(0, 1)), -1).to(dtype)


def pose_difference(start: Tensor, end: Tensor) -> Tensor:
    """The action [..., 7] that leads from the pose `start` to `end`, so that next_pose(start, action) = end.

    end - start of position and gripper; the angles of R(end) R(start)^T. Leading axes broadcast.
    """
    start, end, dtype = _pair("pose_difference", start, end, "start", "end")
    before, after = euler_to_matrix(torch.stack((start, end))[..., 3:6])
    angles = matrix_to_euler(after @ before.mT)
    moved = end - start
    return torch.cat((moved[..., :3], angles, moved[..., 6:]), -1).to(dtype)


def euler_to_matrix(angles: Tensor) -> Tensor:
    """Rotation matrices Rz(c) Ry(b) Rx(a), [..., 3, 3], of angles (a, b, c), [..., 3], in radians."""
    _check_last("euler_to_matrix", "angles", angles, (3,))
    wide = angles.double()
    (sa, sb, sc), (ca, cb, cc) = wide.sin().unbind(-1), wide.cos().unbind(-1)
    cc_sb, sc_sb = cc * sb, sc * sb
    rows = (
        (cc * cb, cc_sb * sa - sc * ca, cc_sb * ca + sc * sa),
        (sc * cb, sc_sb * sa + cc * ca, sc_sb * ca - cc * sa),
        (-sb, cb * sa, cb * ca),
    )
    return torch.stack([entry for row in rows for entry in row], -1).unflatten(-1, (3, 3)).to(angles.dtype)


def matrix_to_euler(matrix: Tensor) -> Tensor:
    """Angles (a, b, c), [..., 3], of rotation matrices [..., 3, 3]: a and c in [-pi, pi], b in [-pi/2, pi/2].

    Where b is within 1e-7 of a pole (gimbal lock), c is 0, as SciPy has it. Near a pole a and c lose as many digits as
    cos(b) has, the rotation that they describe none: a is found after c, from it.
    """
    _check_last("matrix_to_euler", "matrix", matrix, (3, 3))
    m = matrix.double()
    x, y = m[..., 0, 0], m[..., 1, 0]  # cos(b) times the cosine and the sine of c
    cos_b = torch.hypot(x, y)
    locked = cos_b <= GIMBAL
    # At a pole the gradient of atan2 would be NaN: it gets other numbers there.
    c = torch.atan2(y.masked_fill(locked, 0), x.masked_fill(locked, 1))
    b = torch.atan2(-m[..., 2, 0], cos_b.masked_fill(locked, 0))
    sin, cos = c.sin(), c.cos()
    a = torch.atan2(sin * m[..., 0, 2] - cos * m[..., 1, 2], cos * m[..., 1, 1] - sin * m[..., 0, 1])
    return torch.stack((a, b, c), -1).to(matrix.dtype)


def _pair(function: str, first: Tensor, second: Tensor, *names: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both as float64 of one shape, and the dtype of the first."""
    for name, x in zip(names, (first, second), strict=True):
        _check_last(function, name, x, (POSE_DIM,))
    a, b = torch.broadcast_tensors(first.double(), second.double())
    return a, b, first.dtype


def _check_last(function: str, argument: str, x: Tensor, last: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        actual = x.dtype if isinstance(x, Tensor) else type(x).__name__
        fail(function, argument, "be a floating tensor", actual, "convert it with .float()", TypeError)
    if x.shape[-len(last) :] != last:
        wanted = ", ".join(map(str, last))
        fail(function, argument, f"have shape [..., {wanted}]", tuple(x.shape), "reshape it")
