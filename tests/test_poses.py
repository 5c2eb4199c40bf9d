"""Poses against SciPy's rotations, which the published planner turns them with."""

import math
import re
import warnings

import pytest
import torch

from jepa_kernels.poses import euler_to_matrix, matrix_to_euler, next_pose, pose_difference

Rotation = pytest.importorskip("scipy.spatial.transform").Rotation
HALF = math.pi / 2


def poses(count, seed, tilt=math.pi):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 7, generator=g, dtype=torch.float64) * 2 - 1
    x[:, 3:6] *= torch.tensor([math.pi, tilt, math.pi], dtype=torch.float64)
    x[:, 6] = x[:, 6].abs()
    return x


def moved(pose, action):
    """One pose after another, through SciPy, as published."""
    turned = (
        Rotation.from_euler("xyz", action[:, 3:6]).as_matrix() @ Rotation.from_euler("xyz", pose[:, 3:6]).as_matrix()
    )
    angles = torch.from_numpy(Rotation.from_matrix(turned).as_euler("xyz"))
    gripper = (pose[:, 6:] + action[:, 6:]).clamp(0, 1)
    return torch.cat((pose[:, :3] + action[:, :3], angles, gripper), 1)


def turns(a, b):
    """The distance of angles on the circle: -pi is pi."""
    return torch.remainder(a - b + math.pi, 2 * math.pi).sub(math.pi).abs()


def test_matrices_are_scipys():
    angles = poses(500, 0)[:, 3:6]
    torch.testing.assert_close(
        euler_to_matrix(angles), torch.from_numpy(Rotation.from_euler("xyz", angles).as_matrix()), rtol=0, atol=1e-15
    )


def test_a_quarter_turn_about_z_by_hand():
    pose = torch.tensor([1.0, 2, 3, 0, 0, 0.5, 0.9], dtype=torch.float64)
    action = torch.tensor([0.5, 0, -1, 0, 0, HALF, 0.3], dtype=torch.float64)
    expected = torch.tensor([1.5, 2, 2, 0, 0, 0.5 + HALF, 1], dtype=torch.float64)
    torch.testing.assert_close(next_pose(pose, action), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        euler_to_matrix(action[3:6]),
        torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )


@pytest.mark.parametrize("tilt", [0.3, math.pi], ids=["level", "any"])
def test_next_poses_are_scipys(tilt):
    pose, action = poses(2000, 1, tilt), poses(2000, 2)
    actual, expected = next_pose(pose, action), moved(pose, action)
    assert torch.equal(actual[:, [0, 1, 2, 6]], expected[:, [0, 1, 2, 6]])
    error = turns(actual[:, 3:6], expected[:, 3:6])
    cos_b = expected[:, 4:5].cos()
    assert cos_b.min() < 0.05  # near poles too, where a and c are known to 1e-15 / cos(b)
    assert (error * cos_b).max() < 2e-15 and error.max() < 1e-12


@pytest.mark.parametrize("distance", [0, 1e-12, 1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("pole", [-HALF, HALF])
def test_near_a_pole_the_rotation_is_exact_and_lock_is_scipys(pole, distance):
    """Angles of a and c apart are lost there with the digits of cos(b); what they describe together is not."""
    angles = poses(300, 3)[:, 3:6]
    angles[:, 1] = pole - math.copysign(distance, pole)
    matrix = euler_to_matrix(angles)
    actual = matrix_to_euler(matrix)
    assert (euler_to_matrix(actual) - matrix).abs().max() < (1e-15 if distance > 1e-7 or not distance else 2e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gimbal lock
        expected = torch.from_numpy(Rotation.from_matrix(matrix).as_euler("xyz"))
    if distance <= 1e-8:
        assert not actual[:, 2].any() and not expected[:, 2].any()
        assert turns(actual, expected).max() < 2e-8
    else:
        assert (turns(actual, expected) * distance).max() < 5e-16


def test_the_difference_of_two_poses_leads_from_one_to_the_other():
    start, end = poses(500, 4, 1.4), poses(500, 5, 1.4)
    action = pose_difference(start, end)
    before, after = (Rotation.from_euler("xyz", x[:, 3:6]).as_matrix() for x in (start, end))
    expected = torch.from_numpy(Rotation.from_matrix(after @ before.transpose(0, 2, 1)).as_euler("xyz"))
    assert (turns(action[:, 3:6], expected) * expected[:, 1:2].cos()).max() < 2e-15
    torch.testing.assert_close(next_pose(start, action), end, rtol=0, atol=1e-12)


def test_fp32_poses_are_the_rounded_fp64_ones_and_axes_broadcast():
    pose, action = poses(1, 6, 1.0).float()[0], poses(40, 7, 1.0).float().view(4, 10, 7)
    actual = next_pose(pose, action)
    expected = moved(pose.double().expand(40, 7), action.double().view(40, 7)).view(4, 10, 7)
    assert actual.shape == (4, 10, 7)
    assert torch.equal(actual, expected.float())


def test_an_action_that_does_not_turn_keeps_the_orientation():
    pose, action = poses(500, 8, HALF).float(), poses(500, 9).float()
    action[:, 3:6] = 0
    assert (next_pose(pose, action)[:, 3:6] - pose[:, 3:6]).abs().max() <= 2.4e-7  # an ulp of the largest angle


@pytest.mark.parametrize("pole", [False, True])
def test_gradients_are_finite_everywhere(pole):
    pose, action = poses(20, 10, 1.0), poses(20, 11, 0.1)
    if pole:
        pose[:, 3:6] = torch.tensor([0.3, HALF, 0])
        action[:, 3:6] = 0
    pose.requires_grad_(), action.requires_grad_()
    if not pole:
        assert torch.autograd.gradcheck(lambda p, a: next_pose(p, a)[:, :6], (pose[:5], action[:5]))
    next_pose(pose, action).sum().backward()
    assert pose.grad.isfinite().all() and action.grad.isfinite().all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: next_pose(torch.zeros(6), torch.zeros(7)),
            ValueError,
            "next_pose: pose must have shape [..., 7], got (6,); reshape it",
        ),
        (
            lambda: next_pose(torch.zeros(7), torch.zeros(7, dtype=torch.long)),
            TypeError,
            "next_pose: action must be a floating tensor, got torch.int64; convert it with .float()",
        ),
        (
            lambda: matrix_to_euler(torch.zeros(3)),
            ValueError,
            "matrix_to_euler: matrix must have shape [..., 3, 3], got (3,); reshape it",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
