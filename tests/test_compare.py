"""`jk.testing.compare`: the error budget for anyone's function."""

import doctest

import pytest
import torch
from torch.nn.functional import layer_norm

import jepa_kernels as jk
from jepa_kernels import testing
from jepa_kernels.testing import compare


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(6, 33), "w": torch.randn(33)}


def norm(x, w):
    return layer_norm(x, (33,)) * w


def by_hand(x, w):
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.float()).to(x.dtype)


def test_it_is_reached_without_an_import():
    assert jk.testing.compare is compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_form_of_the_same_function_is_within_the_budget(inputs, dtype):
    statement = compare(by_hand, norm, inputs, grads=("x", "w"), dtype=dtype)
    assert statement.ok and [p.name for p in statement.parities] == ["output0", "dx", "dw"]
    statement.check()
    assert [line[:4] for line in str(statement).splitlines()] == ["ok  "] * 3


def test_numbers_are_those_of_the_definition(inputs):
    bf16 = compare(by_hand, norm, inputs, dtype=torch.bfloat16).parities[0]
    x, w = (inputs[n].bfloat16() for n in ("x", "w"))
    exact, eager = norm(x.double(), w.double()), norm(x, w)
    error = (by_hand(x, w).double() - exact).abs().max().item()
    floor = 2 * exact.abs().max().item() * torch.finfo(torch.bfloat16).eps
    assert bf16.max_err == error
    assert bf16.max_budget == pytest.approx(2 * (eager.double() - exact).abs().max().item() + floor, rel=1e-12)


@pytest.mark.parametrize(
    "wrong, failing",
    [
        (lambda x, w: layer_norm(x, (33,), eps=1e-3) * w, ["output0", "dx", "dw"]),
        (lambda x, w: norm(x, w.detach() + 0 * w.sum()), ["dw"]),
        (lambda x, w: norm(x, w) * (1 + 2e-5), ["output0", "dx", "dw"]),
    ],
)
def test_slips_are_named_with_their_numbers(inputs, wrong, failing):
    statement = compare(wrong, norm, inputs, grads=("x", "w"))
    assert not statement.ok and [p.name for p in statement.parities if not p.ok] == failing
    with pytest.raises(AssertionError) as raised:
        statement.check()
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == failing and "max error" in lines[0] and "budget" in lines[0]


def test_positions_several_outputs_and_other_arguments():
    x, ids = torch.randn(5, 4), torch.tensor([3, 0, 3])

    def reference(x, ids, scale):
        return x[ids] * scale, {"sum": x.sum(0)}["sum"]

    found = compare(lambda x, ids, scale: list(reference(x, ids, scale)), reference, (x, ids, 2.0), grads=(0,))
    assert found.ok and [p.name for p in found.parities] == ["output0", "output1", "d0"]
    as_dict = compare(lambda x: {"a": x * 2}, lambda x: x + x, {"x": x})
    assert as_dict.ok and as_dict.parities[0].max_err == 0


def test_tensors_inside_arguments_are_cast_and_copied():
    x, pair = torch.randn(8), (torch.randn(8), {"shift": [torch.randn(8)]})
    before = pair[1]["shift"][0].clone()

    def spoiling(x, pair):
        out = x * pair[0] + pair[1]["shift"][0]
        pair[1]["shift"][0].zero_()
        return out

    found = compare(spoiling, lambda x, pair: x * pair[0] + pair[1]["shift"][0], (x, pair), dtype=torch.bfloat16)
    assert found.ok and 0 < found.parities[0].max_err < 0.1 and torch.equal(pair[1]["shift"][0], before)


@pytest.mark.parametrize("wrong, ok", [(lambda x: x.exp(), True), (lambda x: x.exp() * 0, False)])
def test_an_overflow_of_the_reference_does_not_let_everything_pass(wrong, ok):
    x = torch.tensor([0.0, 1.0, 20.0])  # exp(20) = 4.85e8; fp16 ends at 65504
    found = compare(wrong, lambda x: x.exp(), (x,), dtype=torch.float16)
    assert found.ok == ok and found.parities[0].max_budget < 1e6


def test_memory_that_is_never_written_is_seen():
    x = torch.randn(40)

    def half(x):
        out = torch.empty_like(x)
        out[:20] = x[:20]
        return out

    assert not compare(half, lambda x: x.clone(), (x,)).ok


def test_inputs_are_left_as_they_were():
    x = torch.randn(4)
    before = x.clone()
    compare(lambda x: x.add_(1), lambda x: x + 1, {"x": x})
    assert torch.equal(x, before) and not x.requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(inputs=[1.0]), TypeError, "compare: inputs must be a dict or a tuple of arguments, got list; .+"),
        (dict(grads=("z",)), ValueError, "compare: grads must name floating tensors of inputs \\(x\\), got 'z'; .+"),
        (dict(dtype=torch.int32), TypeError, "compare: dtype must be a floating dtype, got torch.int32; .+"),
        (dict(fn=lambda x: x.sort().indices), TypeError, "compare: fn's output 0 must be .+, got torch.int64; .+"),
        (dict(fn=lambda x: None), TypeError, "compare: fn's output 0 must be a floating tensor, got NoneType; .+"),
        (dict(fn=lambda x: (x, x)), AssertionError, "fn: must return 1 outputs, got 2"),
        (dict(fn=lambda x: x[:2]), AssertionError, r"output0: must be torch.float32 \(4,\), got .+ \(2,\)"),
        (dict(fn=lambda x: x.detach() * 1, grads=("x",)), AssertionError, "^fn: must have a gradient of x, got none$"),
        (
            dict(reference=lambda x: x.detach() * 1, grads="x"),
            ValueError,
            "compare: reference must have a gradient of x, got none; leave it out of grads",
        ),
        (
            dict(
                inputs={"x": torch.randn(4), "y": torch.randn(4)},
                fn=lambda x, y: x * 2,
                reference=lambda x, y: x + y,
                grads=("x", "y"),
            ),
            AssertionError,
            "^fn: must have a gradient of y, got none$",
        ),
        (dict(fn=lambda x: x.double()), AssertionError, "output0: must be torch.float32 .+, got torch.float64 .+"),
    ],
)
def test_bad_arguments(change, error, message):
    given = dict(fn=lambda x: x.clone(), reference=lambda x: x.clone(), inputs={"x": torch.randn(4)}) | change
    with pytest.raises(error, match=message):
        compare(**given)


def test_the_example_runs_as_written():
    tests = doctest.DocTestFinder().find(compare, globs={"torch": torch, "compare": compare, "testing": testing})
    found = doctest.DocTestRunner().run(tests[0])
    assert found.attempted == 4 and found.failed == 0
