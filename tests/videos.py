"""Writes small videos."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest


def write(path, frames, codec="mpeg4", *, options=None, at=None) -> Path:
    """A video of uint8 frames [T, H, W, 3], which starts with its index, if its format has one.

    options: the codec's. at: when each frame is shown, in 1/25 s.
    """
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=25, bit_rate=4_000_000, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for n, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array)
            if at is not None:
                frame.pts, frame.time_base = int(at[n]), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def stripes(folder):
    """Two videos in `folder`, of stripes that move to the right and of stripes that move down: their paths."""
    t, y, x = np.mgrid[:40, :64, :96]
    waves = [128 + 100 * np.sin((place - 2 * t) / 16) for place in (x, y)]
    frames = [wave[..., None].repeat(3, -1).astype(np.uint8) for wave in waves]
    return [str(write(folder / f"{n}.mp4", shown)) for n, shown in enumerate(frames)]
