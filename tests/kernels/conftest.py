"""A driver with no GPU behind it, for tests that inspect machine code."""

import pytest
from triton.runtime import driver

from jepa_kernels._core import select
from tests.kernels.target import Target


@pytest.fixture(scope="module")
def target():
    """Launches on CPU tensors compile; the driver of this machine, if it has one, comes back afterwards."""
    before, reason = driver._active, select._availability.get(("triton", "cpu"))
    driver.set_active(Target())
    select._availability["triton", "cpu"] = None
    yield driver.active
    driver._active = before
    select._availability["triton", "cpu"] = reason
    select._ready.clear()
