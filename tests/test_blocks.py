"""Large outputs of CPU kernels lie in blocks that later ones take over: never two at once, never more than was used."""

import gc
import itertools
import os
import resource
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import _C
from jepa_kernels.testing import poisoned_memory

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every output is torch's")


@pytest.fixture(autouse=True)
def _nothing_waits():
    gc.collect()
    jk.empty_cache()
    yield
    jk.empty_cache()


def output(mib: float, value: float = 1.0) -> torch.Tensor:
    """fp32 [1, n, 256] of one value, written by a kernel."""
    ids = torch.zeros(1, int(mib * MIB / 1024), dtype=torch.int64)
    ids[0] = torch.arange(ids.shape[1])
    return jk.gather_tokens(torch.full((1, 1, 256), float(value)).expand(1, ids.shape[1], 256), ids)


def test_the_next_output_of_its_size_takes_what_one_has_left():
    first = output(8)
    address = first.data_ptr()
    del first
    assert output(8).data_ptr() == address
    assert output(7).data_ptr() == address  # of about its size
    assert output(5).data_ptr() != address  # a block more than half too large is kept for larger ones
    assert address % 64 == 0


def test_small_outputs_are_torchs_own():
    before = _C.block_bytes()["held"]
    kept = output(3.9)
    assert _C.block_bytes()["held"] == before
    larger = output(4)
    assert _C.block_bytes()["held"] > before
    assert (len(kept[0]), len(larger[0])) == (3993, 4096)


def test_outputs_that_live_share_no_memory():
    sizes = (4, 9, 5, 4, 6, 13, 4, 5) * 2
    for _ in range(2):  # fresh blocks, then those that were left
        outputs = [output(size, value) for value, size in enumerate(sizes)]
        spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in outputs)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert all(bool((x == value).all()) for value, x in enumerate(outputs))
        del outputs


def test_a_view_keeps_the_memory():
    whole = output(8)
    part = whole[0, 5:7]
    del whole
    other = output(8, 2.0)
    assert bool((part == 1).all()) and bool((other == 2).all())


ONE_AT_A_TIME = """
import torch, jepa_kernels as jk
from jepa_kernels import _C

PAGE, MIB = 4096, 1 << 20  # each output takes a page more than it has

def output(mib):
    return jk.gather_tokens(torch.ones(1, 1, 256).expand(1, mib << 10, 256), torch.arange(mib << 10)[None])

def found(held, most_held, waiting):
    return {"held": held, "most_held": most_held, "waiting": waiting}

for mib in (20, 40, 80):
    output(mib)
assert _C.block_bytes() == found(0, 80 * MIB + PAGE, 140 * MIB + 3 * PAGE), _C.block_bytes()
output(160)  # the two that wait longest make room
assert _C.block_bytes()["waiting"] == 240 * MIB + 2 * PAGE, _C.block_bytes()
both = output(250), output(250)  # more at once than the 256 MiB that may always wait
assert _C.block_bytes()["waiting"] == 240 * MIB + 2 * PAGE, _C.block_bytes()
del both
assert _C.block_bytes()["waiting"] == 500 * MIB + 2 * PAGE, _C.block_bytes()
jk.empty_cache()
assert _C.block_bytes()["waiting"] == 0
both = output(150), output(150)
del both
output(20), output(100)  # what once lived no longer counts
assert _C.block_bytes()["waiting"] <= 300 * MIB + 2 * PAGE, _C.block_bytes()
"""


def test_no_more_waits_than_lived_at_once_and_all_is_given_back():
    subprocess.run([sys.executable, "-c", ONE_AT_A_TIME], check=True, cwd=Path(__file__).parents[1])


def test_threads_take_and_leave_at_once():
    wrong = []

    def work(value: int) -> None:
        for size in (4, 6, 5, 9) * 5:
            x = output(size, value)
            if not bool((x == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("one_thread")  # OpenMP's threads do not live in a fork
def test_a_forked_process_has_memory_of_its_own():
    kept, left = output(8), output(8, 3.0)
    del left
    child = os.fork()
    if child == 0:
        own = output(8, 5.0)
        os._exit(0 if bool((own == 5).all()) and bool((kept == 1).all()) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert bool((kept == 1).all())


def test_memory_that_torch_is_asked_to_fill_is_torchs():
    used = output(8, 7.0)
    del used
    held = _C.block_bytes()["held"]
    with poisoned_memory():
        filled = output(8)
    assert _C.block_bytes()["held"] == held and bool((filled == 1).all())


def test_outputs_can_be_what_tensors_can():
    x = output(8)
    assert x.is_contiguous() and x.device.type == "cpu" and x.dtype == torch.float32
    x.add_(1)
    torch.mul(x, 2, out=x)
    assert float(x.sum()) == 4.0 * x.numel()
    assert torch.equal(torch.from_numpy(x.numpy()), x)
    assert x.clone().resize_(2, *x.shape[1:]).shape[0] == 2
    with pytest.raises(RuntimeError, match="not resizable"):  # as every tensor of memory that torch did not allocate
        x.resize_(2, *x.shape[1:])
    assert x.resize_(1, 3, 256).shape == (1, 3, 256)


def test_a_gradient_in_a_block_is_added_to_and_kept():
    pred = torch.randn(2, 1024, 1024, requires_grad=True)
    target = torch.randn(2, 1024, 1024)
    want = torch.autograd.grad(jk.latent_loss(pred, target, backend="reference"), pred)[0]
    for _ in range(2):  # the second is added to the first
        jk.latent_loss(pred, target).backward()
        output(8)
    torch.testing.assert_close(pred.grad, 2 * want)


def in_a_child(work) -> int:
    """The exit code of a fork of this process that runs `work`."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def limit(mib: int) -> None:
    """Lets this process map so much more."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + mib * MIB,) * 2)


@pytest.mark.usefixtures("one_thread")
def test_no_memory_is_torchs_error():
    def work() -> int:
        limit(100)
        try:
            output(200)
        except RuntimeError as error:
            return 0 if "memory" in str(error) else 2
        return 1

    assert in_a_child(work) == 0


@pytest.mark.usefixtures("one_thread")
def test_what_waits_makes_room_for_an_output():
    def work() -> int:
        output(90)
        waited = _C.block_bytes()["waiting"]
        limit(80)
        large = output(130)  # not without the 90
        written = float(large.min()) == float(large.max()) == 1  # which needs no memory
        return 0 if waited > 90 * MIB and _C.block_bytes()["waiting"] == 0 and written else 1

    assert in_a_child(work) == 0


def test_sizes_past_counting_are_torchs_error():
    x, ids = torch.ones(1, 1, 1).expand(1, 1, 2**41 + 1), torch.zeros(2**21, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError):
        jk.gather_tokens(x.expand(1, 1, -1), ids[:1].expand(2**21, 1).contiguous())
