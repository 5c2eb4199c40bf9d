"""Bytes that ops state of their calls, against the places in memory of what goes into a torch op and comes out of it.

That Triton kernels touch as many is counted in `tests/kernels/test_traffic.py`.
"""

import importlib
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jepa_kernels as jk
from jepa_kernels.cost import distinct, elements, nbytes, places, total
from jepa_kernels.ops import OPS
from jepa_kernels.profiling.notes import Notes
from jepa_kernels.testing import cast, op_module

WRITTEN = ("shadow", "online_shadow", "target_shadow")  # changed arguments that are not read
KEPT = ("out", "lse")  # of attention: the CPU's kernel computes them again, the others read them


def tensors(*values):
    flat = [t for x in values for t in (tensors(*x) if isinstance(x, (list, tuple)) else [x])]
    return [t for t in flat if isinstance(t, torch.Tensor)]


def memory(*values):
    """Bytes of the places that tensors, or lists of them, have in memory, each counted once."""
    seen = defaultdict(list)
    for t in tensors(*values):
        storage = t.untyped_storage()
        numbers = torch.arange(storage.nbytes() // t.element_size())
        seen[storage.data_ptr(), t.element_size()].append(
            numbers.as_strided(t.shape, t.stride(), t.storage_offset()).flatten()
        )
    return sum(size * len(torch.cat(where).unique()) for (_, size), where in seen.items())


class Traffic(TorchDispatchMode):
    """Of every call of a kernel: its note, and the bytes of what it needs and of what comes out."""

    def __init__(self):
        super().__init__()
        self.notes, self.calls = Notes(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "jepa_kernels":
            return function(*args, **(kwargs or {}))
        known, given = len(self.notes), list(zip(function._schema.arguments, args, strict=True))
        moved = memory([x for a, x in given if a.alias_info is not None])  # written
        out = function(*args, **(kwargs or {}))
        if len(self.notes) > known:
            note = self.notes[known]
            read = [x for i, (a, x) in enumerate(given) if a.name not in WRITTEN and needed(function, args, i, out)]
            self.calls.append((note, moved + memory(read) + memory(out)))
        return out


def needed(function, args, i, out):
    """Whether a result changes with argument i; of what is changed in place, or a whole number: yes."""
    x = args[i]
    name = function._schema.arguments[i].name
    if name in KEPT or not isinstance(x, torch.Tensor) or not x.is_floating_point() or not tensors(out):
        return True
    other = function(*args[:i], torch.full_like(x, torch.nan), *args[i + 1 :])
    return any(not torch.equal(a, b) for a, b in zip(tensors(out), tensors(other), strict=True))


def run(call):
    """Forward, and the backward pass where there is one."""
    out = call()
    outs = [x for x in tensors(out) if x.requires_grad]
    if outs:
        torch.autograd.backward(outs, [torch.randn_like(x) for x in outs])


def traffic(call):
    with Traffic() as mode:
        mode.notes.begin()
        try:
            run(call)
        finally:
            mode.notes.end()
    return mode.calls


def counted(call):
    """{stage: cost} of what a call, and the backward pass of its sum where it has one, launches."""
    with jk.profile() as p:
        run(call)
    notes = p._notes
    stages = {note.stage for note in notes}
    return {stage: total(note.cost() for note in notes if note.stage == stage) for stage in stages}


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def every(n, *rows):
    return torch.stack([torch.arange(first, first + n) for first in rows])


def test_what_is_expanded_or_shared_counts_once():
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert (elements(x, [x, None]), nbytes(x, None), nbytes([x, x])) == (30, 30, 60)
    assert elements(x[:, None].expand(3, 7, 5)) == 15 and elements(x[:0].expand(0, 5)) == 0
    assert memory(x, [x[1:]], None, x[:, None].expand(3, 7, 5)) == 30 and memory(x[:, ::2]) == 18
    assert len(places(x, None, x.view(3, 5), x.clone())) == 2
    ids = every(4, 0, 0, 2, 1)  # two masks of two images: 0..5 of the first, 0..4 of the second
    assert distinct(ids, None, 2) == 6 + 5
    cu = torch.tensor([0, 1, 5, 9, 9], dtype=torch.int32)  # packed: 1 and 4 of the first, 4 and none of the second
    assert distinct(torch.tensor([0, 0, 1, 2, 3, 0, 1, 2, 3]), cu, 2) == 4 + 4


BF16 = torch.bfloat16
PACKING = jk.Packing.from_lengths([300, 100, 112])


def attend(dtype=torch.float32, **options):
    return jk.masked_attention(
        leaf(512, 4, 32, dtype=dtype), *(leaf(512, 2, 32, dtype=dtype) for _ in "kv"), PACKING, **options
    )


def attend_one_qkv():
    return jk.masked_attention(*leaf(512, 3, 4, 32, dtype=BF16).unbind(1), PACKING, rope=rope())


def rope(**options):
    return jk.Rope(torch.rand(512, 2), **options)


def embed(pixels, **options):
    weight, bias = leaf(32, 3, 8, 8), leaf(32)
    return jk.embed_patches(pixels, every(64, 0, 0), weight, bias, leaf(64, 32), **options)


def step(shadows, targets=True):
    new = lambda dtype=torch.float32: [torch.rand(50, 70).to(dtype), torch.rand(30).to(dtype)]  # noqa: E731
    copies = {n: new(BF16) for n in WRITTEN[1:]} if shadows else {}
    steps = [torch.zeros(()) for _ in range(2)]
    jk.adamw_ema(new(), new(), new(), new(), steps, new() if targets else None, lr=0.1,
                 **({"momentum": 0.9} if targets else {}), **copies)  # fmt: skip


def average(shadow):
    copies = [torch.zeros(500).to(BF16)] if shadow else None
    jk.ema_update([torch.rand(500)], [torch.rand(500)], 0.9, shadow=copies)


def assemble():
    ids = every(30, 0, 0), every(34, 30, 30)
    return jk.assemble_tokens(leaf(2, 30, 64), leaf(1, 64), *ids, torch.randn(64, 64))


# All tokens are named: what is read of them is the whole tensor.
CALLS = {
    "masked_attention": attend,
    "masked_attention, bf16 and a table": lambda: attend(BF16, rope=rope()),
    "masked_attention, two tables": lambda: attend(rope=rope(k_positions=torch.rand(512, 2))),
    "masked_attention, views of a product": attend_one_qkv,
    "masked_attention, ranges": lambda: attend(key_ranges=torch.tensor([[0, 50]] * 512, dtype=torch.int32)),
    "masked_attention, dense": lambda: jk.masked_attention(*(leaf(2, 3, 64, 16) for _ in range(3))),
    "embed_patches": lambda: embed(torch.randn(2, 3, 64, 64)),
    "embed_patches, of bytes": lambda: embed(
        torch.randint(255, (2, 3, 64, 64), dtype=torch.uint8), mean=[0.5] * 3, std=[1.0] * 3
    ),
    "embed_patches, gradient of pixels": lambda: embed(leaf(2, 3, 64, 64)),
    "linear": lambda: jk.linear(leaf(2, 64, 32), leaf(24, 32), leaf(24), backend="cpu"),
    "linear, frozen weights": lambda: jk.linear(leaf(128, 32), torch.randn(24, 32), backend="cpu"),
    "linear, frozen rows": lambda: jk.linear(torch.randn(128, 32), leaf(24, 32), leaf(24), backend="cpu"),
    "linear, GELU": lambda: jk.linear(leaf(128, 32), leaf(24, 32), activation="gelu", backend="cpu"),
    "latent_loss": lambda: jk.latent_loss(leaf(2, 64, 32), torch.randn(2, 64, 32), every(64, 0, 0)) * 2,
    "latent_loss, bf16": lambda: jk.latent_loss(leaf(2, 64, 32, dtype=BF16), torch.randn(2, 64, 32).to(BF16)) * 2,
    "gather_tokens": lambda: jk.gather_tokens(leaf(2, 64, 32, dtype=BF16), every(64, 0, 0)),
    "assemble_tokens": assemble,
    "ema_update": lambda: average(False),
    "ema_update, a copy": lambda: average(True),
    "adamw_ema": lambda: step(False),
    "adamw_ema, two copies": lambda: step(True),
    "adamw_ema, no targets": lambda: step(False, False),
    "grad_norm": lambda: jk.grad_norm([torch.rand(50, 70), torch.rand(300).to(BF16)]),
    "rope": lambda: jk.rope(leaf(512, 4, 16), torch.rand(512, 2)),
    "rope, one table": lambda: jk.rope_qk(
        leaf(512, 4, 16, dtype=BF16), leaf(512, 4, 16, dtype=BF16), torch.rand(512, 2)
    ),
    "rope, a table of all clips": lambda: jk.rope_qk(leaf(3, 2, 64, 16), leaf(3, 2, 64, 16), torch.rand(64, 2)),
    "rope, two tables": lambda: jk.rope_qk(
        leaf(512, 2, 16), leaf(512, 2, 16), torch.rand(512, 2), k_positions=torch.rand(512, 2)
    ),
    "info_nce": lambda: jk.info_nce(leaf(64, 128), leaf(64, 128), 0.1),
    "info_nce, bf16": lambda: jk.info_nce(leaf(64, 128, dtype=BF16), leaf(64, 128, dtype=BF16), 0.1),
    "collapse_stats": lambda: jk.collapse_stats(torch.randn(8, 40, 32)),
    "sigreg": lambda: jk.sigreg(leaf(2, 128, 64), slices=32, knots=5),
    "distance_weights": lambda: jk.distance_weights(every(64, 0, 64), every(64, 128, 64), (1, 16, 16)),
}


@pytest.mark.parametrize("name", CALLS)
def test_bytes_are_those_of_what_goes_in_and_out(name):
    torch.manual_seed(0)
    calls = traffic(CALLS[name])
    assert {note.op for note, _ in calls} <= {name.split(",")[0], "rope"}
    for note, moved in calls:
        assert note.cost().bytes == pytest.approx(moved, rel=0.05), note.event


def test_bytes_of_every_pass_are_counted():
    launched = {note.event for call in CALLS.values() for note, _ in traffic(call)}
    assert launched == {f"jepa_kernels::{op}_{stage}" for op in OPS for stage in stages(op)}


def stages(op):
    """Of its torch schemas."""
    start = f"jepa_kernels::{op}_"
    found = {o.removeprefix(start) for o in torch._C._dispatch_get_all_op_names() if o.startswith(start)}
    return found - {"qkv"}  # the twin of a form, which compiled code traces


def test_tokens_that_masks_share_or_leave_out():
    """Read once, or not at all: 11 of two images here, of 16 rows that are asked for."""
    ids = every(4, 0, 0, 2, 1)
    whole = {
        "gather_tokens": lambda ids: jk.gather_tokens(torch.randn(2, 9, 32), ids),
        "latent_loss": lambda ids: jk.latent_loss(torch.randn(*ids.shape, 32), torch.randn(2, 9, 32), ids),
    }
    for op, call in whole.items():
        found, all_ = (counted(lambda c=call, i=i: (c(i), None)[1])["forward"].bytes for i in (ids, every(9, 0, 0)))
        row = 4 * 32 + 4 * 32 + 8  # the token that is asked for, and its id
        assert found == 16 * (row - 4 * 32) + 11 * 4 * 32 and all_ == 18 * row, op
    pixels, weight = torch.randn(2, 3, 16, 16), leaf(8, 3, 4, 4)
    found, all_ = (counted(lambda i=i: jk.embed_patches(pixels, i, weight))["forward"] for i in (ids, every(16, 0, 0)))
    rows, patch = 4 * 8 + 8, 4 * 3 * 4 * 4
    assert all_.bytes - found.bytes == (32 - 16) * rows + (32 - 11) * patch


def test_an_optimizer_is_noted_though_it_keeps_its_lists():
    p = leaf(6, 4)
    optimizer = jk.AdamWEMA([p], [torch.zeros(6, 4)])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.ones_like(p)
    with jk.profile() as profile:
        optimizer.step()
    (note,) = profile._notes
    assert note.op == "adamw_ema" and note.cost().bytes == 9 * nbytes(p) and optimizer.state[p]["step"] == 2


def test_a_parameter_without_gradient_is_followed():
    shapes = (5, 7), (3,)
    params, targets, m, v = ([torch.zeros(s) for s in shapes] for _ in range(4))
    m[1] = v[1] = None
    copies = [torch.zeros(s).bfloat16() for s in shapes]
    steps = [torch.zeros(()), None]
    call = lambda: jk.adamw_ema(  # noqa: E731
        params, [torch.ones(5, 7), None], m, v, steps, targets, lr=0.1, momentum=0.9, target_shadow=copies
    )
    # 35 are trained: 8 bytes each of p, m, v and target, 4 of the gradient, 2 of the copy; 3 are followed.
    assert counted(call)["forward"].bytes == 35 * 38 + 3 * (4 + 8 + 2)


def test_distances_of_packed_tokens():
    contexts, targets = every(4, 0, 4), every(3, 8, 12)
    found = counted(lambda: jk.distance_weights(contexts, targets, (1, 4, 4)))
    packings = dict(packing=jk.Packing.uniform(2, 4), target_packing=jk.Packing.uniform(2, 3))
    packed = counted(lambda: jk.distance_weights(contexts.view(-1), targets.view(-1), (1, 4, 4), **packings))
    assert packed == found


@pytest.mark.parametrize("op", OPS)
def test_every_stage_of_every_op_has_its_cost(op):
    """Of the typical case that the suites share, and of the empty one."""
    module = importlib.import_module(f"jepa_kernels.ops.{op}.cost")
    assert stages(op) == {name for name in stages(op) if callable(getattr(module, name, None))}
    first, *others = op_module(op, "cases").CASES
    for case in (first, *(c for c in others if "empty" in c.name)):
        inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float32, torch.device("cpu"), case.keep)
        for name in case.grads:
            inputs[name].requires_grad_()
        found = counted(lambda inputs=inputs: (getattr(jk, op)(**inputs), None)[1])
        for cost in found.values():
            assert cost.bytes >= 0 and cost.flops >= 0 and (cost.bytes > 0 or "empty" in case.name), case.name
