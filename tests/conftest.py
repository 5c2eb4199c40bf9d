"""One seed and two threads for every test; Triton's interpreter made exact where it is on; shards of the tests."""

import os
import signal

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a script runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children are interrupted in the tests

torch.set_num_threads(min(2, torch.get_num_threads()))

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    from jepa_kernels.verify import interpreter

    interpreter.install()


@pytest.fixture(scope="module")
def one_thread():
    """For tests of networks so small that they leave the threads to wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="of the chosen tests, every N-th from the I-th (0, 1, ...) on")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shard"):
        first, step = map(int, config.getoption("--shard").split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % step != first])
        items[:] = items[first::step]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
