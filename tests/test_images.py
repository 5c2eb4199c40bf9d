"""Your own images: found to any depth, shuffled as published, the same in workers; classes, a held-out part, errors."""

import json
import os

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, DistributedSampler

from jepa_kernels import train
from jepa_kernels.data import _turned, random_crop
from jepa_kernels.images import Folder, ImageCrops, _central, _found, labelled
from jepa_kernels.video import VideoClips, _path, frame_rate, listed
from jepa_kernels.views import Views
from tests import runs
from tests.test_train import TINY
from tests.videos import write

PIL = pytest.importorskip("PIL.Image")
COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def root(tmp_path):
    """Ten images of each of three classes, one folder deeper than their class, told by color; image n has light n."""
    folder = tmp_path / "root"
    for name, color in COLORS.items():
        (folder / name / "deep").mkdir(parents=True)
        for n in range(10):
            side = 40 + n
            image = PIL.fromarray(np.full((side, 60, 3), np.array(color) + n, np.uint8))
            image.save(folder / name / "deep" / f"{n}.{'PNG' if n % 2 else 'bmp'}")
    (folder / "red" / "notes.txt").write_text("no image")
    _found.cache_clear()
    return folder


def test_images_are_found_to_any_depth_and_subfolders_are_classes(root):
    folder = Folder(str(root))
    assert len(folder) == 30 and folder.classes == ("blue", "green", "red")
    assert folder.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert Folder(str(root / "red")).classes == (), "one subfolder tells nothing apart"
    assert Folder(str(root / "red" / "deep")).labels.tolist() == [-1] * 10


def test_the_held_out_part_is_the_last_of_each_class_and_shares_no_image(root):
    seen, held_out = (Folder(str(root), part, 0.2) for part in ("train", "held_out"))
    assert [len(seen), len(held_out)] == [24, 6] and not set(seen.paths) & set(held_out.paths)
    names = [os.path.basename(path) for path in held_out.paths]
    assert names == [b"8.bmp", b"9.PNG"] * 3 and held_out.labels.tolist() == [0, 0, 1, 1, 2, 2]
    flat = root / "red" / "deep"
    assert len(Folder(str(flat), "train", 0.2)) == 10 and len(Folder(str(flat), "held_out", 0.2)) == 0


def test_epochs_are_shuffled_as_published_samplers_do(root):
    folder = Folder(str(root))
    sampler = DistributedSampler(range(30), num_replicas=1, rank=0, seed=5)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected = [folder.load(i).getpixel((0, 0)) for i in sampler]
        assert [folder.pick(5, 30 * epoch + i)[0].getpixel((0, 0)) for i in range(30)] == expected


def test_crops_depend_on_seed_and_index_alone(root):
    crops = ImageCrops(Folder(str(root)), 16, seed=3)
    first = list(DataLoader(crops, batch_size=6))
    for (a, i), (b, j) in zip(first, DataLoader(crops, batch_size=6, num_workers=2), strict=True):
        assert torch.equal(a, b) and torch.equal(i, j)
    other = ImageCrops(Folder(str(root)), 16, seed=4)
    assert [crops[i][1] for i in range(30)] != [other[i][1] for i in range(30)]
    assert sorted(crops[i][1] for i in range(30)) == [0] * 10 + [1] * 10 + [2] * 10, "each once in an epoch"
    for i in range(30):
        pixels, label = crops[i]
        assert pixels.shape == (3, 16, 16) and pixels.flatten(1).float().mean(1).argmax() == 2 - label


def test_a_file_that_is_no_image_is_named_and_the_next_takes_its_place(root):
    (root / "red" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    _found.cache_clear()
    folder = Folder(str(root))
    torn = [path.endswith(b"torn.png") for path in folder.paths].index(True)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0)).tolist()
    place = order.index(torn)
    with pytest.warns(UserWarning, match=r"^data: leaves out .*/red/torn\.png: cannot identify image file"):
        image, label = folder.pick(0, place)
    follower = order[(place + 1) % 31]
    assert image.getpixel((0, 0)) == folder.load(follower).getpixel((0, 0)) and label == folder.labels[follower]


def test_a_folder_of_torn_files_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"torn")
    with pytest.warns(UserWarning), pytest.raises(ValueError) as error:
        Folder(str(tmp_path)).pick(0, 0)
    assert str(error.value) == ("data: root must hold an image that decodes, got 1 that do not; encode them again")


def test_labelled_images_are_central_and_as_many_of_each_class(root):
    pixels, labels = labelled(Folder(str(root)), 8, 4, seed=0)
    assert pixels.shape == (12, 3, 8, 8) and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert pixels.flatten(2).float().mean(2).argmax(1).tolist() == [2 - label for label in labels]
    again, other = (labelled(Folder(str(root)), 8, 4, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(pixels, again) and not torch.equal(pixels, other)


def test_a_central_crop_leaves_a_sixteenth_of_the_shorter_side_on_each_side():
    ramp = PIL.fromarray(np.indices((256, 300)).sum(0).astype(np.uint8))  # rows of 300, of which 224 are kept
    shown = np.asarray(_central(ramp, 224))
    assert np.array_equal(shown, np.asarray(ramp)[16:240, 38:262])


def test_views_of_a_folder(root):
    views = Views(Folder(str(root)), 16, 8, global_views=2, local_views=0, seed=1)
    wide, local = views[0]
    assert wide.shape == (2, 3, 16, 16) and local.shape == (0, 3, 8, 8)
    assert torch.equal(wide, views[0][0]) and not torch.equal(wide, views[1][0])


def crop(picture, **how):
    given = {"grey": 0.0, "flip": False, **how}
    return random_crop(np.random.default_rng(0), picture, 8, (1.0, 1.0), (1.0, 1.0), **given)


def test_what_changes_colors_by_hand():
    red = PIL.fromarray(np.full((8, 8, 3), (240, 0, 0), np.uint8))
    assert (crop(red, solarize=1.0) == [15, 0, 0]).all(), "what is light is inverted"
    green, blue = (np.asarray(_turned(red, share))[0, 0].tolist() for share in (1 / 3, -1 / 3))
    assert green == [0, 240, 0] and blue == [6, 0, 240]  # a hue has 8 bits: 171 of 256 of the circle
    crops = [crop(red, jitter=1e-9, hue=hue)[0, 0].tolist() for hue in (0.0, 0.5)]
    assert crops[0] == [240, 0, 0] != crops[1] and max(crops[1]) == 240, "as light, of another hue"
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    blurred = crop(PIL.fromarray(half), blur=1.0)
    assert 0 < blurred[4, 3, 0] < blurred[4, 4, 0] < 255 and (crop(PIL.fromarray(half)) == half).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hue": 0.6}, "Views: hue must lie in [0, 0.5], got 0.6; 0 leaves colors as they are"),
        ({"blur": 2.0}, "Views: blur must lie in [0, 1], got 2.0; 0 leaves colors as they are"),
        ({"solarize": -1.0}, "Views: solarize must lie in [0, 1], got -1.0; 0 leaves colors as they are"),
    ],
)
def test_shares_that_are_none(options, message):
    with pytest.raises(ValueError) as error:
        Views("photos", 16, 8, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("architecture", ["ijepa", "lejepa"])
def test_a_run_on_your_own_images_is_probed_on_their_classes(architecture, root, tmp_path, capsys):
    from tests.test_train_lejepa import TINY as VIEWS

    plain = {"ijepa": TINY, "lejepa": VIEWS}[architecture]
    data = {key: value for key, value in plain["data"].items() if key != "source"}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**plain, "data": {**data, "root": str(root), "held_out": 0.2}}))
    assert train.main([str(path), "--out", str(tmp_path / "run"), "--steps", "2", "--set", "probe.seeds=2"]) == 0
    (asked,) = json.loads((tmp_path / "run/probe.json").read_text())["probes"]
    assert asked["question"] == "Which of the 3 classes is a held-out image of?" and asked["per_seed"] == 6
    assert asked["linear"]["raw_pixels"]["mean"] > 0.5
    whole, halves = tmp_path / "run", tmp_path / "halves"
    runs.fit(path, halves, "--steps", "2", stop=1)
    runs.fit(path, halves, "--steps", "2", "--resume")
    assert runs.rows(halves, "images") == runs.rows(whole, "images")


def test_without_classes_there_is_no_probe(root, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "root": str(root / "red")}}))
    assert train.main([str(path), "--out", str(tmp_path / "run"), "--steps", "1"]) == 0
    assert "no probe: data.root has no classes (two subfolders or more" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/probe.json").read_text())["probes"] == []


@pytest.mark.parametrize(
    "change, message",
    [
        ("data.root=nowhere", "data: root must be a folder of images, got '"),
        ("data.root={empty}", "data: root must hold files with .jpg, .jpeg, .png, "),
        ("data.held_out=1.0", "data: held_out must lie in [0, 1), got 1.0; pass the share of images that the probe "),
    ],
)
def test_a_wrong_folder_is_refused_before_anything_is_written(change, message, root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "root": str(root)}}))
    words = ["--set", change.format(empty=tmp_path / "empty")]
    assert train.main([str(path), "--out", str(tmp_path / "run"), *words]) == 2
    assert capsys.readouterr().err.startswith(message) and not (tmp_path / "run").exists()


def test_labelled_images_of_which_none_decodes_are_an_error(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torn.jpg").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="leaves out"), pytest.raises(ValueError) as error:
        labelled(Folder(str(tmp_path)), 8, 4, seed=0)
    said = "data: root must hold an image that decodes, got 2 chosen that do not; encode them again"
    assert str(error.value) == said


def test_videos_of_folders_and_lists(tmp_path):
    deep = tmp_path / "videos" / "deep"
    deep.mkdir(parents=True)
    for name in ("b.mp4", "a.MKV", "notes.md"):
        (deep / name).touch()
    (tmp_path / "list.csv").write_text(f"{deep}/b.mp4 17\nvideos/deep/a.MKV,3\n\n")
    (tmp_path / "list.txt").write_text("videos/deep/b.mp4\n")
    found = [str(deep / "a.MKV"), str(deep / "b.mp4")]
    assert listed([str(tmp_path / "videos")]) == found
    assert listed([str(tmp_path / "list.csv"), "bikes"]) == [f"{found[1]} 17", f"{found[0]},3", "bikes"]
    assert listed([str(tmp_path / "list.txt")]) == found[1:]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^VideoClips: videos must hold files with \.mp4, .*; pass other folders$"):
        listed([str(tmp_path / "empty")])


def test_whole_videos_are_decoded_anew_in_the_order_of_published_samplers(tmp_path):
    pytest.importorskip("av")
    from jepa_kernels.data import bundled
    from jepa_kernels.video import VIDEOS

    (tmp_path / "torn.mp4").write_bytes(b"torn")
    paths = [str(bundled(VIDEOS[name])) for name in ("bikes", "carphone_pristine")] + [str(tmp_path / "torn.mp4")]
    clips = VideoClips(16, 8, frame_step=100, span="whole", seed=2, videos=paths, keep=False)
    assert len(clips) == 3
    order = torch.randperm(3, generator=torch.Generator().manual_seed(2 + 1)).tolist()  # of epoch 1
    with pytest.warns(UserWarning, match=r"skips a video, 1 so far: .*torn\.mp4"):
        found = [clips[3 + i] for i in range(3)]
    follower = order[(order.index(2) + 1) % 3]
    assert [label for _, label in found] == [follower if n == 2 else n for n in order]
    assert all(torch.equal(pixels, clips[3 + i][0]) for i, (pixels, _) in enumerate(found))
    pixels, _ = next(pair for pair in found if pair[1] == 0)
    assert torch.equal(pixels[:, -1], pixels[:, -2]), "250 frames: the last one is repeated"


def test_frames_a_second_set_the_step_between_frames():
    pytest.importorskip("av")
    from jepa_kernels.data import bundled
    from jepa_kernels.video import VIDEOS

    rate = frame_rate(str(bundled(VIDEOS["bikes"])))
    assert rate == 25
    by_rate, by_step = (VideoClips(16, 4, videos=("bikes",), **how) for how in ({"fps": 8}, {"frame_step": 3}))
    assert all(torch.equal(by_rate[i][0], by_step[i][0]) for i in range(3))


def test_a_line_is_a_file_where_it_is_one_and_else_ends_with_a_label(tmp_path, monkeypatch):
    for name in ("clip", "clip 12", "one.mp4", "lists/two.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [_path(str(tmp_path / line)) for line in ("clip 12", "clip 13", "clip", "one.mp4, -1")] == [
        str(tmp_path / name) for name in ("clip 12", "clip", "clip", "one.mp4")
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists/of_folder.txt").write_text("gone.mp4 0\none.mp4 1\n")
    assert listed(["lists/of_folder.txt"]) == ["gone.mp4 0", "one.mp4 1"]
    (tmp_path / "lists/of_list.csv").write_text("gone.mp4 0\ntwo.mp4 1\n")
    assert listed(["lists/of_list.csv"]) == ["lists/gone.mp4 0", "lists/two.mp4 1"]
    (tmp_path / "quoted.csv").write_text('path,label\n"one.mp4",3\n')
    with pytest.raises(ValueError) as error:
        listed(["quoted.csv"])
    assert str(error.value) == (
        "VideoClips: videos must hold lists with a file a line, got 'path,label' in quoted.csv; "
        "pass paths that are absolute or relative to the list, without quotes"
    )
    with pytest.raises(ValueError, match=r"videos must be files or one of .*, got 'gone.mp4'; check the spelling"):
        listed(["gone.mp4"])


def test_lines_of_long_lists_are_looked_for_when_they_are_shown(tmp_path, monkeypatch):
    pytest.importorskip("av")
    path = write(tmp_path / "a.mp4", np.zeros((8, 16, 16, 3), np.uint8))
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path}/{name}.mp4 1\n" for name in "agggg"))
    looked, isfile = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(path) or isfile(path))
    clips = VideoClips(16, 2, videos=listed([str(tmp_path / "list.txt")]), span="whole", keep=False)
    assert looked == [f"{path} 1", str(path)] and clips.paths.dtype.kind == "S"
    with pytest.warns(
        UserWarning, match=r"VideoClips skips a video, 1 so far: .* got '.*g\.mp4 1'; check the spelling"
    ):
        assert [clips[i][1] for i in range(5)] == [0] * 5
