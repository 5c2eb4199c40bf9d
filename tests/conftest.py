"""One seed and two threads for every test; Triton's interpreter made exact where it is on."""

import os

import pytest
import torch

torch.set_num_threads(2)

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    from tests import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
