"""Rooms and questions: what is shown, what is asked, and that training never sees what is held out."""

import numpy as np
import pytest
import torch

from jepa_kernels.rooms import answers
from jepa_kernels.rooms.scenes import COLORS, HELD_OUT, KINDS, THINGS, Scene, Scenes, answer, candidates

pytest.importorskip("minigrid", reason="minigrid is not installed")
SIZE, COUNT = 48, 200


def drawn(split):
    scenes = Scenes(SIZE, split=split)
    return [scenes.drawn(i) for i in range(COUNT)]


def test_each_color_and_kind_is_known_and_no_held_out_thing_is():
    known = {thing for shown, _, _ in drawn("train") for thing in shown.things}
    assert not known & set(HELD_OUT) and known == set(THINGS) - set(HELD_OUT)
    assert {color for color, _ in known} == set(COLORS) and {kind for _, kind in known} == set(KINDS)


def test_held_out_questions_ask_for_each_held_out_thing():
    asked = [shown.things[n] for shown, n, _ in drawn("held_out")]
    assert set(asked) == set(HELD_OUT)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_one_object_alone_answers(split):
    for shown, n, question in drawn(split):
        words = [(*thing, shown.quarter(i)) for i, thing in enumerate(shown.things)]
        fits = [i for i, names in enumerate(words) if any(name in question for name in names)]
        assert fits == [n], question


def test_an_object_is_drawn_in_its_color_at_its_place():
    picture = Scene((("red", "box"), ("blue", "ball")), ((0, 3), (2, 1)), 4).render(8).astype(int)
    assert picture.shape == (48, 48, 3)
    cells = picture.reshape(6, 8, 6, 8, 3).sum((1, 3))
    red, blue = (cells[..., c] - np.delete(cells, c, 2).max(-1) for c in (0, 2))
    assert np.argwhere(red > 1000).tolist() == [[4, 1]] and np.argwhere(blue > 1000).tolist() == [[2, 3]]


def test_items_depend_on_seed_and_number_alone():
    first, again, other = Scenes(SIZE), Scenes(SIZE), Scenes(SIZE, seed=1)
    again[3]
    (pixels, question, said), (same, *texts) = first[7], again[7]
    assert torch.equal(pixels, same) and texts == [question, said] and pixels.shape == (3, SIZE, SIZE)
    assert any(first[i][1:] != other[i][1:] for i in range(8))
    assert said in candidates() and answer(("red", "key")) == "a red key" and len(candidates()) == 24


def test_probes_ask_about_rooms_that_nothing_was_fitted_on(monkeypatch):
    made = []
    monkeypatch.setattr(answers, "baseline", lambda model, scenes: lambda asked: np.ones(4))
    monkeypatch.setattr(answers, "recall", lambda model, scenes: np.ones(4))
    answers.probes(None, lambda: None, lambda **how: made.append(how), questions=4, fitted_on=9)
    (split, length, fitted), *asked = [tuple(how[name] for name in ("split", "length", "seed")) for how in made]
    assert (split, length) == ("train", 9) and [one[:2] for one in asked] == [("train", 4), ("held_out", 4)]
    assert fitted not in {seed for *_, seed in asked} and min(fitted, *(seed for *_, seed in asked)) >= 10**9


def test_refusals():
    with pytest.raises(ValueError, match=r"Scenes: split must be one of train, held_out, got 'test'; .+"):
        Scenes(SIZE, split="test")
    with pytest.raises(ValueError, match=r"Scenes: side must be even, with 1 to 4 objects, got 3 with 3; .+"):
        Scenes(SIZE, side=3)
    with pytest.raises(ValueError, match=r"Scenes: size must be a multiple of side \+ 2 = 6, got 50; .+"):
        Scenes(50)
