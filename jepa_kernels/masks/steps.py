"""The numbers of a sampler's batches, also where the workers of a DataLoader draw them."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.data

MOST_WORKERS = 1024


class Steps:
    """Counts batches in memory that a DataLoader's workers share, whether forked or spawned.

    Worker w of W takes numbers first + w, first + w + W, ...: those of its batches. All workers of an iterator begin
    at the same `first`, the number behind the last one that was taken before; iterators differ in the loader's seed.
    Each worker writes its own column alone, in the order (first, loader, next), and others read next before loader:
    so no lock is needed, and what a late worker reads of an early one is either all old or tells the same `first`.
    """

    def __init__(self) -> None:
        self._columns = torch.zeros(3, MOST_WORKERS + 1, dtype=torch.int64).share_memory_()  # the last: no worker
        self._first: int | None = None  # of the worker in which this copy lives

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._columns.share_memory_()  # a copy by pickle is a count of its own, for workers of its own

    @property
    def next(self) -> int:
        """The number behind the last one taken."""
        return int(self._columns[2].max())

    @next.setter
    def next(self, step: int) -> None:
        self._columns.zero_()
        self._columns[2, -1] = step

    def take(self) -> int:
        """The number of this batch."""
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            step, column = self.next, MOST_WORKERS
        else:
            first = self._begin(worker.id, worker.seed - worker.id) if self._first is None else self._first
            step, column = first + worker.id, worker.id
            self._first = first + worker.num_workers
        self._columns[2, column] = step + 1
        return step

    def _begin(self, worker: int, loader: int) -> int:
        behind = self.next
        firsts, loaders, _ = self._columns
        found = firsts[loaders == loader]
        first = int(found[0]) if len(found) else behind
        firsts[worker] = first
        loaders[worker] = loader
        return first
