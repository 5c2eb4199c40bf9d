"""Frames of video files, as PyAV decodes them: all of a file, or those of one clip alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.data import extra

TS_PACKETS = (188, 192, 204)  # bytes of an MPEG transport stream: plain, with time stamps, with check sums
LEADING = 16  # frames that a codec may show ahead of the keyframe that they follow: x264 and x265 have at most as many


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
    return _tensor(frames)


def load_clip(path: str, short_side: int, places: Callable[[int, int], np.ndarray]) -> Tensor:
    """The frames of a file that a clip shows, uint8 [T, 3, H, W]: those of `load_video`, without the others.

    places: (how many frames the file shows, how many a second, rounded up) -> which of them, ascending.

    Of a file whose header tells where each frame lies (MP4, MOV), those from the keyframe before the first one to the
    last one are decoded, and damage elsewhere is not met. Where the header tells no count (MKV, WebM, MPEG), or another
    than it has entries, or that stretch does not decode to the frames that it tells (at times, H.264 with open groups
    of pictures), the whole file is decoded, and `places` asked anew with its count; errors are those of `load_video`. A
    PyAV without `Stream.index_entries` always decodes whole files.
    """
    av = extra("av")
    with suppress(Exception), av.open(path) as container:  # of any type: the whole file tells what is wrong with it
        return _tensor(_stretch(container, short_side, places))
    frames = load_video.__wrapped__(path, short_side)
    return frames[places(len(frames), frame_rate(path))]


@cache
def frame_rate(path: str) -> int:
    """Frames a second that a file shows on average, rounded up."""
    with extra("av").open(path) as container:
        return _rate(container.streams.video[0])


def _rate(stream: Any) -> int:
    return math.ceil(stream.average_rate or 10)


def _tensor(frames: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _opened(container: Any, short_side: int) -> tuple[Any, Callable[[Any], np.ndarray]]:
    """The stream of pictures, and what makes pixels [H, W, 3] of a frame."""
    if not container.streams.video:
        raise EOFError("no pictures")
    if container.format.name == "mpegts" and all(container.size % size for size in TS_PACKETS):
        raise EOFError("a part of its last packet")
    stream = container.streams.video[0]
    stream.thread_type = "SLICE"  # threads of whole frames lose the errors of the last ones
    stream.codec_context.options = {"err_detect": "explode"}  # without it, damage is painted over
    shrink = min(1.0, short_side / min(stream.width, stream.height))
    size = {"width": round(stream.width * shrink), "height": round(stream.height * shrink)}
    return stream, lambda frame: frame.reformat(**size, format="rgb24", interpolation="AREA").to_ndarray()


def _decode(container: Any, short_side: int) -> list[np.ndarray]:
    """The frames [H, W, 3]; EOFError where some are missing."""
    stream, pixels = _opened(container, short_side)
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
            frames += [pixels(frame) for frame in decoded]
    seconds, frame = (container.duration or 0) / 1e6, 1 / (stream.average_rate or 10)
    if 0 < end < seconds - 1.5 * frame:  # the last packet need not tell its duration
        raise EOFError(f"{end:.2f} of {seconds:.2f} seconds")
    if not frames or (stream.frames and len(frames) < shown):  # elsewhere a packet may hold no frame of its own
        raise EOFError(f"{len(frames)} of {shown} frames")
    return frames


def _stretch(container: Any, short_side: int, places: Callable[[int, int], np.ndarray]) -> list[np.ndarray]:
    """The frames of `load_clip` [H, W, 3]; an error of any type where the header does not lead to them."""
    stream, pixels = _opened(container, short_side)
    entries = list(stream.index_entries)
    if not stream.frames or len(entries) != stream.frames:
        raise EOFError("a header that does not tell its frames")
    shown = np.array([not entry.is_discard for entry in entries])  # an edit list leaves some out
    before = np.cumsum(shown) - shown  # of each entry, in the order of decoding
    asked = places(int(shown.sum()), _rate(stream)).tolist()
    keys = [n for n, entry in enumerate(entries) if entry.is_keyframe and before[n] <= asked[0] - LEADING]
    container.seek(entries[keys[-1] if keys else 0].timestamp, stream=stream)
    found: dict[int, np.ndarray] = {}
    for frame, n in _numbered(container, stream, {e.pos: (k, int(before[k])) for k, e in enumerate(entries)}):
        if n in asked:
            found[n] = pixels(frame)
        if n >= asked[-1]:
            return [found[n] for n in asked]
    raise EOFError("too few frames")


def _numbered(container: Any, stream: Any, entries: dict[int, tuple[int, int]]) -> Iterator[tuple[Any, int]]:
    """Frames from a keyframe on, with their places among those that the file shows; an error where these are in doubt.

    entries: by a packet's first byte, its place in the order of decoding, and how many of those ahead of it are shown.
    """
    start: Any = None
    due: list[int] = []  # times of the packets whose frames are still to come
    place = at = given = 0
    for packet in container.demux(stream):
        if start is None:
            (at, place), start = entries[packet.pos], packet.pts
        if at and packet.size and packet.pts < start:  # refers to frames ahead of the keyframe, and no later one to it
            if given:
                raise EOFError("a frame of the stretch before, too late")
            place += not packet.is_discard
            continue
        if packet.size and not packet.is_discard:
            due.append(packet.pts)
        for frame in packet.decode():
            if packet.is_corrupt or frame.is_corrupt or frame.pts != min(due):
                raise EOFError("another frame than is due")
            if at and not given and not frame.key_frame:  # the header calls it one
                raise EOFError("no keyframe")
            due.remove(frame.pts)
            yield frame, place + given
            given += 1
