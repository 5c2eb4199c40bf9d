"""The kernels that a test of an op runs on."""

import pytest

from jepa_kernels import _C

LEVELS = [level for level in ("avx2", "avx512", "avx512_bf16") if _C.set_isa(level)]
_C.set_isa("best")


@pytest.fixture(params=[*LEVELS, pytest.param("triton", marks=pytest.mark.interp)])
def backend(request):
    """Each instruction set of the cpu kernel, and Triton in its interpreter."""
    if request.param == "triton":
        yield "triton"
        return
    _C.set_isa(request.param)
    yield "cpu"
    _C.set_isa("best")
