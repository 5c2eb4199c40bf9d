"""Episodes of PushT in which a scripted agent pushes the block about, collected once and kept on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jepa_kernels._core.check import fail
from jepa_kernels.data import check_part, extra
from jepa_kernels.files import replacing
from jepa_kernels.pusht.simulator import ACTION_DIM, FRAME_SKIP, REACH, SIDE, Simulator, centre, start

PARTS = ("train", "held_out")  # no episode's randomness is shared
FORMAT = 2  # of what episodes are: a change of the script below makes others
APPROACH = (75.0, 120.0)  # pixels from the block's centre to where a push begins
PUSH = (50.0, 200.0)  # pixels that a push goes on past the point where it began
WANDER = 0.3  # share of stretches without a plan: random actions, drawn to the block
NOISE = 0.2  # standard deviation of what is added to a planned action


@dataclass(frozen=True)
class Episodes:
    """
    frames: uint8 [episodes, steps + 1, 3, size, size]. actions: float32 [episodes, steps, 2], frame i to i + 1.
    states: float64 [episodes, steps + 1, 10], in the order of simulator.STATE.
    """

    frames: np.ndarray
    actions: np.ndarray
    states: np.ndarray


class Script:
    """An agent that walks to a random side of the block and pushes it towards the table's middle, again and again.

    Every third stretch or so it wanders near the block instead, so that actions drawn at random are seen too.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.waypoints: list[np.ndarray] = []
        self.wandering = 0

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """The action [2], in -1..1, to take in `state`."""
        rng, agent = self.rng, state[:2]
        while self.waypoints and np.linalg.norm(self.waypoints[0] - agent) < 20:
            self.waypoints.pop(0)
        if not self.waypoints and not self.wandering:
            if rng.random() < WANDER:
                self.wandering = int(rng.integers(3, 9))
            else:
                self.waypoints = self._push(centre(state))
        if self.wandering:
            self.wandering -= 1
            away = (centre(state) - agent) / SIDE
            return np.clip(rng.uniform(-1, 1, 2) + away, -1, 1)
        if rng.random() < 0.1:  # else a push that the block's other side stops would never end
            self.waypoints.pop(0)
            return rng.uniform(-1, 1, 2)
        return np.clip((self.waypoints[0] - agent) / REACH + NOISE * rng.standard_normal(2), -1, 1)

    def _push(self, block: np.ndarray) -> list[np.ndarray]:
        """Where a push through a block with its centre there begins and ends."""
        rng = self.rng
        ahead = rng.uniform(0.25 * SIDE, 0.75 * SIDE, 2) - block
        ahead /= np.linalg.norm(ahead) + 1e-9
        aside = np.array([-ahead[1], ahead[0]]) * rng.uniform(-50, 50)
        begin = block - ahead * rng.uniform(*APPROACH) + aside
        return [begin, begin + ahead * rng.uniform(*PUSH)]


def collect(part: str, episode: int, *, steps: int, size: int, frame_skip: int, seed: int) -> Episodes:
    """One episode, without the leading axis: a function of the arguments alone."""
    rng = np.random.default_rng([seed, PARTS.index(part), episode])
    simulator, script = Simulator(size, frame_skip), Script(rng)
    simulator.set(start(rng))
    frames, states, actions = [simulator.frame()], [simulator.state()], np.empty((steps, ACTION_DIM), np.float32)
    for i in range(steps):
        actions[i] = script(states[-1])
        simulator.step(actions[i])
        states.append(simulator.state())
        frames.append(simulator.frame())
    return Episodes(np.stack(frames), actions, np.stack(states))


class _Collected(Dataset[Episodes]):
    """Episode i of a part, for workers of a loader."""

    def __init__(self, part: str, count: int, **options: int) -> None:
        self.part, self.count, self.options = part, count, options

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, episode: int) -> Episodes:
        return collect(self.part, episode, **self.options)


def load(
    part: str = "train",
    count: int = 500,
    *,
    steps: int = 40,
    size: int = 64,
    frame_skip: int = FRAME_SKIP,
    seed: int = 0,
    workers: int = 2,
) -> Episodes:
    """The first `count` episodes of a part, "train" or "held_out", of `steps` actions each.

    They are collected by `workers` processes (0: this one), about 20000 frames a minute on two cores, and kept,
    compressed, in `cache_folder()`; a cache that can't be written, or does not read, is a warning.
    size: pixels per side. frame_skip: see Simulator. Needs the extra `plan`.
    """
    check_part("pusht.load", "part", part, PARTS)
    if count < 1 or steps < 1:
        fail("pusht.load", "count and steps", "be at least 1", (count, steps), "pass episodes, and actions of each")
    options = {"steps": steps, "size": size, "frame_skip": frame_skip, "seed": seed}
    Simulator(size, frame_skip)  # raises here, with no worker in between
    path = _path(part, count, options)
    kept = _read(path) if path.exists() else None
    if kept is not None:
        return kept
    loader = DataLoader(_Collected(part, count, **options), batch_size=None, num_workers=workers, collate_fn=_same)
    track = extra("rich.progress", "plan").track
    each = list(track(loader, description=f"{count} episodes of PushT ({part})", total=count, transient=True))
    episodes = Episodes(*(np.stack([getattr(e, name) for e in each]) for name in Episodes.__dataclass_fields__))
    _keep(path, episodes)
    return episodes


def _same(episode: Any) -> Any:
    return episode


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/jepa_kernels; ~/.cache/jepa_kernels where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepa_kernels"


def _path(part: str, count: int, options: dict[str, int]) -> Path:
    versions = [importlib.metadata.version(package) for package in ("gym_pusht", "pymunk", "pygame")]
    key = hashlib.sha256(repr((FORMAT, versions, part, count, sorted(options.items()))).encode()).hexdigest()[:12]
    return cache_folder() / f"pusht-{part}-{count}x{options['steps']}-{key}.npz"


def _read(path: Path) -> Episodes | None:
    try:
        with np.load(path) as file:
            return Episodes(**{name: file[name] for name in Episodes.__dataclass_fields__})
    except Exception as error:  # a torn or foreign file meets zip, header and key with errors of many types
        warnings.warn(f"pusht.load collects anew what {path} does not hold: {error}", stacklevel=3)
        return None


def _keep(path: Path, episodes: Episodes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside, open(beside, "wb") as file:
            np.savez_compressed(file, **vars(episodes))
    except OSError as error:
        warnings.warn(f"pusht.load keeps no copy: {path} can't be written ({error.strerror or error})", stacklevel=3)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Random windows of episodes: `windows[i]` -> (frames uint8 [num_frames, 3, size, size],
    actions float32 [num_frames - 1, 2] in -1..1, action t leading from frame t to t + 1).

    Item i is window i % length of epoch i // length, so that a loader runs on over epochs by counting on. It depends
    on (seed, epoch, i % length) alone: not on workers, order or any global random state. Episodes take turns.

    part, episodes, steps, size, frame_skip: see `load`, with `collect_seed` for its seed. length: windows per epoch.
    """

    def __init__(
        self,
        num_frames: int,
        *,
        part: str = "train",
        episodes: int = 500,
        steps: int = 40,
        size: int = 64,
        frame_skip: int = FRAME_SKIP,
        length: int = 10_000,
        seed: int = 0,
        collect_seed: int = 0,
        workers: int = 2,
    ) -> None:
        if not 1 <= num_frames <= steps + 1:
            requirement = f"lie in 1..{steps + 1}, the frames of an episode"
            fail("Windows", "num_frames", requirement, num_frames, "lower it, or collect more steps")
        if length < 1:
            fail("Windows", "length", "be at least 1", length, "pass windows per epoch")
        self.num_frames, self.part, self.length, self.seed = num_frames, part, length, seed
        options = {"steps": steps, "size": size, "frame_skip": frame_skip, "seed": collect_seed, "workers": workers}
        self.episodes = load(part, episodes, **options)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        episode, first = self.place(index)
        last = first + self.num_frames
        frames = self.episodes.frames[episode, first:last]
        return torch.from_numpy(frames), torch.from_numpy(self.episodes.actions[episode, first : last - 1])

    def place(self, index: int) -> tuple[int, int]:
        """(episode, first frame) of a window."""
        epoch, i = divmod(index, self.length)
        rng = np.random.default_rng([self.seed, PARTS.index(self.part), epoch, i])
        count, frames = self.episodes.frames.shape[:2]
        return i % count, int(rng.integers(frames - self.num_frames + 1))
