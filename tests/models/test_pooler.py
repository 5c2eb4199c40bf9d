"""The attentive probes: against the equations, and against Hugging Face's of V-JEPA 2."""

import math

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.nn import AttentiveClassifier, AttentivePooler
from jepa_kernels.packing import Packing
from jepa_kernels.testing import hold
from tests.models.ijepa_equations import layer_norm, linear
from tests.models.weights import shaken

WIDTH, HEADS = 64, 4


def heads_of(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def attend(q, k, v):
    q, k, v = map(heads_of, (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def normed(x, p, name):
    return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-5)


def with_mlp(x, p, name):
    h = linear(normed(x, p, f"{name}.norm2"), p, f"{name}.mlp.fc1")
    return x + linear(h * (1 + torch.erf(h / math.sqrt(2))) / 2, p, f"{name}.mlp.fc2")


def self_attention(x, p, name):
    y = attend(*linear(normed(x, p, f"{name}.norm1"), p, f"{name}.attn.qkv").chunk(3, -1))
    return with_mlp(x + linear(y, p, f"{name}.attn.proj"), p, name)


def cross_attention(q, x, p, name):
    k, v = linear(normed(x, p, f"{name}.norm1"), p, f"{name}.xattn.kv").chunk(2, -1)
    return with_mlp(q + attend(linear(q, p, f"{name}.xattn.q"), k, v), p, name)


def pooled_by_the_equations(x, p, depth, cross_first):
    """x [N, E] of one clip -> [Q, E]."""
    blocks, queries = [f"blocks.{i}" for i in range(depth - 1)], p["query_tokens"][0]
    if cross_first:
        queries = cross_attention(queries, x, p, "cross_attention_block")
        for name in blocks:
            queries = self_attention(queries, p, name)
        return queries
    for name in blocks:
        x = self_attention(x, p, name)
    return cross_attention(queries, x, p, "cross_attention_block")


@pytest.mark.parametrize(
    "depth, queries, cross_first", [(4, 1, False), (2, 3, False), (1, 1, True), (3, 2, True)], ids=str
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_pooled_latents_and_gradients_are_those_of_the_equations(depth, queries, cross_first, packed):
    pooler = AttentivePooler(WIDTH, HEADS, depth, num_queries=queries, cross_first=cross_first)
    pooler = shaken(pooler, 0.1).double()
    clips = [torch.randn(n, WIDTH, dtype=torch.float64) for n in ((5, 9, 1) if packed else (7, 7, 7))]
    p = {name: value for name, value in pooler.named_parameters() if value.requires_grad}
    expected = torch.stack([pooled_by_the_equations(x, p, depth, cross_first) for x in clips])
    with jk.use_backend("reference"):
        found = pooler(*jk.pack(clips)) if packed else pooler(torch.stack(clips))
    weight = torch.randn_like(expected)
    sides = [torch.autograd.grad((out * weight).sum(), list(p.values())) for out in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, actual, exact in zip(p, *sides, strict=True):
        assert (actual - exact).norm() <= 1e-11 * exact.norm(), name


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_kernels_are_within_the_error_budget_of_the_reference(packed):
    pooler = shaken(AttentivePooler(88 * 2, 2, 2, num_queries=3), 0.1)  # heads of 88 channels, as of ViT-g
    x, packing = torch.randn(3, 20, 176), None
    if packed:
        x, packing = x.flatten(0, 1), Packing.from_lengths([20, 33, 7])
    with torch.no_grad():
        actual = pooler(x, packing)
        with jk.use_backend("reference"):
            eager, exact = pooler(x, packing), pooler.double()(x.double(), packing)
    parity = hold("pooled", actual, exact, eager)
    assert parity.ok, parity


def test_huggingfaces_probe_with_the_same_weights_and_eps_is_the_same():
    pytest.importorskip("transformers")
    from transformers import VJEPA2Config
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2AttentivePooler

    sizes = dict(hidden_size=WIDTH, num_attention_heads=HEADS, num_pooler_layers=3, layer_norm_eps=1e-5)
    theirs = shaken(VJEPA2AttentivePooler(VJEPA2Config(**sizes, attn_implementation="sdpa")), 0.1).double()
    ours = AttentivePooler(WIDTH, HEADS, depth=4).double()
    ours.load_state_dict(renamed(theirs.state_dict()))
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    with jk.use_backend("reference"):
        torch.testing.assert_close(ours(x).squeeze(1), theirs(x), rtol=0, atol=1e-12)


def renamed(state):
    """Hugging Face's names and split layers, as published by Meta."""
    found = {}
    for name, value in state.items():
        name = name.replace("self_attention_layers", "blocks").replace("cross_attention_layer", "cross_attention_block")
        name = name.replace("layer_norm", "norm").replace("self_attn.out_proj", "attn.proj")
        found[name.replace("cross_attn.q_proj", "xattn.q")] = value
    for name in [name for name in found if ".k_proj." in name]:
        key, value = found.pop(name), found.pop(name.replace(".k_proj.", ".v_proj."))
        if "cross_attn" in name:
            found[name.replace("cross_attn.k_proj", "xattn.kv")] = torch.cat([key, value])
        else:
            query = found.pop(name.replace(".k_proj.", ".q_proj."))
            found[name.replace("self_attn.k_proj", "attn.qkv")] = torch.cat([query, key, value])
    return found


def test_a_classifier_has_a_query_and_a_layer_for_each_name():
    probe = shaken(AttentiveClassifier(WIDTH, {"verb": 5, "noun": 7}, num_heads=HEADS, depth=2), 0.1)
    x = torch.randn(2, 6, WIDTH)
    found, pooled, state = probe(x), probe.pooler(x), probe.state_dict()
    for i, name in enumerate(("verb", "noun")):
        weight, bias = state[f"{name}_classifier.weight"], state[f"{name}_classifier.bias"]
        torch.testing.assert_close(found[name], pooled[:, i] @ weight.T + bias, rtol=0, atol=1e-5)
    assert list(found) == ["verb", "noun"] and probe.pooler.query_tokens.shape == (1, 2, WIDTH)


def test_names_are_the_published_ones():
    block = {"norm1", "norm2", "mlp.fc1", "mlp.fc2"}
    cross = {f"pooler.cross_attention_block.{name}" for name in (*block, "xattn.q", "xattn.kv")}
    own = {f"pooler.blocks.{i}.{name}" for i in range(3) for name in (*block, "attn.qkv", "attn.proj")}
    first = AttentiveClassifier(WIDTH, 10, num_heads=HEADS, depth=1, cross_first=True)
    second = AttentiveClassifier(WIDTH, 10, num_heads=HEADS)
    for probe, layers in (
        (second, cross | own | {"linear"}),
        (first, cross | {"linear", "pooler.cross_attention_block.xattn.proj"}),
    ):
        expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} | {"pooler.query_tokens"}
        assert probe.state_dict().keys() == expected
    with torch.device("meta"):
        giant = AttentiveClassifier(1408, 174)
    assert round(sum(p.numel() for p in giant.parameters()) / 1e6, 1) == 93.5


@pytest.mark.parametrize(
    "cross_first, cross, blocks", [(False, 4, (2, 4)), (True, 2, (4, 6))], ids=["V-JEPA 2", "V-JEPA"]
)
def test_the_start_is_the_published_one(cross_first, cross, blocks):
    """What a layer adds is smaller by the root of: 2 n of block n; of V-JEPA the queries' look is the first one."""
    pooler = AttentivePooler(128, HEADS, 3, cross_first=cross_first)
    for p in (pooler.query_tokens, pooler.cross_attention_block.xattn.q.weight, pooler.blocks[1].mlp.fc1.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.2)
    assert pooler.cross_attention_block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / cross**0.5, rel=0.03)
    for block, n in zip(pooler.blocks, blocks, strict=True):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02 / n**0.5, rel=0.03)


def test_packed_pooling_compiles_as_one_graph():
    torch._dynamo.reset()
    probe = shaken(AttentiveClassifier(WIDTH, 5, num_heads=HEADS, depth=1), 0.1)
    x, packing = jk.pack([torch.randn(n, WIDTH) for n in (5, 9, 1)])
    compiled = torch.compile(probe, fullgraph=True, backend="eager")
    found = compiled(x, packing, Packing.uniform(3, 1))
    torch.testing.assert_close(found, probe(x, packing), rtol=0, atol=1e-6)


def test_the_unused_layer_changes_nothing_and_is_not_trained():
    pooler = shaken(AttentivePooler(WIDTH, HEADS, 1, cross_first=True), 0.1)
    x = torch.randn(2, 6, WIDTH)
    before = pooler(x)
    before.sum().backward()
    proj = pooler.cross_attention_block.xattn.proj
    assert proj.weight.grad is None and pooler.query_tokens.grad.any()
    proj.weight.data.normal_()
    assert torch.equal(pooler(x), before)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AttentivePooler(WIDTH, HEADS, 0), "AttentivePooler: depth must be at least 1, got 0; "),
        (
            lambda: AttentivePooler(WIDTH, HEADS, num_queries=0),
            "AttentivePooler: num_queries must be at least 1, got",
        ),
        (lambda: AttentivePooler(WIDTH, 5), "CrossAttention: num_heads must divide embed_dim 64, got 5; change either"),
        (lambda: AttentiveClassifier(WIDTH, {}), "AttentiveClassifier: num_classes must name at least one head, got "),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message)
