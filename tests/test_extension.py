"""The compiled module: instruction sets kept apart, no torch symbol inside, ids checked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jepa_kernels import _C
from jepa_kernels._core import define

ROOT = Path(__file__).parents[1]
LEVELS = ("avx2", "avx512", "avx512_bf16")


def symbols(path: Path) -> list[tuple[str, str]]:
    """(kind, demangled name) of every defined symbol."""
    if shutil.which("nm") is None:
        pytest.skip("binutils' nm is not installed")
    out = subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
    return [tuple(line.split(maxsplit=2)[1:]) for line in out.splitlines() if len(line.split(maxsplit=2)) == 3]


@pytest.mark.parametrize("level", LEVELS)
def test_an_instruction_set_shares_no_function_with_another(level):
    objects = sorted((ROOT / "build" / sys.implementation.cache_tag).rglob(f"jepa_{level}.dir/**/*.o"))
    if not objects:
        pytest.skip("the object files of the build are not here (installed from a wheel)")
    for path in objects:
        # Weak (W, V) symbols are those the linker may merge with another level's copy.
        loose = [name for kind, name in symbols(path) if kind in "WV" and f"jepa::{level}::" not in name]
        assert not loose, f"{path.name}: {loose}"


def test_the_module_holds_no_torch_symbol_and_needs_no_torch_library():
    assert not [name for _, name in symbols(Path(_C.__file__)) if re.search(r"\b(c10|at|torch)::", name)]
    needed = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"NEEDED.*(torch|c10|cuda)", needed)


EVERY_OP = """
import contextlib, sys, torch
from jepa_kernels import BackendError
from jepa_kernels.ops import OPS
from jepa_kernels.testing import check_case, op_module
backend, device = sys.argv[1:]
for op in OPS:
    for case in op_module(op, "cases").CASES:
        with contextlib.suppress(BackendError):  # a kernel that the backend lacks, or limits
            check_case(op, backend, case, torch.bfloat16, device)
            print(op)
            break
"""


@pytest.mark.parametrize("backend, device", [("cpu", "cpu"), pytest.param("cuda", "cuda", marks=pytest.mark.gpu)])
def test_a_process_that_ran_every_kernel_ends_well(backend, device):
    """Destructors of static objects run when the interpreter is gone, and the driver."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    command = [sys.executable, "-c", EVERY_OP, backend, device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "ema_update" in done.stdout, done.stderr


FIRST_CALLS = """
import builtins, threading, time, torch
from jepa_kernels import _C

own = builtins.__import__

def slow(*args, **kwargs):
    time.sleep(0.05)  # gives the GIL up, as any import may
    return own(*args, **kwargs)

def call():
    _C.gather_tokens_forward_cpu(torch.randn(1, 4, 8), torch.arange(4)[None], None)
    assert _C.sizes_of(["B N E f"])(torch.ones(1, 2, 3)) == (1, 2, 3)

builtins.__import__ = slow
threads = [threading.Thread(target=call) for _ in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print("all came back")
"""


def test_first_calls_of_many_threads_do_not_wait_for_each_other():
    """What a kernel's first call looks up in torch, another thread may look up meanwhile."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "all came back" in done.stdout, done.stderr


def test_isa_levels_can_be_chosen_and_restored():
    best = _C.isa()
    assert best in LEVELS and _C.set_isa("avx2") and _C.isa() == "avx2"
    assert not _C.set_isa("sse2") and _C.isa() == "avx2"
    assert _C.set_isa("best") and _C.isa() == best


def test_first_bad_id():
    ids = torch.tensor([[0, 3, 7], [1, 2, 9]])
    assert _C.first_bad_id(ids, 10, None) == -1
    assert _C.first_bad_id(ids, 9, None) == 5
    assert _C.first_bad_id(torch.tensor([[0, 3, 3]]), 9, None) == 2
    assert _C.first_bad_id(torch.tensor([[2, -1, 3]]), 9, None) == 1
    packed, cu = torch.tensor([5, 6, 1, 2, 99]), torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    assert _C.first_bad_id(packed, 7, cu) == -1, "rows past the last sequence are not read"
    assert _C.first_bad_id(packed, 6, cu) == 1


def test_only_a_backend_file_that_is_not_there_leads_to_the_extension(monkeypatch):
    monkeypatch.setattr(define, "_implementations", {})
    assert define.implementation("gather_tokens", "forward", "cpu") is _C.gather_tokens_forward_cpu
    monkeypatch.setitem(sys.modules, "triton.language", None)  # a part of Triton that does not import
    monkeypatch.delitem(sys.modules, "jepa_kernels.ops.ema_update.triton", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"triton\.language"):
        define.implementation("ema_update", "forward", "triton")


def test_cuda_says_why_it_can_not_run():
    if torch.cuda.is_available() and _C.build_info()["cuda"]:
        assert _C.cuda_reason() == ""
    else:
        assert re.search("no usable CUDA driver|no CUDA device|JEPA_CUDA=1", _C.cuda_reason())
