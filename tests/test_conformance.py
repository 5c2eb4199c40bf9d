"""One suite for every op x backend x case x dtype. Ops join it through `ops.OPS` and their `cases.py`."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import jepa_kernels as jk
from jepa_kernels._core.info import kernels
from jepa_kernels._core.select import short, unavailable
from jepa_kernels.ops import OPS
from jepa_kernels.testing import cast, check_case, map_tensors, op_module, public, run
from jepa_kernels.verify.checks import (
    alone,
    budget,
    draw,
    dtypes_of,
    leading_dtype,
    promises_alone,
    same,
    strided,
    takes_strides,
    torch_answers,
    two_runs,
    typical,
)


def rows():
    """(op, backend, device) of every kernel, marked by where it can run: the interpreter, a GPU, or anywhere."""
    for op in OPS:
        for kernel in kernels(op):
            for device in ("cpu", "cuda"):
                if kernel.backend == ("cuda" if device == "cpu" else "cpu"):
                    continue
                marks = [pytest.mark.gpu] if device == "cuda" else []
                if device == "cpu" and kernel.backend == "triton":
                    marks = [pytest.mark.interp]
                yield pytest.param(op, kernel.backend, device, marks=marks, id=f"{op}-{kernel.backend}-{device}")


def rows_with_cases():
    for row in rows():
        for case in op_module(row.values[0], "cases").CASES:
            yield pytest.param(*row.values, case, marks=row.marks, id=f"{row.id}-{case.name}")


each_kernel = pytest.mark.parametrize("op, backend, device", list(rows()))
each_case = pytest.mark.parametrize("op, backend, device, case", list(rows_with_cases()))
each_strided_case = pytest.mark.parametrize(
    "op, backend, device, case",
    [row for row in rows_with_cases() if takes_strides(*row.values[:2], row.values[3])],
)
each_op = pytest.mark.parametrize("op", OPS)


def interpreted(row):
    """The interpreter runs a kernel's programs one after the other: no second run can differ for their order."""
    return pytest.mark.interp in row.marks


@pytest.fixture(autouse=True)
def _kernel_must_run_here(request):
    """A backend that can't run fails the test: only hardware that is not here is a reason to skip, and a limit that
    a cuda row states; no row may refuse its op's first case."""
    params = getattr(request.node, "callspec", None)
    if params is None or "backend" not in params.params:
        return
    backend, device = params.params["backend"], params.params["device"]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    why = unavailable(backend, device)
    if why is not None:
        pytest.fail(f"{backend} can't run here: {why}")
    op, case = params.params["op"], params.params.get("case")
    if backend == "cuda" and case not in (None, typical(op)):
        _skip_where_a_limit_refuses(op, backend, device, case)


def _skip_where_a_limit_refuses(op, backend, device, case):
    try:
        public(op, backend)(**draw(case, leading_dtype(op, backend, case), device))
    except jk.BackendError as error:
        pytest.skip(str(error))


@each_case
def test_every_output_and_gradient_is_within_the_error_budget(op, backend, device, case):
    for dtype in dtypes_of(op, backend, case):
        for parity in budget(op, backend, case, dtype, device):
            assert parity.ok, f"{short(dtype)} {parity}"


@pytest.mark.parametrize("op, backend, device, case", [row for row in rows_with_cases() if not interpreted(row)])
def test_two_runs_are_bitwise_equal(op, backend, device, case):
    assert two_runs(op, backend, case, leading_dtype(op, backend, case), device) is None


@each_strided_case
def test_strided_inputs_give_the_same_bits(op, backend, device, case):
    assert strided(op, backend, case, torch.float32, device) is None


@pytest.mark.parametrize(
    "op, backend, device, case", [r for r in rows_with_cases() if promises_alone(*r.values[:2]) and not interpreted(r)]
)
def test_a_packed_sequence_is_itself_alone(op, backend, device, case):
    assert alone(op, backend, case, leading_dtype(op, backend, case), device) is None


@each_kernel
@pytest.mark.parametrize("level", ["avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_is_within_the_error_budget(op, backend, device, level):
    if backend != "cpu":
        pytest.skip("instruction sets are chosen for cpu kernels only")
    from jepa_kernels import _C

    if not _C.set_isa(level):
        pytest.skip(f"this processor lacks {level}")
    try:
        for case in op_module(op, "cases").CASES:
            for dtype in dtypes_of(op, backend, case):
                for parity in check_case(op, backend, case, dtype, device):
                    assert parity.ok, f"{case.name} {short(dtype)} {parity}"
    finally:
        _C.set_isa("best")


class _Calls(TorchDispatchMode):
    """Records the calls of our torch ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "jepa_kernels":
            copied = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
            self.calls.append((func, func._schema.name.split("::")[1], copied))
        return func(*args, **(kwargs or {}))


def recorded_calls(op, backend, device):
    if backend == "sdpa":
        pytest.skip("sdpa is PyTorch's own op")
    case = typical(op)
    with _Calls() as recorder:
        run(public(op, backend), draw(case, leading_dtype(op, backend, case), device), case)
    return case, recorder.calls


@each_kernel
def test_opcheck(op, backend, device):
    case, calls = recorded_calls(op, backend, device)
    assert {name for _, name, _ in calls} >= {f"{op}_forward"} | ({f"{op}_backward"} if case.grads else set())
    for func, _, args in calls:
        torch.library.opcheck(func, args)


@each_kernel
def test_opcheck_of_the_differentiable_twin(op, backend, device):
    case, calls = recorded_calls(op, backend, device)
    if not case.grads:
        pytest.skip(f"{op} has no gradient")
    args = list(next(a for _, name, a in calls if name == f"{op}_forward"))
    for position in op_module(op, "cases").DIFFERENTIABLE:
        args[position] = args[position].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.jepa_kernels, op).default, tuple(args))


@each_op
def test_gradcheck_of_the_reference(op):
    cases = [c for c in op_module(op, "cases").CASES if c.gradcheck]
    assert cases or not typical(op).grads, f"{op} has gradients: mark a small case with gradcheck=True"
    reference = op_module(op, "reference").forward
    for case in cases:
        inputs = draw(case, torch.float64, "cpu")
        free = [inputs.pop(n).double().requires_grad_() for n in case.grads]
        rest = map_tensors(inputs, lambda _, x: x.double() if x.is_floating_point() else x)
        names = case.grads

        def function(*tensors, names=names, rest=rest):
            return reference(**dict(zip(names, tensors, strict=True)), **rest)

        assert torch.autograd.gradcheck(function, free)


def eager_and_compiled(op, backend, device, compiler):
    """Eager and compiled results of calls whose lengths differ, and the number of graphs compiled so far: five calls,
    in the interpreter three, of which the last may compile nothing."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    case, dynamic = typical(op), op_module(op, "cases").dynamic
    dtype = leading_dtype(op, backend, case)
    function = torch.compile(public(op, backend), fullgraph=True, backend=counter)
    for size in range(3 if (backend, device) == ("triton", "cpu") else 5):
        drawn = dynamic(torch.Generator().manual_seed(size), size)
        eager = run(public(op, backend), cast(drawn, dtype, device, case.keep), case)
        yield eager, run(function, cast(drawn, dtype, device, case.keep), case), counter.frame_count


@each_kernel
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_fullgraph_once_static_and_once_dynamic(op, backend, device, compiler):
    for eager, traced, graphs in eager_and_compiled(op, backend, device, compiler):
        if compiler == "inductor" and torch_answers(backend, device):
            torch.testing.assert_close(traced, eager)
        else:
            assert same(eager, traced)
        assert graphs <= 2, "lengths that change must not recompile more than once"


@each_kernel
def test_autocast(op, backend, device):
    """Under autocast the op computes from the arguments that `AUTOCAST` names, cast; all else stays as it is."""
    case, lowered = typical(op), op_module(op, "cases").AUTOCAST or ()
    if lowered and torch.bfloat16 not in dtypes_of(op, backend, case):
        backend = "reference"  # what calls under autocast run then
    low = map_tensors(draw(case, torch.float32, device), lambda n, x: x.to(torch.bfloat16) if n in lowered else x)
    expected = run(public(op, backend), low, case)
    with torch.autocast(device, torch.bfloat16):
        actual = run(public(op, backend), draw(case, torch.float32, device), case)
    for name, wanted in expected.items():
        assert actual[name].dtype == (torch.float32 if name.startswith("d") else wanted.dtype), name
        assert torch.equal(actual[name].to(wanted.dtype), wanted), name


@each_kernel
def test_backward_takes_expanded_gradients(op, backend, device):
    case, results = typical(op), []
    if not case.grads:
        pytest.skip(f"{op} has no gradient")
    for expanded in (True, False):
        inputs = draw(case, leading_dtype(op, backend, case), device)
        leaves = [inputs[n].requires_grad_() for n in case.grads]
        output = public(op, backend)(**inputs)
        one = torch.ones((), device=device, dtype=output.dtype).expand(output.shape)
        results.append(torch.autograd.grad(output, leaves, one if expanded else one.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_kernel
def test_double_backward_raises(op, backend, device):
    case = typical(op)
    if not case.grads or backend == "sdpa":
        pytest.skip("no gradient rule of ours")
    inputs = draw(case, leading_dtype(op, backend, case), device)
    leaves = [inputs[n].requires_grad_() for n in case.grads]
    output = public(op, backend)(**inputs).sum()
    with pytest.raises(RuntimeError, match=f"{op}: backward must run without create_graph=True, got .+; .+"):
        torch.autograd.grad(output, leaves, create_graph=True)


def jvp(f, x):
    return torch.func.jvp(f, (x,), (x,))


def grad(f, x):
    return torch.func.grad(lambda x: f(x).sum())(x)


@each_kernel
@pytest.mark.parametrize(
    "transform, message",
    [
        (jvp, "inputs must carry no forward-mode tangent, got a dual .+; use"),
        (grad, "gradients must be autograd's, got a call inside a .+; use"),
    ],
)
def test_gradients_of_torch_func_are_refused(transform, message, op, backend, device):
    case = typical(op)
    if not case.grads or backend == "sdpa":
        pytest.skip("no gradient rule of ours")
    inputs = draw(case, leading_dtype(op, backend, case), device)
    first = inputs.pop(case.grads[0])
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        transform(lambda x: public(op, backend)(**{case.grads[0]: x}, **inputs), first)


@each_op
def test_vmap_is_a_call_for_each_sample(op):
    case = typical(op)
    if not case.grads:
        pytest.skip("no argument that is usually mapped over")
    inputs = draw(case, torch.float32, "cpu")
    first = inputs.pop(case.grads[0])
    samples = torch.stack([first, first * 1.5])

    def one(x: Tensor) -> Tensor:
        return public(op, None)(**{case.grads[0]: x}, **inputs)

    assert torch.equal(torch.vmap(one)(samples), torch.stack([one(x) for x in samples]))


@each_op
def test_meta_tensors_give_shapes(op):
    if op == "adamw_ema":
        pytest.skip("its reference computes with the value of the step")
    inputs = draw(typical(op), torch.float32, "cpu")
    found = public(op, "reference")(**draw(typical(op), torch.float32, "meta"))
    for a, b in zip(tree_leaves(found), tree_leaves(public(op, None)(**inputs)), strict=True):
        assert a is b is None or (a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype))


@each_op
def test_nothing_that_fake_tensors_lack_is_read(op):
    case = typical(op)
    inputs, mode = draw(case, torch.float32, "cpu"), FakeTensorMode(allow_non_fake_inputs=True)
    fake = map_tensors(inputs, lambda _, x: mode.from_tensor(x))
    with mode:
        found = public(op, None)(**fake)
    for a, b in zip(tree_leaves(found), tree_leaves(public(op, None)(**inputs)), strict=True):
        assert a is b is None or (isinstance(a, FakeTensor) and (a.shape, a.dtype) == (b.shape, b.dtype))


@each_op
def test_cases_hold_an_empty_batch(op):
    assert any("empty" in c.name for c in op_module(op, "cases").CASES)


@each_op
def test_explain_lists_every_row_and_runs_nothing(op):
    case = typical(op)
    inputs, before = draw(case, torch.float32, "cpu"), draw(case, torch.float32, "cpu")
    lines = jk.explain(op, **inputs).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [k.backend for k in kernels(op)] + ["reference"]
    assert all(len(line.split()) > 1 for line in lines)
    for name in case.mutates:
        assert all(torch.equal(a, b) for a, b in zip(inputs.get(name, ()), before.get(name, ()), strict=True))


@each_op
def test_an_explicit_backend_never_falls_back(op):
    inputs = draw(typical(op), torch.float32, "cpu")
    with pytest.raises(jk.BackendError, match=rf"{op}: backend 'cuda' must be able to run this call, got: .+; .+"):
        public(op, "cuda")(**inputs)
    with pytest.raises(ValueError, match=rf"{op}: backend must be one of .+, got 'fast'; .+"):
        public(op, "fast")(**inputs)
