"""The look at all tensors of a call at once: what it tells, and that it passes nothing that the checks refuse."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import jepa_kernels as jk
from jepa_kernels._core import check, extension
from jepa_kernels._core.check import sizes_of
from jepa_kernels.testing import cast, op_module

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Own(Tensor):
    """A class of somebody else's."""


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


def test_letters_are_sizes_in_the_order_of_their_first_use():
    look = sizes_of("M K E f", "B N E g", "M K int64", "S+1 int32")
    ids, starts = ones(4, 3, dtype=torch.int64), ones(6, dtype=torch.int32)
    assert look(ones(4, 3, 8), ones(2, 9, 8), ids, starts) == (4, 3, 8, 2, 9, 5)
    assert look(ones(4, 3, 8), ones(2, 9, 7), ids, starts) is None
    assert look(ones(4, 3, 8), ones(2, 9, 8), ids[:, :2], starts) is None
    assert look(ones(4, 3, 8), ones(2, 9, 8), ids, starts[:0]) is None, "fewer than 0 sequences"


def test_small_letters_are_one_floating_type_each():
    look = sizes_of("N f", "N f", "N g|uint8", "N f|float32|None")
    for f in FLOATS:
        for g in (*FLOATS, torch.uint8):
            x, y = ones(2, dtype=f), ones(2, dtype=g)
            assert look(x, x, y, x) == look(x, x, y, ones(2)) == look(x, x, y, None) == (2,)
    half, single = ones(2, dtype=torch.float16), ones(2)
    assert look(half, single, single, None) is None
    assert look(single, single, single, half) is None
    for other in (torch.int64, torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn):
        assert look(ones(2).to(other), ones(2).to(other), single, None) is None
        assert look(single, single, ones(2).to(other), None) is None


def test_a_tensor_is_left_out_only_where_that_is_told():
    assert sizes_of("M E f", "M N int64|None")(ones(2, 3), None) == (2, 3, None)
    assert sizes_of("M E f", "M N int64")(ones(2, 3), None) is None
    assert sizes_of("M E f|None", "...")(None, ones(2, 3)) == (None, None)


def test_numbers_dots_and_contiguous():
    assert sizes_of("T 3 H f", "...")(ones(4, 3, 2), ones(1, 1, 1, 1, dtype=torch.bool)) == (4, 2)
    assert sizes_of("T 3 H f", "...")(ones(4, 2, 2), ones(1)) is None
    look = sizes_of("A B int64 contiguous")
    ids = ones(3, 2, dtype=torch.int64)
    assert look(ids) == (3, 2) and look(ids.t()) is None and look(ids[:, :1]) is None
    assert look(ids[:1, :1]) == (1, 1) and look(ids[:, :0]) == (3, 0), "as of is_contiguous"
    with pytest.raises(TypeError, match="as many tensors"):
        look(ids, ids)
    with pytest.raises(ValueError, match="no type is called int46"):
        sizes_of("A int64|int46")(ids)


UNUSUAL: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "another class": lambda x: x.as_subclass(Own),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.as_nested_tensor([x]),
    "jagged": lambda x: torch.nested.as_nested_tensor([x], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "a row more": lambda x: torch.cat([x, x[:1]]),
    "a dimension more": lambda x: x[None],
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_nothing_unusual_passes(kind):
    x = ones(3, 2)
    assert sizes_of("A B f", "A B f")(x, UNUSUAL[kind](x)) is None
    assert sizes_of("A B f", "A B f")(x, torch.nn.Parameter(x)) == (3, 2), "a usual one still does"


def test_what_holds_no_memory_of_its_own_does_not_pass():
    look, seen = sizes_of("A f"), []
    torch.vmap(lambda x: seen.append(look(x)) or x)(ones(3, 2))
    torch.func.grad(lambda x: seen.append(look(x)) or x.sum())(ones(3))
    with torch._subclasses.FakeTensorMode():
        seen.append(look(ones(3)))
    assert seen == [None] * 3


def test_without_the_compiled_module_and_while_compiling_or_tracing_nothing_passes(monkeypatch):
    look = sizes_of("A B f")
    torch.jit.trace(lambda x: x + (1 if look(x) is None else 1 / 0), ones(1, 1), check_trace=False)
    assert torch.compile(lambda x: x + (1 if look(x) is None else 2), backend="eager", fullgraph=True)(ones(1, 1)) == 2
    monkeypatch.setitem(extension._state, "C", "jepa_kernels._C is not built")
    assert look(ones(1, 1)) is None


# What one argument of a call may be in its place; what can't be made of it is left out.
CHANGES: dict[str, Callable[[Any], Any]] = {
    **UNUSUAL,
    "nothing": lambda _: None,
    "an object": lambda _: object(),
    "a parameter": lambda x: torch.nn.Parameter(x),
    "a dimension less": lambda x: x[0],
    "all in one": lambda x: x.flatten(),
    "empty": lambda x: x[:0],
    "none in a row": lambda x: x[..., :0],
    "the last left out": lambda x: x[..., :-1],
    "the second left out": lambda x: x[:, :-1],
    "a row less": lambda x: x[:-1],
    "rows twice": lambda x: torch.cat([x, x]),
    "turned": lambda x: x.transpose(0, 1),
    "of other strides": lambda x: torch.stack([x, x], -1)[..., 0],
    "turned around": lambda x: x.flip(-1),
    **{str(d): lambda x, d=d: x.to(d) for d in (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)},
    "complex": lambda x: x.to(torch.complex64),
    "negative": lambda x: torch.complex(x.float(), x.float()).conj().imag,
    "another packing": lambda p: jk.Packing.from_lengths([*p.lengths[:-1], p.lengths[-1] + 1]),
    "a packing of others": lambda p: jk.Packing.from_lengths([*p.lengths[1:], p.lengths[0]]),
    "a sequence more": lambda p: jk.Packing.from_lengths([*p.lengths, 1]),
    "a padded packing": lambda p: p.padded(p.tokens + 1, p.sequences, p.max_seqlen),
    "a padded row of sequences": lambda p: p.padded(p.tokens, p.sequences + 1, p.max_seqlen),
    "on meta": lambda p: p.to("meta"),
}


def changed(value: Any) -> Iterator[tuple[str, Any]]:
    """The value with another in the place of each tensor or packing in it, or a packing where there is nothing."""
    if value is None:
        yield "a packing", jk.Packing.from_lengths([2, 3])
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            for name, new in changed(part):
                yield name, type(value)([*value[:i], new, *value[i + 1 :]])
    elif isinstance(value, (Tensor, jk.Packing)):
        for name, change in CHANGES.items():
            with contextlib.suppress(Exception):
                yield name, change(value)


def outcome(op: str, inputs: dict[str, Any]) -> str:
    """What the checks and the choice of a backend say of a call; no kernel runs."""
    try:
        return jk.explain(op, **inputs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def packings(op: str) -> dict[str, None]:
    """The packings that the op may be given."""
    return {name: None for name in inspect.signature(getattr(jk, op)).parameters if name.endswith("packing")}


def calls(op: str) -> Iterator[dict[str, Any]]:
    dtype = torch.float32
    if op == "rope_qk":
        q, k, places = ones(2, 3, 6, 8), ones(2, 1, 6, 8), ones(6, 2)
        yield dict(q=q, k=k, positions=places)
        yield dict(q=q, k=k, positions=ones(2, 6, 2), k_positions=ones(2, 6, 2))
        yield dict(q=q[0], k=k[0, :, :3], positions=places[:3], k_positions=places[:1])
    elif op == "masked_attention_qkv":
        yield dict(qkv=ones(2, 5, 3, 2, 8))
        yield dict(qkv=ones(5, 3, 2, 8), packing=jk.Packing.from_lengths([2, 3]))
    else:
        for case in op_module(op.removesuffix("_lse"), "cases").CASES:
            yield cast(case.make(torch.Generator().manual_seed(0)), dtype, "cpu", case.keep)


LISTS = {"adamw_ema", "ema_update", "grad_norm"}  # of tensors: `chunks.read` looks at them


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", sorted({*jk.ops.OPS, *jk.ops.FORMS} - LISTS))
def test_calls_that_pass_at_a_look_pass_every_check(op, monkeypatch):
    """Each argument of each case in turn is made wrong in many ways: the same answer, or the same words, either way."""
    count, wrong = 0, 0
    for inputs in calls(op):
        for argument, value in {**packings(op), **inputs}.items():
            for name, new in [("as it is", value), *changed(value)]:
                call = {**inputs, argument: new}
                quick = outcome(op, call)
                with monkeypatch.context() as patch:
                    patch.setattr(check, "is_dynamo_compiling", lambda: True)  # as every check by itself
                    slow = outcome(op, call)
                assert quick == slow, f"{argument} {name}: {quick} at a look, {slow} one by one"
                count, wrong = count + 1, wrong + (" must " in slow)
    print(f"{op}: {count} calls, {wrong} of them wrong")
    assert count > wrong > 20
