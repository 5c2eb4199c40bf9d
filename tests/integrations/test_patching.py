"""Patches of a small model written here: what stays, what is refused, what comes back."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from jepa_kernels.integrations.patching import Replacement, apply, kind_of, own_forward, seeded_input
from tests.integrations.adapters import Integers


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.full((4,), 0.5))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.dropout(self.linear(x) * scale + self.shift)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Half(), Half()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - self.right(x, scale=3.0)


def equal(self: Half, x: Tensor, scale: float = 2.0) -> Tensor:
    return self.dropout(torch.addcmul(self.shift, self.linear(x), torch.tensor(scale, dtype=x.dtype)))


def one_bit_off(self: Half, x: Tensor, scale: float = 2.0) -> Tensor:
    return equal(self, x, scale) * (1 + 3e-6)


def crash(self: Half, x: Tensor, scale: float = 2.0) -> Tensor:
    raise KeyError("crash")


def run(model: nn.Module) -> dict[str, Tensor]:
    return {"out": model(seeded_input(model, 8, 4))}


def replacement(forward, parameters=("x", "scale")):
    return Replacement(forward, "added in one operation", parameters)


def patch(model, forward=equal, names=("left", "right"), skipped=(), **options):
    options = {"source": "toy 1.2", "run": run} | options
    return apply(model, {name: replacement(forward) for name in names}, dict(skipped), **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Both()


@pytest.fixture
def x():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def test_a_patch_changes_forward_alone_and_undo_gives_every_bit_back(model, x):
    before, keys, modules = model.eval()(x), list(model.state_dict()), list(model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    done = patch(model)
    assert list(model.state_dict()) == keys and list(model.modules()) == modules
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert type(model.left) is Half and "forward" in vars(model.left) and Half.forward is not equal
    assert torch.equal(model.left(x), equal(model.left, x))
    done.undo()
    assert "forward" not in vars(model.left) and torch.equal(model(x), before)
    done.undo()
    assert torch.equal(model(x), before)


def test_the_replacement_runs_with_the_modules_hooks(model, x):
    model.eval()
    seen = []
    model.left.register_forward_hook(lambda module, args, out: seen.append(out))
    patch(model, run=None)
    model(x)
    assert torch.equal(seen[0], equal(model.left, x))


def test_the_end_of_a_with_block_undoes(model):
    with patch(model) as done:
        assert "forward" in vars(model.right) and done.patched
    assert "forward" not in vars(model.right)


def test_a_report_says_what_was_done_and_why_not(model):
    done = patch(model, names=("left",), skipped={"right": "has dropout"})
    assert done.patched == {"left": "added in one operation"} and done.skipped == {"right": "has dropout"}
    lines = str(done).split("\n")
    assert lines[:3] == [
        "Both: 1 modules patched, 1 left alone",
        "  patched: added in one operation: left",
        "  left alone: has dropout: right",
    ]
    patched, own = done.verified["out"]
    assert lines[3:] == [f"  verified: out: a relative error of {patched:.2g}, unpatched {own:.2g}"]
    assert 0 < own < 1e-6 and 0 < patched < 1e-6


def test_only_takes_modules_by_name(model):
    done = patch(model, only="right")
    assert list(done.patched) == ["right"] and done.skipped == {"left": "not among `only`"}
    done.undo()
    assert list(patch(model, only=["left", "right"]).patched) == ["left", "right"]


def test_a_name_that_fits_nothing_is_an_error(model):
    with pytest.raises(ValueError, match=r"patch: only must name modules .* got 'middle'; choose from left, right"):
        patch(model, only=["left", "middle"])
    assert "forward" not in vars(model.left)


@pytest.mark.parametrize("flags", [(True, True), (False, True)])
def test_verification_leaves_no_trace(model, flags):
    model.train(flags[0])
    model.right.train(flags[1])
    model.left.linear.weight.grad = torch.ones(4, 4)
    state, values = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.left.training, model.right.training, model.right.dropout.training) == (flags[0], flags[1], flags[1])
    assert all(torch.equal(values[name], x) for name, x in model.state_dict().items())
    assert all(p.dtype == torch.float32 and isinstance(p, nn.Parameter) for p in model.parameters())
    assert torch.equal(model.left.linear.weight.grad, torch.ones(4, 4))


def test_other_numbers_are_found_and_the_model_stays_as_it_was(model, x):
    before = model.eval()(x)
    with pytest.raises(
        RuntimeError, match=r"patch: the patched model must give the numbers of the model, got out with a rel"
    ):
        patch(model, one_bit_off)
    assert "forward" not in vars(model.left) and torch.equal(model(x), before)
    patch(model, one_bit_off, run=None)  # that the model is not what fails


def test_a_model_that_is_not_finite_itself_is_told_so(model):
    with torch.no_grad():
        model.left.linear.weight[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"the model is as it was: its own numbers are not finite, look at its we"):
        patch(model)
    assert "forward" not in vars(model.left)


def test_a_forward_that_crashes_in_verification_is_taken_out_again(model):
    with pytest.raises(KeyError, match="crash"):
        patch(model, crash)
    assert "forward" not in vars(model.left) and "forward" not in vars(model.right)


def test_a_low_precision_model_is_held_to_its_own_rounding_and_in_float32_to_less(model):
    with patch(model.bfloat16()) as done:
        assert list(done.verified) == ["out", "out in float32"]
        assert done.verified["out in float32"][0] < 1e-6 < done.verified["out"][0]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"the patched model .* got out in float32 with a relative"):
        patch(model, slightly_off)


def slightly_off(self: Half, x: Tensor, scale: float = 2.0) -> Tensor:
    return equal(self, x, scale) * 1.001


def test_a_model_that_has_no_float64_is_patched_unverified_alone(model, x):
    model.left.linear = Integers(model.left.linear)
    before = model.eval()(x)
    with pytest.raises(ValueError, match=r"patch: model must run with its weights in float64, .*; pass verify="):
        patch(model)
    assert not any("forward" in vars(module) for module in model.modules())
    patch(model, run=None)
    torch.testing.assert_close(model(x), before)


def test_inputs_are_drawn_alike_whatever_is_the_default(model):
    expected = seeded_input(model, 3, 4)
    with torch.device("meta"):
        assert torch.equal(seeded_input(model, 3, 4), expected)
    model.left.linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert torch.equal(seeded_input(model, 3, 4), expected)


def test_a_second_patch_is_refused(model):
    patch(model, names=("left",))
    with pytest.raises(
        ValueError, match="patch: model must not be patched already, got a patched left; undo the first"
    ):
        patch(model, names=("right",))


def test_another_signature_is_refused_with_the_version(model):
    wrong = {"left": replacement(equal), "right": replacement(equal, ("x", "scale", "mask"))}
    message = r"patch: Half.forward must take \(x, scale, mask\), got \(x, scale\) of toy 1.2"
    with pytest.raises(ValueError, match=message):
        apply(model, wrong, {}, source="toy 1.2")
    assert "forward" not in vars(model.left)


def test_a_forward_set_by_something_else_is_left_alone(model):
    assert own_forward(model.left, "Half") is None and kind_of(model.left, ["Both", "Half"]) == "Half"
    model.left.forward = model.left.forward
    assert own_forward(model.left, "Half") == "has a forward of its own already, set by something else"
    assert own_forward(Twice(), "Half") == "Twice has another forward than Half"


class Twice(Half):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return 2 * super().forward(x, scale)


def test_a_model_with_nothing_to_replace_is_an_error(model):
    with pytest.raises(ValueError, match=r"patch: model must have a module to replace, got left: has dropout; change"):
        patch(model, names=(), skipped={"left": "has dropout"})


def test_undo_refuses_to_drop_what_came_later_and_changes_nothing(model):
    done = patch(model)
    ours, model.right.forward = model.right.forward, crash
    with pytest.raises(
        RuntimeError, match=r"undo: right.forward must be the forward that the patch put there, got <func"
    ):
        done.undo()
    assert "forward" in vars(model.left)
    model.right.forward = ours
    done.undo()
    assert "forward" not in vars(model.left) and "forward" not in vars(model.right)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_of_a_patch_has_a_patched_model_of_its_own(model, x, duplicate):
    model.eval()
    done = patch(model)
    twin = duplicate(done)
    assert twin.model is not model and torch.equal(twin.model(x), model(x))
    with torch.no_grad():
        twin.model.left.linear.weight.zero_()
    assert not torch.equal(twin.model(x), model(x))
    twin.undo()
    assert "forward" not in vars(twin.model.left) and "forward" in vars(model.left)
