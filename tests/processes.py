"""Checks that run in several processes which talk through gloo: one import of torch for all checks of all files."""

import gc
import multiprocessing
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


@contextmanager
def gloo(rank, world, store, minutes=1):
    """A group of single-threaded processes, by the path of its store, new to each group.

    Its threads end with the last reference to it, which tracebacks hold as well: one that is left when a spawned
    process ends may want to free a tensor then, and aborts it.
    """
    torch.set_num_threads(1)
    np.random.seed()  # forked processes begin with the same numbers
    dist.init_process_group("gloo", f"file://{store}", timedelta(minutes=minutes), world, rank)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


def forked():
    """How processes start that take pickles, as spawned ones do, and need import nothing that takes seconds.

    They fork from one that has done so and has no thread, in the environment of the first start.
    """
    multiprocessing.set_forkserver_preload(["__main__", "torch._dynamo", "jepa_kernels"])
    return "forkserver"


def side_by_side(work, given, world):
    """work(rank, *given) in so many processes."""
    torch.multiprocessing.start_processes(work, given, nprocs=world, start_method=forked())


class Checks:
    """The checks of a file, by name, in its order.

    given: what a check takes besides the folder that all share, a function of its rank and their number.
    """

    def __init__(self, given=None):
        self.known, self.given = {}, given

    def __iter__(self):
        return iter(self.known)

    def on(self, ranks):
        """A check that runs in so many processes."""

        def keep(check):
            self.known[check.__name__] = check, ranks
            return check

        return keep

    def run(self, folder):
        """All of them: how each failed, or nothing, is left in the folder."""
        most = max(ranks for _, ranks in self.known.values())
        side_by_side(_run, (folder, self.known, self.given), most)

    def passed(self, name, folder):
        """Assert that a check failed on no rank."""
        failures = [Path(folder, f"{name}.{rank}").read_text() for rank in range(self.known[name][1])]
        assert not any(failures), "\n".join(failures)


def _run(rank, folder, known, given):
    """Every check in turn, each in a group of its own."""
    for name, (check, world) in known.items():
        if rank < world:
            with gloo(rank, world, Path(folder, f"{name}.store"), minutes=3):
                failure = _failure(check, folder, *([] if given is None else [given(rank, world)]))
                Path(folder, f"{name}.{rank}").write_text(failure)


def _failure(check, *given):
    try:
        check(*given)
    except BaseException:
        return traceback.format_exc()
    return ""
