"""Retrieval, classes by their names and selective decoding: values by hand, agreement with sklearn, refusals."""

import math

import pytest
import torch

from jepa_kernels.models.vl_answers import classify, emissions, name_classes, retrieve, segments


def at(*degrees):
    """Vectors of a plane, of different lengths."""
    turns = torch.tensor(degrees).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], 1) * torch.linspace(0.5, 3, len(degrees))[:, None]


def test_the_nearest_candidates_by_cosine():
    scores, ids = retrieve(at(10.0, 80.0), at(0.0, 45.0, 90.0), k=2)
    assert ids.tolist() == [[0, 1], [2, 1]]
    expected = [[math.cos(math.radians(a)) for a in (10, 35)]] * 2
    torch.testing.assert_close(scores, torch.tensor(expected))
    torch.testing.assert_close(classify(at(10.0), at(0.0, 90.0)), at(10.0) / 0.5)


class Texts(torch.nn.Module):
    """A text's embedding is its direction in degrees."""

    def tokens(self, texts, *, device=None):
        return torch.tensor([float(text.split()[-1]) for text in texts]), None


class Model:
    log_temperature = torch.zeros(())
    text = Texts()

    def answer(self, tokens, packing):
        return at(*tokens.tolist())


def test_a_class_is_the_mean_direction_of_its_templates():
    """Of unit vectors: one text's length says nothing. 10 and 110 degrees -> 60; 30 and 130 -> 80."""
    found = name_classes(Model(), ["0", "2"], ["at 1{}", "at 11{}", "at 1{}", "at 11{}"])
    means = [math.radians(60), math.radians(62)]  # 10, 110, 10, 110; and 12, 112, 12, 112
    expected = torch.tensor([[math.cos(a), math.sin(a)] for a in means])
    torch.testing.assert_close(found, expected)


def test_a_stream_is_decoded_when_it_moves():
    """Distances from the segment's mean: 0 is where 20 is compared with the mean of 0 and 10."""
    steps, distances = emissions(at(0.0, 10.0, 20.0, 90.0, 85.0, 0.0), 0.1)
    assert steps == [0, 3, 5]
    apart = [0, 10, 15, 80, 5, 87.5]
    expected = [1 - math.cos(math.radians(a)) for a in apart]
    torch.testing.assert_close(distances, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert emissions(at(0.0, 10.0, 20.0), 0.0)[0] == [0, 1, 2] and emissions(at(0.0, 180.0), 2.0)[0] == [0]


def test_a_step_is_decided_from_those_before_it_alone():
    stream = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    whole = emissions(stream, 0.9)[0]
    assert 2 < len(whole) < 30
    for end in (5, 17):
        assert emissions(stream[:end], 0.9)[0] == [step for step in whole if step < end]


def test_segments_are_those_of_ward_with_neighbours_in_time():
    cluster = pytest.importorskip("sklearn.cluster")
    sparse = pytest.importorskip("scipy.sparse")
    stream = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).cumsum(0)
    unit = torch.nn.functional.normalize(stream.double(), dim=-1)
    chain = sparse.diags([1.0, 1.0], [-1, 1], shape=(40, 40))
    for count in (1, 2, 7, 40):
        labels = cluster.AgglomerativeClustering(count, connectivity=chain, linkage="ward").fit_predict(unit.numpy())
        starts = [0, *(t for t in range(1, 40) if labels[t] != labels[t - 1])]
        assert segments(stream, count) == starts


def test_refusals():
    two, three = torch.zeros(1, 2), torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"classify: candidates must have 2 channels like predicted, got 3; .+"):
        classify(two, three)
    with pytest.raises(ValueError, match=r"retrieve: k must lie in 1\.\.3, the candidates, got 4; ask for fewer"):
        retrieve(two, torch.zeros(3, 2), k=4)
    with pytest.raises(ValueError, match=r"name_classes: templates must each hold \{\} once, got 'a picture'; .+"):
        name_classes(Model(), ["0"], ["a picture"])
    with pytest.raises(ValueError, match=r"name_classes: templates must each hold \{\} once, got none; .+"):
        name_classes(Model(), ["0"], [])
    for function in (emissions, segments):
        name = function.__name__
        with pytest.raises(ValueError, match=rf"{name}: stream must be finite, got step 2 that is not; .+"):
            function(torch.tensor([[1.0], [2.0], [torch.nan], [torch.inf]]), 1)
        with pytest.raises(ValueError, match=rf"{name}: stream must hold at least one step, got none; .+"):
            function(torch.zeros(0, 2), 1)
        with pytest.raises(ValueError, match=rf"{name}: stream must have shape .+"):
            function(torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"emissions: threshold must lie in \[0, 2\], got 3; .+"):
        emissions(two, 3)
    with pytest.raises(ValueError, match=r"segments: count must lie in 1\.\.1, the steps, got 2; .+"):
        segments(two, 2)
