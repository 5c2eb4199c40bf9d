"""Checkpoints of a training run: written while it goes on, published whole or not at all, checked before a resume.

    OUT/checkpoints/step-00000050/*.distcp   tensors by name, each rank's share in a file (torch.distributed.checkpoint)
    OUT/checkpoints/step-00000050/.metadata  where each tensor lies
    OUT/checkpoints/step-00000050/state.json format, config, step, world, versions, scores; size and crc32 of the others
    OUT/checkpoints/best                     a link to the best of them, where logging.best names a score

What several ranks saved any other number loads, see `state`. `.metadata` is a pickle: --resume trusts the folder of a
run as it trusts code. The crc32 finds what broke, not what somebody forged.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from jepa_kernels import __version__
from jepa_kernels._core.check import fail
from jepa_kernels.configs import BEST, Config
from jepa_kernels.files import replacing
from jepa_kernels.report import CHECKPOINTS, SaveError, unwritable
from jepa_kernels.training.disk import Writer, measure, remove, sync
from jepa_kernels.training.ranks import RankError, Ranks
from jepa_kernels.training.state import ABOUT, FORMAT

LINK = "best"
OLDER = "latest.pt"  # what versions before 0.1.0 wrote


def versions() -> dict[str, str]:
    return {"jepa_kernels": __version__, "torch": torch.__version__}


def place(out: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return out / CHECKPOINTS / f"step-{step:08d}"


def steps(out: Path) -> list[int]:
    """Of all published checkpoints, ascending. ValueError for a folder in which an older version wrote."""
    if (out / OLDER).exists():
        actual, remedy = "one of an older version", "finish the run with that version, or pass another --out"
        fail("train", f"checkpoint {out / OLDER}", f"be of format {FORMAT}", actual, remedy)
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in (out / CHECKPOINTS).glob("step-*")]
    return sorted(int(name[1]) for name in found if name)


def newest(out: Path, ranks: Ranks, then: str = "continuing from") -> Path:
    """The newest checkpoint that is whole, found by the first rank for all; stderr says which newer ones are not.

    Every rank must call it. Raises ValueError on all of them where there is none.
    """
    found = ranks.of_first(_search(out, then) if ranks.first else None)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _search(out: Path, then: str) -> Path | str:
    """The folder, or why there is none."""
    try:
        paths = [place(out, step) for step in reversed(steps(out))]
        if not paths:
            remedy = "pass the run's, or leave out --resume and --export"
            fail("train", "--out", "hold a checkpoint", f"none in {out / CHECKPOINTS}", remedy)
        damaged: list[str] = []
        for path in paths:
            why = damage(path)
            if why is None:
                for line in damaged:
                    print(f"{line}; {then} {path}", file=sys.stderr)
                return path
            damaged.append(f"train: checkpoint {path} must be whole, got {why}")
        return f"{damaged[0]}; no other of the {len(paths)} in {out / CHECKPOINTS} is whole: pass another --out"
    except (ValueError, OSError) as error:  # the other ranks wait for this one
        return str(error)


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, as the sizes and crc32s in its state.json tell."""
    try:
        about = json.loads((path / ABOUT).read_bytes())
    except (OSError, ValueError) as error:
        return f"no {ABOUT}" if isinstance(error, FileNotFoundError) else f"a torn {ABOUT} ({error})"
    files = about.get("files") if isinstance(about, dict) else None
    for name, told in files.items() if isinstance(files, dict) else ():  # of another format: refused when it is read
        try:
            found = measure(path / name)
        except OSError as error:
            return f"no {name}" if isinstance(error, FileNotFoundError) else f"{name} unreadable ({error.strerror})"
        if not isinstance(told, list) or len(told) != 2:
            return f"a torn {ABOUT} (files: {told!r})"
        if list(found) != told:
            return f"{name} of {found[0]} bytes, not {told[0]}" if found[0] != told[0] else f"{name} of another crc32"
    return None


class Saves:
    """Saves a run while it goes on: the loop waits for a copy of its state, a thread writes the copy.

    At most one save is under way: the next one, and the end of the `with`, wait for it and raise its SaveError. Every
    rank makes one and saves the same steps, after which all that is shared is the group of these threads.

    out: of the run. step: of the checkpoint it goes on from, or 0. pin: the copies' memory, for GPUs; it is kept.
    .step: of the last checkpoint that was begun.
    """

    def __init__(self, out: Path, config: Config, ranks: Ranks, step: int = 0, *, pin: bool = False) -> None:
        self.out, self.config, self.ranks, self.step = out, config, ranks, step
        self._took: dict[str, float] = {}
        self._stager = DefaultStager(StagingOptions(pin, False, False, False))
        self._running: tuple[int, int, Any] | None = None
        self._seen: list[Mapping[str, float]] = []
        with ranks.together():
            self._scores = self._start() if ranks.first else {}
        self._group = None
        if ranks.grouped:  # collectives of another thread need a group of their own
            with ranks.finishing("the start", "new_group"):
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout))
        else:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said at every save

    def _start(self) -> dict[int, float | None]:
        """{step: score} of what is there up to the present step: later ones are damaged, or about to be done again."""
        for path in (self.out / CHECKPOINTS).glob(".*.part"):
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
        return {step: self._score(place(self.out, step)) for step in steps(self.out) if step <= self.step}

    def _score(self, path: Path) -> float | None:
        try:
            return json.loads((path / ABOUT).read_bytes())["scores"].get(self.config.logging.best)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or foreign
            return None

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception) and not isinstance(error, RankError):
            with suppress(SaveError, RankError):  # what ended the run is to be read
                self.wait()
        self._stager.close()

    def seen(self, row: Mapping[str, Any]) -> None:
        """A row of the log, whose means since the checkpoint before are the scores of the next one."""
        self._seen.append({name: row[name] for name in BEST})

    def took(self) -> dict[str, float]:
        """{"save_s": seconds that the last save kept the loop}, once."""
        taken, self._took = self._took, {}
        return taken

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Begin to save `state`, which the loop may change as soon as this returns."""
        began = time.perf_counter()
        self.wait()
        means = {name: sum(row[name] for row in self._seen) / len(self._seen) for name in BEST if self._seen}
        about = {"format": FORMAT, "config": self.config.plain(), "step": step, "world": self.ranks.world}
        about |= {"versions": versions(), "scores": {name: x for name, x in means.items() if math.isfinite(x)}}
        writer = Writer(self._part(step), partial(self._publish, about))
        size = sum(x.numel() * x.element_size() for x in state.values())
        parts: dict[str, dict[str, Tensor]] = {}  # torch logs each entry: better a few than one for each tensor
        for name, x in state.items():
            kind, _, rest = name.partition(".")
            parts.setdefault(kind, {})[rest] = x
        future = dcp.async_save(parts, storage_writer=writer, async_stager=self._stager, process_group=self._group)
        self._running, self._seen, self.step = (step, size, future), [], step
        self._took = {"save_s": time.perf_counter() - began}

    def wait(self) -> None:
        """Until the save under way is published; SaveError, on all ranks, if it can't be written on one."""
        if self._running is None:
            return
        (step, size, future), self._running = self._running, None
        try:
            with self.ranks.finishing(f"the save of step {step}", "gather_object"):
                future.result()
        except CheckpointException as error:
            if self.ranks.first:
                shutil.rmtree(self._part(step), ignore_errors=True)
            cause = next(iter(error.failures.values()))[0]
            raise unwritable(place(self.out, step), cause, size) if isinstance(cause, OSError) else cause from error

    def _part(self, step: int) -> Path:
        path = place(self.out, step)
        return path.with_name(f".{path.name}.part")

    def _publish(self, about: dict[str, Any], files: dict[str, list[int]]) -> None:
        """On the first rank, in the thread, when the files of all ranks are on the disk."""
        step = about["step"]
        part, path = self._part(step), place(self.out, step)
        absent = [name for name in files if not (part / name).exists()]
        if absent:
            remedy = "pass one on a disk of all machines"
            fail("train", "--out", "be a folder that all ranks share", f"no {absent[0]} in {part}", remedy)
        with replacing(part / ABOUT) as beside:
            beside.write_text(json.dumps({**about, "files": files}, indent=1) + "\n")
        sync(part)
        if path.exists():  # a damaged one, or step 0 again
            remove(path)
        os.replace(part, path)
        sync(path.parent)
        self._scores[step] = about["scores"].get(self.config.logging.best)
        self._keep()

    def _keep(self) -> None:
        """The last few and the best stay. The link moves at once, and nothing that it names is ever removed."""
        link, best = self.out / CHECKPOINTS / LINK, self._best()
        if best is None:
            link.unlink(missing_ok=True)
        elif not link.is_symlink() or os.readlink(link) != place(self.out, best).name:
            beside = link.with_name(f".{LINK}.part")
            beside.symlink_to(place(self.out, best).name)
            os.replace(beside, link)
        kept = {*sorted(self._scores)[-self.config.logging.keep :], best}
        self._scores = {step: score for step, score in self._scores.items() if step in kept}
        for step in steps(self.out):
            if step not in kept:
                with suppress(OSError):  # the new one is whole
                    remove(place(self.out, step))

    def _best(self) -> int | None:
        scored = {step: score for step, score in self._scores.items() if score is not None}
        choose = {"lowest": min, "highest": max}.get(BEST.get(self.config.logging.best, ""))
        return choose(scored, key=lambda step: scored[step]) if choose and scored else None
