"""Writes small videos."""

from pathlib import Path

import numpy as np
import pytest


def write(path: Path, frames: np.ndarray, codec: str = "mpeg4") -> Path:
    """A video of uint8 frames [T, H, W, 3], which starts with its index, if its format has one."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=25, bit_rate=4_000_000)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
        container.mux(stream.encode())
    return path


def stripes(folder):
    """Two videos in `folder`, of stripes that move to the right and of stripes that move down: their paths."""
    t, y, x = np.mgrid[:40, :64, :96]
    waves = [128 + 100 * np.sin((place - 2 * t) / 16) for place in (x, y)]
    frames = [wave[..., None].repeat(3, -1).astype(np.uint8) for wave in waves]
    return [str(write(folder / f"{n}.mp4", shown)) for n, shown in enumerate(frames)]
