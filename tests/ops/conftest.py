"""The kernels that a test of an op runs on."""

import pytest
import torch

from jepa_kernels import _C

LEVELS = [level for level in ("avx2", "avx512", "avx512_bf16") if _C.set_isa(level)]
_C.set_isa("best")


DEVICE = torch.device("cuda", 0)


class OnADevice(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU, for checks that ask where it is before they read it."""

    device, is_cpu = DEVICE, False


def on_a_device(value):
    return torch.tensor(value, dtype=torch.float64).as_subclass(OnADevice)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[*LEVELS, pytest.param("triton", marks=pytest.mark.interp)])
def backend(request):
    """Each instruction set of the cpu kernel, and Triton in its interpreter."""
    if request.param == "triton":
        yield "triton"
        return
    _C.set_isa(request.param)
    yield "cpu"
    _C.set_isa("best")
