"""The processes of a run: which one this is, what all must agree on, and who was silent when a time limit ended."""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 600.0  # seconds that a collective may take
MEETING = 300.0  # seconds in which all processes start
ROLL_CALL = 2.0  # seconds in which those that are left say so
C10D = "distributed_c10d.py"
LOST = re.compile(r"timed? ?out|timeout|connection (closed|reset|refused)|closed by peer|broken pipe|gloo|nccl", re.I)
REFUSALS = ValueError, TypeError, OSError, ModuleNotFoundError


class RankError(RuntimeError):
    """Another process of the run did not do its part."""


class Agreed(ValueError):
    """Raised on all ranks alike: one of them says it."""


@dataclass(frozen=True)
class Ranks:
    """rank, of `world` processes, `local` on its machine; `restarts`: how often torchrun has started them again.

    timeout: seconds that each collective may take. store: what all starts of torchrun share.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    restarts: int = 0
    timeout: float = TIMEOUT
    store: Any = field(default=None, compare=False)

    @property
    def grouped(self) -> bool:
        """Whether there is a process group, be it of one."""
        return dist.is_available() and dist.is_initialized()

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what every rank does by itself, no collective in it: what one refuses is refused on all.

        Raises on every rank: its own error where all have the same, else a ValueError with that of the lowest rank.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.world == 1:
                raise
            own = error
        if self.world == 1:
            return
        said = self._gathered(None if own is None else _text(own))
        found = [(rank, text) for rank, text in enumerate(said) if text is not None]
        if found:
            rank, text = found[0]
            if own is not None and (len(set(said)) == 1 or not isinstance(own, REFUSALS)):
                raise own
            raise ValueError(f"{text} (rank {rank})")

    def same(self, what: str, value: Mapping[str, Any], remedy: str) -> None:
        """Raise ValueError, on every rank and with one text, unless all have these values."""
        if self.world == 1:
            return
        found = self._gathered(dict(value))
        for rank, other in enumerate(found):
            for key in sorted({*found[0], *other}):
                first, own = found[0].get(key), other.get(key)
                if first != own:
                    actual = f"{key} = {first} on rank 0, {own} on rank {rank}"
                    raise ValueError(f"train: {what} must be the same on all ranks, got {actual}; {remedy}")

    def any(self, value: bool) -> bool:
        """Whether it is so on one rank at least; all must ask."""
        return value if self.world == 1 else any(self._gathered(value))

    def of_first(self, value: Any) -> Any:
        """The first rank's value, on all ranks, which all must ask for it."""
        return value if self.world == 1 else self._gathered(value)[0]

    def _gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        with self.finishing("the start", "all_gather_object"):
            dist.all_gather_object(found, value)
        return found

    @contextmanager
    def finishing(self, where: str, collective: str) -> Iterator[None]:
        """Around collectives: RankError that names the one which did not end, and the ranks that were silent.

        collective: the name of one that no frame of Python tells, such as DDP's of gradients.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or isinstance(error, RankError) or not LOST.search(str(error)):
                raise
            silent = self._silent()
            who = f"no answer of rank {', '.join(map(str, silent))}" if silent else "an answer of each, but too late"
            why = str(error).strip().split("\n")[0][:200]
            raise RankError(
                f"train: every rank must finish {_collective(error) or collective} in {where} within "
                f"{self.timeout:g} s, got {who} ({why}); look at that rank's own output, or raise --timeout"
            ) from error

    def _silent(self) -> list[int]:
        """Ranks that do not answer a roll call; all that are left call it at nearly the same time."""
        try:
            store: Any = dist.distributed_c10d._get_default_store()
            store.set(f"here/{self.rank}", b"1")
            until, missing = time.monotonic() + ROLL_CALL, list(range(self.world))
            while missing and time.monotonic() < until:
                missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
                time.sleep(0.05)
            return missing
        except RuntimeError:  # the process that kept the store is gone
            return [0]

    def refuse(self) -> None:
        """Remember that the first start was refused: torchrun starts it again, which must not end otherwise."""
        if self.store is not None and self.restarts == 0:
            self.store.set("refused", b"1")

    def refused(self) -> bool:
        return self.store is not None and self.store.check(["refused"])

    def leave(self, *, finished: bool = False) -> None:
        """The group ends; this process goes on alone. finished: all ranks come here, and part when all are there."""
        if not self.grouped:
            return
        if finished:
            with self.finishing("the end of the run", "barrier"):
                dist.barrier()
        dist.destroy_process_group()


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, REFUSALS) else f"{type(error).__name__}: {error}"


def _collective(error: BaseException) -> str | None:
    """The function of torch.distributed in which an error was raised, if it was in one."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(C10D)]
    return names[-1] if names else None


def join(device: str, timeout: float = TIMEOUT) -> tuple[Ranks, str]:
    """Join the processes that torchrun or SLURM's srun has started, if any; this one's place, and its device.

    Each process of a machine gets a GPU of its own.
    """
    found = _torchrun() or _slurm()
    if found is None:
        return Ranks(timeout=timeout), device
    rank, world, local = found
    if device == "cuda":
        device = f"cuda:{local if torch.cuda.device_count() != 1 else 0}"  # srun may show each task its own alone
    ranks = Ranks(rank, world, local, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), timeout)
    store = _meet("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", ranks)
    return replace(ranks, store=store), device


def _meet(backend: str, ranks: Ranks) -> Any:
    """Make the group; processes start at different times, and wait longer for each other then. The store behind it.

    torchrun's store outlives a restart, and with it the addresses of processes that are gone: each start has its own.
    """
    patience = timedelta(seconds=max(ranks.timeout, MEETING))
    try:
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world, timeout=patience))
        own = dist.PrefixStore(f"start {ranks.restarts}", store)
        dist.init_process_group(backend, timeout=patience, store=own, rank=ranks.rank, world_size=ranks.world)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=ranks.timeout))
        return store
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = str(error).strip().split("\n")[0][:200]
        raise RankError(
            f"train: all {ranks.world} ranks must meet at {place} within {patience.total_seconds():g} s, got: {why}; "
            "look at the other ranks' output, and whether their machines reach each other"
        ) from error


def _torchrun() -> tuple[int, int, int] | None:
    """(rank, world, rank on this machine), as torchrun tells them."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if not all(name in os.environ for name in names):
        return None
    rank, world, local = (int(os.environ[name]) for name in names)
    return rank, world, local


def _slurm() -> tuple[int, int, int] | None:
    """The same of a task of srun; the first machine of the step is where all meet."""
    names = "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    if not all(name in os.environ for name in ("SLURM_STEP_ID", *names)) or int(os.environ["SLURM_NTASKS"]) < 2:
        return None
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", "localhost"))
    os.environ.setdefault("MASTER_ADDR", first_node(nodes))
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
    rank, world, local = (int(os.environ[name]) for name in names)
    return rank, world, local


def first_node(nodes: str) -> str:
    """Of SLURM's list: "gpu[03-07,12],cpu1" -> "gpu03"."""
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    return "localhost" if found is None else found[1] + (found[2] or "")
