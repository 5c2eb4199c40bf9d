"""What each program of a launch reads and writes, in Triton's interpreter: races, stray addresses, memory read unset.

Programs run one after another there, so that a race changes nothing by itself. Here they run from last to first, memory
that nobody set holds NaN, and of every launch it is told which program touched what.
"""

import os

import numpy as np
import pytest
import torch

import jepa_kernels as jk
from jepa_kernels._core.info import kernels
from jepa_kernels._core.select import short
from jepa_kernels.ops import OPS
from jepa_kernels.ops.sigreg import triton as sigreg
from jepa_kernels.testing import op_module
from jepa_kernels.verify.checks import budget, dtypes_of

pytestmark = pytest.mark.interp
if os.environ.get("TRITON_INTERPRET", "0") == "1":  # kernels are interpreted or compiled from their decoration on
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    @triton.jit
    def _neighbour_kernel(x, out, FAULT: tl.constexpr):
        """Writes out[i]; of each fault a little more."""
        i = tl.program_id(0)
        value = tl.load(x + i + (100 if FAULT == "beyond" else 0))
        tl.store(out + (i // 2 if FAULT == "twice" else i), value)
        if FAULT == "foreign" or FAULT == "back":
            tl.store(out + i, value + tl.load(out + (i ^ (FAULT == "foreign"))))


def memory_of(arguments):
    """Where the memory of these tensors begins and ends, in order."""
    tensors = [getattr(x, "base", x) for x in arguments]  # of a descriptor, what it describes
    spans = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)
    }
    begins = np.array(sorted(spans), np.uint64)
    return begins, begins + np.array([spans[int(begin)] for begin in begins], np.uint64)


class Launch:
    """What the programs of one launch touched."""

    def __init__(self, name, arguments):
        self.name, self.memory, self.program, self.read, self.written = name, memory_of(arguments), 0, [], []
        self.seen = 0  # writes before the program's last barrier, which all its threads see

    def touch(self, places, pointers, mask):
        addresses = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)])
        places.append((np.full(len(addresses), self.program), addresses))
        if places is self.read:
            back = any(np.isin(addresses, its, assume_unique=True).any() for _, its in self.written[self.seen :])
            assert not back, f"{self.name}: a program reads what it wrote, with no barrier between"
        begins, ends = self.memory
        if len(begins) and not self.name.startswith(("_ema", "_adamw", "_grad")):  # theirs come out of a table
            size = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
            inside = addresses + np.uint64(size) <= ends[np.searchsorted(begins, addresses, "right") - 1]
            assert (inside & (addresses >= begins[0])).all(), f"{self.name}: addresses outside its tensors"

    def check(self):
        if not self.written:  # no programs
            return
        writers, addresses = (np.concatenate(x) for x in zip(*self.written, strict=True))
        order = np.lexsort((writers, addresses))
        writers, addresses = writers[order], addresses[order]
        first = np.append(True, addresses[1:] != addresses[:-1])
        assert (first[1:] | (writers[1:] == writers[:-1])).all(), f"{self.name}: two programs write to one address"
        writers, addresses = writers[first], addresses[first]
        for readers, read in self.read:
            at = np.minimum(np.searchsorted(addresses, read), len(addresses) - 1)
            foreign = (addresses[at] == read) & (writers[at] != readers)
            assert not foreign.any(), f"{self.name}: a program reads what another one writes"


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Names of all that ran. Each launch is checked as it ends."""
    load, store, place = (
        getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store", "set_grid_idx")
    )
    run, names, now = GridExecutor.__call__, [], []

    def noted_load(self, pointers, mask, *rest, **options):
        now[-1].touch(now[-1].read, pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def noted_store(self, pointers, value, mask, *rest):
        now[-1].touch(now[-1].written, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def from_the_last(self, *index):
        now[-1].program = np.ravel_multi_index(index, self.grid_dim)
        self.create_barrier()
        return place(self, *(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True)))

    def launch(self, *given, **named):
        now.append(Launch(self.fn.__name__, [*given, *named.values()]))
        names.append(self.fn.__name__)
        run(self, *given, **named)
        now.pop().check()

    def barrier(self):
        now[-1].seen = len(now[-1].written)

    monkeypatch.setattr(InterpreterBuilder, "create_barrier", barrier)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", from_the_last)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty makes
    yield names
    torch.set_deterministic_debug_mode(before)


@pytest.mark.parametrize("op", [op for op in OPS if any(k.backend == "triton" for k in kernels(op))])
def test_programs_in_any_order_touch_what_is_theirs(op, launches):
    for case in op_module(op, "cases").CASES:
        *_, dtype = dtypes_of(op, "triton", case)
        for parity in budget(op, "triton", case, dtype, "cpu"):
            assert parity.ok, f"{case.name} {short(dtype)} {parity}"
    assert launches


def test_programs_of_sigreg_without_a_tile_touch_nothing(monkeypatch):
    def gradient():
        z = torch.linspace(-2, 2, 3 * 130 * 8).view(3, 130, 8).requires_grad_()
        return torch.autograd.grad(jk.sigreg(z, slices=200, knots=3, backend="triton"), z)[0]

    expected = gradient()
    monkeypatch.setattr(sigreg, "SIDE", 4)  # tiles on an axis, of six: two programs of the other have none
    assert torch.equal(gradient(), expected)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("beyond", "addresses outside its tensors"),
        ("twice", "two programs write to one address"),
        ("foreign", "a program reads what another one writes"),
        ("back", "a program reads what it wrote, with no barrier between"),
    ],
)
def test_each_fault_is_seen(fault, message):
    x, out = torch.zeros(4), torch.empty(4)
    _neighbour_kernel[(4,)](x, out, FAULT="")
    assert torch.equal(out, x)
    with pytest.raises(Exception, match=message):
        _neighbour_kernel[(4,)](x, out, FAULT=fault)
