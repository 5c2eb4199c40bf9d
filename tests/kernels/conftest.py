"""A driver with no GPU behind it, for tests that inspect machine code."""

import pytest
from triton.runtime import driver

from jepa_kernels._core import select
from tests.kernels.target import Target


@pytest.fixture(scope="module")
def target():
    """Launches on CPU tensors compile; the driver of this machine, if it has one, comes back afterwards."""
    before, known = driver._active, dict(select._availability)
    driver.set_active(Target())
    select._availability["triton", "cpu"] = None
    yield driver.active
    driver._active = before
    select._availability.clear()  # nothing may be known then that was not: None says that a backend can run
    select._availability.update(known)
    select._ready.clear()
