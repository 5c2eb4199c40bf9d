"""Published probes: V-JEPA's, V-JEPA 2's list of them, EPIC-KITCHENS-100's three heads, Hugging Face's."""

import pytest
import torch

from jepa_kernels.models import layouts
from jepa_kernels.models.probes import load_probe
from tests.models import published
from tests.models.weights import same


def filled(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def wrapped(state):
    return {f"module.{name}": value for name, value in state.items()}


def test_vjepas_probe_with_its_unused_layer(tmp_path):
    shapes = published.meta_probe(32, 128, 5, depth=0)
    shapes |= published.affine("pooler.cross_attention_block.xattn.proj", 32, 32)
    torch.save({"classifier": wrapped(filled(shapes)), "epoch": 3}, tmp_path / "probe.pth.tar")
    probe, report = load_probe(tmp_path / "probe.pth.tar")
    assert same(probe.state_dict(), filled(shapes)) and probe.pooler.cross_first
    assert set(report.loaded) == probe.state_dict().keys()
    assert report.ignored == {"epoch": "no weights of a network"}
    assert probe.pooler.cross_attention_block.norm1.eps == 1e-5


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_vjepa2s_probes(index):
    states = [filled(published.meta_probe(32, 128, 174), seed) for seed in (0, 1)]
    probe, report = load_probe({"classifiers": [wrapped(state) for state in states], "opt": {}}, index=index)
    assert same(probe.state_dict(), states[index]) and not probe.pooler.cross_first
    assert report.ignored == {f"classifiers[{1 - index}]": "another probe", "opt": "no weights of a network"}
    assert {block.attn.num_heads for block in probe.pooler.blocks} == {16} and len(probe.pooler.blocks) == 3


def test_our_probe_in_hugging_faces_names_comes_back():
    """As in VJEPA2ForVideoClassification, behind an encoder."""
    shapes = published.meta_probe(32, 128, 5)
    own, encoder = filled(shapes), filled(published.meta_encoder(32, 1, 64, (2, 4, 4)), 1)
    theirs = layouts.to_huggingface("probe", layouts.VJEPA2_PROBE, {"classifier": own})
    assert "pooler.self_attention_layers.2.self_attn.k_proj.weight" in theirs
    assert "pooler.cross_attention_layer.cross_attn.v_proj.bias" in theirs and theirs["classifier.bias"].shape == (5,)
    whole = {**theirs, **layouts.to_huggingface("encoder", layouts.VJEPA2, {"encoder": encoder})}
    probe, report = load_probe(whole, num_heads=4)
    assert same(probe.state_dict(), own) and set(report.loaded) == own.keys()
    assert report.ignored == {"encoder": "not of the probe"}


def test_three_heads_take_their_queries_in_the_published_order_whatever_the_files():
    shapes = published.meta_probe(32, 128, 1) | {"pooler.query_tokens": (1, 3, 32)}
    del shapes["linear.weight"], shapes["linear.bias"]
    for head, classes in (("action", 7), ("noun", 6), ("verb", 5)):
        shapes |= published.affine(f"{head}_classifier", classes, 32)
    probe, _ = load_probe(filled(shapes))
    assert same(probe.state_dict(), filled(shapes)) and probe.names == ("verb", "noun", "action")


def test_what_holds_no_probe_is_refused():
    wanted = r"AttentiveClassifier: checkpoint must hold probe "
    shapes = published.meta_probe(32, 128, 5)
    with pytest.raises(ValueError, match=wanted + "0, got encoder; pass a file with classifier or classifiers"):
        load_probe({"encoder": filled(published.meta_encoder(32, 1, 64, (2, 4, 4)))})
    many, one = {"classifiers": [filled(shapes)] * 2}, {"classifier": filled(shapes)}
    for state, index, count in ((many, 2, 2), (many, -1, 2), (one, 3, 1), (one, -1, 1)):
        match = rf"^AttentiveClassifier: index must lie in \[0, {count}\), got {index}; leave it out for the first"
        with pytest.raises(ValueError, match=match):
            load_probe(state, index=index)
    state = filled(shapes) | {"linear.scale": torch.ones(5)}
    with pytest.raises(ValueError, match=r"got classifier\.linear\.scale is unknown; pass a published probe"):
        load_probe({"classifier": state})
