"""The Hopper kernels of masked_attention with no GPU: their own sources and binding, built for the host.

tests/kernels/emulation stands in for Hopper's instructions, from the PTX ISA: what a bulk copy writes where, what
matrix products read where and when. It also stops at faults that a result may not show: a store that no fence
publishes or no barrier orders, an accumulator read before its wait, a copy that outlives its block, threads that wait
for ever.
"""

import re

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels._core.case import Case
from jepa_kernels.ops.masked_attention import limits
from jepa_kernels.ops.masked_attention.cases import CASES, GRADS, dense, packed
from jepa_kernels.testing import cast, check_case, map_tensors, poisoned_memory, public
from tests.kernels.on_host import CSRC, HERE, build, take_for_cuda

pytestmark = pytest.mark.compile
OP = "masked_attention"
EMULATION = HERE / "emulation"
SOURCES = {  # optimised where it pays within a minute
    EMULATION / "module.cpp": "-O1",
    CSRC / "masked_attention" / "cuda_backward_sm90a.cu": "-O1",
    CSRC / "masked_attention" / "cuda_forward_sm90a.cu": "-O1",
    EMULATION / "matrix.cpp": "-O3",
}
LENGTHS = (0, 1, 63, 64, 65, 96, 111, 130, 177, 256)
WIDTHS = (16, 24, 32, 64, 80, 88, 96, 104, 128)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"), "emulated", EMULATION, SOURCES, "-Wall", "-Wextra")


@pytest.fixture(autouse=True)
def _cuda_backend_on_the_host(emulated, monkeypatch):
    take_for_cuda(monkeypatch, OP, emulated)
    monkeypatch.setitem(limits._capabilities, -1, "9.0")


def draw(make, dtype=torch.bfloat16):
    return cast(make(torch.Generator().manual_seed(0)), dtype, "cpu")


def outcome(q, k, v, grad, packing=None):
    """Output and gradients on the kernels under test."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with poisoned_memory():
        out = jk.masked_attention(*leaves, packing, backend="cuda")
        return out.detach(), *torch.autograd.grad(out, leaves, grad)


def rows_of_four(lengths, heads, width, dtype=torch.bfloat16):
    """q, k, v and grad of these lengths, and where sequences start."""
    make = packed(lengths, heads, width)
    inputs = draw(make, dtype)
    grad = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [inputs[n] for n in GRADS] + [grad], inputs["packing"].cu_seqlens.tolist()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shared_cases_are_within_the_error_budget_or_refused(case):
    inputs = draw(case.make)
    refused = [f"takes no {name}" for name in ("frame_size", "key_ranges", "rope") if name in inputs]
    if inputs.get("packing") is not None and inputs["packing"].max_seqlen > 256:
        refused.append("takes at most 256 queries")
    if refused:
        with pytest.raises(jk.BackendError, match=f"got: ({'|'.join(refused)})"):
            public(OP, "cuda")(**inputs)
        return
    for dtype in (torch.bfloat16, torch.float16):
        for parity in check_case(OP, "cuda", case, dtype):
            assert parity.ok, f"{dtype} {parity}"


@pytest.mark.parametrize("width", WIDTHS)
def test_every_length_is_within_the_error_budget(width):
    case = Case("", packed(LENGTHS, (2, 1), width, unused=7), GRADS)
    dtype = torch.float16 if width in (24, 80) else torch.bfloat16
    for parity in check_case(OP, "cuda", case, dtype):
        assert parity.ok, str(parity)


@pytest.mark.parametrize("width", [24, 64, 80])
def test_short_sequences_whose_heads_share_no_keys(width):
    case = Case("", packed((0, 1, 64, 65, 111, 128), (2, 2), width, unused=7), GRADS)
    for parity in check_case(OP, "cuda", case, torch.bfloat16):
        assert parity.ok, str(parity)


def test_short_sequences_with_no_queries_or_no_keys():
    case = Case("", packed((5, 0, 9, 70), (1, 1), 24, key_lengths=(3, 4, 0, 100)), GRADS)
    for parity in check_case(OP, "cuda", case, torch.bfloat16):
        assert parity.ok, str(parity)


@pytest.mark.parametrize("shape, packing", [((5, 0, 16), Packing.from_lengths([2, 3])), ((2, 0, 5, 16), None)])
def test_no_heads(shape, packing):
    x = torch.zeros(shape, dtype=torch.bfloat16)
    assert [y.shape for y in outcome(x, x, x, x, packing)] == [x.shape] * 4


def test_dense_views_of_one_product_are_read_in_place():
    def make(generator):
        inputs = dense(2, (2, 2), 70, 70, 40)(generator)
        qkv = torch.stack([inputs[n].transpose(1, 2) for n in GRADS], 2)  # [B, N, 3, H, D]
        return dict(zip(GRADS, (x.transpose(1, 2) for x in qkv.unbind(2)), strict=True))

    for parity in check_case(OP, "cuda", Case("", make, GRADS), torch.bfloat16):
        assert parity.ok, str(parity)


@pytest.mark.parametrize("packing", [None, Packing.from_lengths((5, 0, 65))], ids=["dense", "packed"])
def test_the_qkv_form_has_the_bits_of_its_views(packing):
    qkv = torch.randn(*((2, 35) if packing is None else (70,)), 3, 2, 24).bfloat16().requires_grad_()

    def views(x):
        return [y.transpose(1, 2) if packing is None else y for y in x.unbind(-3)]

    grad = torch.randn_like(views(qkv)[0])
    out, *apart = outcome(*views(qkv), grad, packing)
    together = jk.masked_attention_qkv(qkv, *([] if packing is None else [packing]), backend="cuda")
    assert torch.equal(together, out)
    assert same(views(torch.autograd.grad(together, qkv, grad)[0]), apart)


@pytest.mark.parametrize("heads, width", [((4, 2), 88), ((2, 2), 24), ((1, 1), 80)])
def test_sequences_have_the_bits_they_have_alone_beside_others_full_of_nan(heads, width):
    lengths = (65, 40, 130, 1)
    tensors, starts = rows_of_four(lengths, heads, width)
    for s in (0, 1, 2):
        own = slice(starts[s], starts[s + 1])
        alone = outcome(*(x[own] for x in tensors), Packing.from_lengths(lengths[s : s + 1]))
        poisoned = [torch.full_like(x, float("nan")) for x in tensors]
        for x, y in zip(poisoned, tensors, strict=True):
            x[own] = y[own]
        assert same(alone, [x[own] for x in outcome(*poisoned, Packing.from_lengths(lengths))])


def test_the_order_of_sequences_does_not_change_their_bits():
    lengths, order = (3, 70, 64, 129), (2, 0, 3, 1)
    tensors, starts = rows_of_four(lengths, (2, 2), 32, torch.float16)
    rows = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in order])
    first = outcome(*tensors, Packing.from_lengths(lengths))
    moved = outcome(*(x[rows] for x in tensors), Packing.from_lengths([lengths[s] for s in order]))
    assert same([x[rows] for x in first], moved)


@pytest.mark.parametrize("heads", [(2, 2), (2, 1)])
def test_copies_that_arrive_at_once_give_the_bits_of_those_that_arrive_late(emulated, heads):
    tensors, _ = rows_of_four((256, 70), heads, 88)
    late = outcome(*tensors, Packing.from_lengths((256, 70)))
    emulated.set_eager(True)
    try:
        assert same(late, outcome(*tensors, Packing.from_lengths((256, 70))))
    finally:
        emulated.set_eager(False)


def test_expanded_gradients():
    inputs, grads = draw(packed((9, 66), (2, 1), 16)), []
    leaves = [inputs[n].requires_grad_() for n in GRADS]
    for expanded in (True, False):
        out = public(OP, "cuda")(**inputs)
        one = torch.ones((), dtype=out.dtype).expand(out.shape)
        grads.append(torch.autograd.grad(out, leaves, one if expanded else one.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("length, share", [(256, 0.9), (111, 0.7)])
def test_most_of_the_matrix_work_is_useful_and_each_byte_is_fetched_once(emulated, length, share):
    inputs = draw(packed((length,), (2, 2), 80))
    emulated.work()
    public(OP, "cuda")(**inputs)
    multiplied, fetched = emulated.work()
    assert share <= 2 * 2 * length**2 * 80 / multiplied <= 1, "of two heads: scores, and sums of values"
    assert fetched == 2 * sum(inputs[n].numel() for n in GRADS)


@pytest.mark.parametrize("heads", [(2, 2), (2, 1)])
@pytest.mark.parametrize("lengths", [(256, 0, 111), (70, 3)])
def test_a_pass_is_one_launch(emulated, lengths, heads):
    inputs = draw(packed(lengths, heads, 80))
    leaves = [inputs[n].requires_grad_() for n in GRADS]
    emulated.launches()
    out = public(OP, "cuda")(**inputs)
    assert emulated.launches() == 1
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert emulated.launches() == 1


def refusal(**changes):
    inputs = {**draw(packed((20, 9), (2, 1), 16)), **changes}
    with pytest.raises(jk.BackendError) as caught:
        public(OP, "cuda")(**inputs)
    return str(caught.value)


def test_every_limit_gives_its_reason(monkeypatch):
    where = f"{OP}: backend 'cuda' must be able to run this call, got: "
    long = draw(packed((257, 3), (2, 1), 16))
    assert where + "takes at most 256 queries in a sequence, got 257; leave backend out" in refusal(**long)
    keys = draw(packed((20, 9), (2, 1), 16, key_lengths=(3, 300)))
    assert where + "takes at most 256 keys in a sequence, got 300" in refusal(**keys)
    apart = map_tensors(draw(packed((20, 9), (2, 1), 16)), lambda name, x: torch.cat([x, x[..., :3]], -1)[..., :16])
    strides = "needs {} in rows of stride 1 that begin at multiples of 16 bytes, got strides ({}, 19, 1)"
    assert where + strides.format("q", 38) in refusal(**apart)
    assert where + strides.format("v", 19) in refusal(v=apart["v"])
    assert where + "takes no frame_size" in refusal(frame_size=1)
    assert where + "takes bfloat16, float16, got float32" in refusal(**draw(packed((4,), (1, 1), 8), torch.float32))
    monkeypatch.setitem(limits._capabilities, -1, "8.0")
    assert where + "needs a GPU of compute capability 9.0, got 8.0" in refusal()


@pytest.mark.parametrize(
    "length, frame_size, step, requirement",
    [
        (300, 0, 16, "sequences must have at most 256 queries and keys"),
        (20, 5, 16, "frame_size, key_ranges and turns must not be given"),
        (20, 0, 17, "q, k and v must be in rows of stride 1 at strides of multiples of 16 bytes"),
    ],
)
def test_the_torch_op_refuses_what_its_kernels_do_not_read(length, frame_size, step, requirement):
    x = torch.zeros(1, 1, length, step, dtype=torch.bfloat16)[..., :16]
    masks = (frame_size, None, None, None, False)
    with pytest.raises(ValueError, match=f"{OP}: {requirement}; call the public function"):
        torch.ops.jepa_kernels.masked_attention_forward(x, x, x, *(None,) * 4, length, length, *masks, 1.0, "cuda")


@pytest.mark.parametrize(
    "change, requirement",
    [
        ({3: torch.tensor([0, 5, 14])}, "cu_seqlens must be int32 [S + 1], contiguous"),
        ({4: torch.tensor([[0, 5, 14]] * 3, dtype=torch.int32)}, "cu_seqlens must be int32 [S + 1], contiguous"),
        ({4: torch.tensor([0, 5, 9, 14, 20], dtype=torch.int32)[::2]}, "cu_seqlens must be int32 [S + 1], contiguous"),
        ({-4: torch.zeros(14, 2, 16)}, "grad and out must have q's shape and dtype"),
        ({-3: torch.zeros(14, 2, 16)}, "grad and out must have q's shape and dtype"),
        ({-3: torch.zeros(14, 2, 19).bfloat16()[..., :16]}, "out and lse must be what forward gave"),
        ({-2: torch.zeros(2, 13)}, "lse must be what forward gave"),
        ({-2: torch.zeros(14, 2).t()}, "out and lse must be what forward gave"),
    ],
)
def test_the_torch_op_touches_no_memory_that_is_not_its_own(change, requirement):
    """Positions from 0 on: of a forward call; below 0: what backward is given before and after q, k and v."""
    x, cu = torch.zeros(14, 2, 16).bfloat16(), torch.tensor([0, 5, 14], dtype=torch.int32)
    call = dict(enumerate([x, x, x, cu, cu, None, None, 9, 9, 0, None, None, None, False, 1.0]))
    forward, backward = (
        torch.ops.jepa_kernels.masked_attention_forward,
        torch.ops.jepa_kernels.masked_attention_backward,
    )
    outputs = dict(zip((-4, -3, -2), (x, *forward(*call.values(), "cuda")), strict=True))
    given = {**call, **outputs, **change}
    with pytest.raises(ValueError, match=f"{OP}: {re.escape(requirement)}; call the public function"):
        grad, out, lse = (given.pop(i) for i in (-4, -3, -2))
        backward(grad, *(given[i] for i in (0, 1, 2)), out, lse, *(given[i] for i in range(3, 15)), False, "cuda")


def test_compiled_calls_of_other_lengths_are_not_compiled_anew():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(public(OP, "cuda"), fullgraph=True, backend=counter)
    for lengths in ((3, 1), (9, 66), (40, 2), (5, 130)):
        inputs = draw(packed(lengths, (2, 1), 16))
        assert torch.equal(compiled(**inputs), public(OP, "cuda")(**inputs))
    assert counter.frame_count <= 2


def test_a_compiled_call_takes_a_copy_of_what_begins_between_16_bytes():
    inputs = dense(1, (2, 2), 20, 20, 16)(torch.Generator().manual_seed(0))
    rows = {n: inputs[n].bfloat16().contiguous() for n in GRADS}
    shifted = {n: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for n, x in rows.items()}
    torch._dynamo.reset()
    compiled = torch.compile(public(OP, "cuda"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**shifted), public(OP, "cuda")(**rows))


def test_it_is_the_automatic_choice_of_what_it_takes():
    short, long = (draw(packed((n, 9), (2, 1), 16)) for n in (20, 257))
    assert jk.explain(OP, **short).splitlines()[0] == f"{OP}: cuda (automatic)"
    assert jk.explain(OP, **long).splitlines()[0] == f"{OP}: cpu (automatic)"
