"""What becomes of the numbers drawn, by hand."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.planning import PUBLISHED, ActionSpace, clip_norm, dead_zone, fixed, without_rotation
from tests.planning.worlds import Bent


def test_vectors_are_shortened_by_groups():
    change = clip_norm((slice(0, 2), 2.5), (slice(2, 3), 1.0))
    actions = torch.tensor([[[3.0, 4.0, -2.0, 7.0], [0.0, 0.0, 0.5, 7.0], [1.5, -2.0, 1.0, 7.0]]])
    expected = torch.tensor([[[1.5, 2.0, -1.0, 7.0], [0.0, 0.0, 0.5, 7.0], [1.5, -2.0, 1.0, 7.0]]])
    assert torch.equal(change(actions), expected)


def test_a_vector_of_no_length_allowed_is_0():
    actions = torch.tensor([[[0.0, 0.0, 1.0], [3.0, 4.0, 2.0]]], requires_grad=True)
    shortened = clip_norm((slice(0, 2), 0.0))(actions)
    shortened.sum().backward()
    assert torch.equal(shortened, torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]]]))
    assert actions.grad.isfinite().all()


def test_dimensions_are_given_values_from_a_step_on():
    actions = torch.arange(12.0).view(1, 3, 4)
    assert fixed({1: 9.0, -1: 0.0})(actions)[0].tolist() == [[0, 9, 2, 0], [4, 9, 6, 0], [8, 9, 10, 0]]
    assert fixed({-1: 1.0}, first_step=2)(actions)[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 1]]
    assert torch.equal(actions, torch.arange(12.0).view(1, 3, 4))


def test_small_numbers_become_zero_and_four_become_seven():
    actions = torch.tensor([[0.1, 0.2, 0.3, 0.24], [0.1, 0.2, 0.3, -0.25]])
    still = dead_zone(-1, 0.25)(actions)
    assert torch.equal(still, torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.1, 0.2, 0.3, -0.25]]))
    assert torch.equal(without_rotation(still)[1], torch.tensor([0.1, 0.2, 0.3, 0, 0, 0, -0.25]))


def test_changes_have_gradients():
    """A gradient plan goes through to_world."""
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(without_rotation, (x,))
    assert torch.autograd.gradcheck(clip_norm((slice(0, 3), 0.5)), (x,))


@pytest.mark.parametrize("planner", ["cem", "mppi", "gradient"])
def test_every_sample_is_clipped_then_constrained_then_shown(planner):
    """The world and the cost see nothing else."""
    world, shown = Bent(7), []
    space = ActionSpace((3.0, 3.0, 3.0, 1.0), (0.5, 0.1, 0.5, 2.0), (fixed({2: 0.25}),), without_rotation)

    def cost(latents, actions):
        shown.append(actions.detach())
        return latents[:, -1].square().mean((1, 2))

    options = {"lr": 1.0} if planner == "gradient" else {"elites": 5}
    function = getattr(jk.planning, planner)
    plan = function(world, world.context(), cost=cost, horizon=2, samples=20, iterations=3, space=space, **options)
    seen = torch.cat(shown)
    assert seen.shape[1:] == (2, 7) and len(seen) == 20 * 3 + 1
    most = seen.abs().flatten(0, 1).amax(0)
    assert most.tolist()[:3] == [0.5, 0.1, 0.25] and not most[3:6].any() and 0.5 < most[6] <= 2
    assert torch.equal(seen[..., 2], torch.full_like(seen[..., 2], 0.25))
    assert plan.mean.shape == (2, 4) and torch.equal(seen[-1], plan.actions)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_run(name):
    """As arguments, whatever the table says; those of many samples and steps in a smaller number."""
    world = Bent(7)
    settings = {"horizon": 2, **PUBLISHED[name], "samples": 30, "iterations": 2}
    plan = jk.planning.cem(world, world.context(), torch.zeros(2, 3, dtype=torch.float64), **settings)
    assert plan.actions.shape == (settings["horizon"], 7) and plan.energy.isfinite()
    if name == "eb_jepa":
        assert plan.actions.norm(dim=-1).max() <= 2.45
