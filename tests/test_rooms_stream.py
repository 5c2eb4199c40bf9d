"""Streams of rooms: what is shown and said, and what selective decoding is held against."""

import numpy as np
import pytest
import torch

from jepa_kernels.rooms import stream
from jepa_kernels.rooms.scenes import HELD_OUT, answer, candidates

pytest.importorskip("minigrid", reason="minigrid is not installed")
SIZE = 48


def test_a_stream_says_when_its_thing_changes():
    seen = stream.stream(80, SIZE, seed=3)
    turns = tuple(t for t in range(1, 80) if seen.said[t] != seen.said[t - 1])
    assert seen.changes == turns and 2 < len(turns) < 20 and seen.frames.shape == (80, 3, SIZE, SIZE)
    assert not {answer(thing) for thing in HELD_OUT} & set(seen.said)
    still = (seen.frames[1:] == seen.frames[:-1]).flatten(1).all(1)
    assert not still.all(), "things wander between changes"
    assert torch.equal(seen.frames, stream.stream(80, SIZE, seed=3).frames)


def test_the_last_decoded_text_holds_until_the_next():
    texts = ["a", "b", "c", "d", "e"]
    said = ["a", "a", "c", "c", "e"]
    assert stream.right(texts, [0, 2], said).tolist() == [True, True, True, True, False]
    assert stream.right(texts, range(0, 5, 3), said).tolist() == [True, True, False, False, False]


def test_the_threshold_is_half_the_least_distance_of_two_answers():
    known = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert stream.threshold(known) == pytest.approx(0.1)  # 0.6, 0.8 and 0, 1: a cosine of 0.8


def test_an_oracle_decodes_once_a_change_and_as_well_as_on_every_frame(monkeypatch):
    """A stream that is the right answer's embedding: both are always right, the clock only by looking at each frame."""
    known = torch.eye(24)
    places = {text: n for n, text in enumerate(candidates())}
    monkeypatch.setattr(stream, "embed", lambda model, texts: known)
    monkeypatch.setattr(stream, "follow", lambda model, seen: known[[places[text] for text in seen.said]])
    streams = [stream.stream(60, SIZE, seed=seed) for seed in range(3)]
    found = stream.compare(None, streams)
    changes = np.mean([len(s.changes) for s in streams])
    assert found["changes"] == changes and found["decodes"]["selective"]["mean"] == pytest.approx(changes + 1)
    assert found["decodes"]["every_frame"]["mean"] == 60
    as_many = found["decodes"]["uniform"]["mean"]
    assert changes + 1 <= as_many <= 6 and found["accuracy"]["uniform"]["mean"] < 1
    assert found["accuracy"]["selective"]["mean"] == found["accuracy"]["every_frame"]["mean"] == 1
