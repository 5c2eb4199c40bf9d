"""The CUDA kernels that go through tables of chunks, with no GPU: their own sources and bindings, built for the host.

tests/kernels/emulation stands in for CUDA: threads that change over at barriers; an access that is not aligned faults.
Memory is poisoned, so that an element that no thread writes shows.
"""

from types import SimpleNamespace

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import chunks
from jepa_kernels._core import extension, select
from jepa_kernels.testing import DTYPES, cast, check_case, op_module, poisoned_memory, public, run
from tests.kernels.on_host import CSRC, HERE, build

pytestmark = pytest.mark.compile
OPS = ("adamw_ema", "ema_update", "grad_norm")
EMULATION = HERE / "emulation"
CASES = [pytest.param(op, case, id=f"{op}-{case.name}") for op in OPS for case in op_module(op, "cases").CASES]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunks")
    binds = [CSRC / op / name for op, name in zip(OPS, ("bind_cuda.cpp", "bind.cpp", "bind_cuda.cpp"), strict=True)]
    together = folder / "bindings.cpp"  # reading pybind11 takes longer than all of their own
    parts = (EMULATION / "chunks.cpp", CSRC / "common" / "tensor_lists.cpp", *binds)
    together.write_text("".join(f'#include "{part}"\n' for part in parts))
    sources = {**dict.fromkeys((CSRC / op / "cuda.cu" for op in OPS), "-O2"), together: "-O0"}
    flags = ("-DJEPA_CUDA=1", "-mf16c", "-mfma", "-ffp-contract=off")
    return build(folder, "chunks", EMULATION, sources, *flags)


@pytest.fixture(autouse=True)
def _cuda_backend_on_the_host(emulated, monkeypatch):
    for name in (n for n in dir(emulated) if n.endswith("_cuda")):
        monkeypatch.setattr(extension.load(), name, getattr(emulated, name), raising=False)
    monkeypatch.setitem(select._availability, ("cuda", "cpu"), None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    chunks._kept.clear()
    chunks._passing.clear()


def results(op, backend, case, dtype):
    inputs = cast(case.make(torch.Generator().manual_seed(0)), dtype, "cpu", case.keep)
    with poisoned_memory():
        return run(public(op, backend), inputs, case)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(7), b[n].nan_to_num(7)) for n in a)


@pytest.mark.parametrize("op, case", CASES)
def test_shared_cases_are_within_the_error_budget_and_have_the_bits_of_the_cpu_kernel(op, case):
    for dtype in DTYPES:
        for parity in check_case(op, "cuda", case, dtype):
            assert parity.ok, f"{dtype} {parity}"
        assert same(results(op, "cuda", case, dtype), results(op, "cpu", case, dtype)), dtype


def anywhere(inputs, starts):
    """The same tensors within longer ones of sevens, each from an element on that `starts` draws."""
    whole = []

    def move(t):
        if t is None or t.dim() == 0:
            return None if t is None else t.clone()
        around = torch.full((t.numel() + 16,), 7.0, dtype=t.dtype)
        start = int(torch.randint(0, 9, (), generator=starts))
        whole.append((around, start, t.numel()))
        around[start : start + t.numel()] = t.flatten()
        return around[start : start + t.numel()].view(t.shape)

    return {k: [move(t) for t in v] if isinstance(v, list) else v for k, v in inputs.items()}, whole


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "op, name", [(OPS[0], "both_shadows"), (OPS[0], "missing_entries"), (OPS[1], "lerp_0.99925_torch.bfloat16")]
)
def test_tensors_may_start_at_any_address_and_nothing_around_them_changes(op, name, seed):
    case = next(c for c in op_module(op, "cases").CASES if c.name == name)
    draw = torch.Generator().manual_seed(seed)
    for dtype in DTYPES:
        plain = cast(case.make(torch.Generator().manual_seed(seed)), dtype, "cpu", case.keep)
        moved, whole = anywhere(plain, draw)
        found, expected = run(public(op, "cuda"), moved, case), run(public(op, "cpu"), plain, case)
        assert same(found, expected)
        for around, start, count in whole:
            assert around[:start].eq(7).all() and around[start + count :].eq(7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 1, 2, 8])
def test_grad_norm_of_tensors_that_start_anywhere(dtype, start):
    grads = [torch.randn(n + start).to(dtype)[start:] for n in (0, 1, 3, 40_000, 16_384, 100)]
    mixed = [g.to(d) for g, d in zip(grads, (*DTYPES, *DTYPES), strict=True)]
    for given in (grads, mixed):
        exact = torch.cat([g.double() for g in given]).norm().item()
        assert jk.grad_norm(given, backend="cuda").item() == pytest.approx(exact, rel=1.2e-7)
    grads[3][-1] = float("inf")
    assert jk.grad_norm(grads, backend="cuda").item() == float("inf")


TOO_OLD = "needs a driver of CUDA 13.2 for a GPU of compute capability {}, got one of 13.0"


@pytest.mark.parametrize(
    "devices, driver, reason",
    [
        ([], 13020, "no CUDA device"),
        ([75], 13020, "needs a GPU of compute capability 8.0 or later, got 7.5"),
        ([80], 13000, ""),
        ([89], 13000, ""),
        ([90], 13000, ""),
        ([100], 13020, ""),
        ([100], 13000, TOO_OLD.format("10.0")),
        ([121], 13000, TOO_OLD.format("12.1")),
        ([61, 86], 13000, ""),
        ([90], 12080, "no usable CUDA driver: CUDA driver version is insufficient"),
    ],
)
def test_a_build_says_on_which_devices_it_has_kernels(emulated, devices, driver, reason):
    """Built with CUDA 13.2 here: machine code for 8.x and 9.0, PTX for later GPUs, which an older driver can't read."""
    assert emulated.cuda_reason(devices, driver) == reason
