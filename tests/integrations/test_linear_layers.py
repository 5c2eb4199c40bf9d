"""Linear layers of patched models: which are replaced, that `linear` computes them, and that all comes back."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import jepa_kernels as jk
from jepa_kernels._core import define
from jepa_kernels.integrations import meta
from jepa_kernels.integrations.layers import LINEAR
from jepa_kernels.nn import linear
from tests.integrations.adapters import Adapter
from tests.integrations.parity import drawn, failures
from tests.integrations.test_meta import forward, network

LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def replaced(done):
    return [name for name, what in done.patched.items() if what == LINEAR.what]


@pytest.fixture
def calls(monkeypatch):
    """Shapes of what the kernel multiplies, which takes products of any size here."""
    found, real = [], define.implementation("linear", "forward", "cpu")
    monkeypatch.setattr(linear, "slower", lambda call: None)
    monkeypatch.setitem(
        define._implementations,
        ("linear", "forward", "cpu"),
        lambda x, weight, *rest: found.append(tuple(weight.shape)) or real(x, weight, *rest),
    )
    with jk.use_backend(linear="cpu"):
        yield found


def test_blocks_multiply_by_linear_and_undo_gives_all_back(calls):
    model = network("vjepa2")
    before = forward("vjepa2")(model)["out"]
    done = meta.patch(model, verify=False)
    assert replaced(done) == LAYERS
    torch.testing.assert_close(forward("vjepa2")(model)["out"], before)
    assert len(calls) == 8
    done.undo()
    assert torch.equal(forward("vjepa2")(model)["out"], before) and len(calls) == 8
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", ["ijepa", "vjepa2", "no-rope"])
def test_numbers_and_gradients_are_those_of_the_unpatched_network(kind, calls):
    assert not failures([network(kind, seed) for seed in range(3)], meta.patch, forward(kind))
    assert calls


def test_layers_outside_blocks_and_in_other_types_stay():
    assert replaced(meta.patch(network("predictor"))) == LAYERS_OF_PREDICTOR
    assert not replaced(meta.patch(network("vjepa2").bfloat16()))
    assert not replaced(meta.patch(network("vjepa2").to("meta"), verify=False))


def test_a_head_beside_attention_at_the_top_is_in_no_block():
    model = nn.ModuleDict(dict(attn=network("vjepa2").blocks[0].attn, head=nn.Linear(64, 1000)))
    assert replaced(meta.patch(model)) == ["attn.qkv", "attn.proj"]


LAYERS_OF_PREDICTOR = [name.replace("blocks", "predictor_blocks") for name in LAYERS]


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_adapted_layers_and_kinds_of_their_own_stay():
    model = network("vjepa2")
    model.blocks[0].mlp.fc1 = Adapter(model.blocks[0].mlp.fc1)
    model.blocks[0].mlp.fc2 = Scaled(*reversed(model.blocks[0].mlp.fc2.weight.shape))
    model.blocks[1].mlp.fc1 = nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc1)
    model.blocks[1].mlp.fc2.forward = model.blocks[1].mlp.fc2.forward
    assert replaced(meta.patch(model)) == [name for name in LAYERS if "mlp" not in name]


def test_a_layer_that_is_adapted_later_comes_back_too():
    model, x = network("vjepa2"), drawn(3, 64)
    done, layer = meta.patch(model), model.blocks[0].mlp.fc1
    expected = layer(x)
    model.blocks[0].mlp.fc1 = Adapter(layer)
    assert "forward" in vars(layer)
    done.undo()
    assert "forward" not in vars(layer) and torch.equal(layer(x), expected)


def test_hooks_and_copies_of_layers_run(calls):
    model, seen = network("vjepa2"), []
    meta.patch(model, verify=False)
    twin = copy.deepcopy(model)
    twin.blocks[0].mlp.fc1.register_forward_hook(lambda layer, args, out: seen.append(layer))
    with torch.no_grad():
        twin.blocks[0].mlp.fc1.weight.zero_(), twin.blocks[0].mlp.fc1.bias.zero_()
    assert not twin.blocks[0].mlp.fc1(drawn(3, 64)).any() and model.blocks[0].mlp.fc1(drawn(3, 64)).any()
    assert seen == [twin.blocks[0].mlp.fc1] and len(calls) == 2


def test_a_patched_network_compiles_as_one_graph_without_the_op():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = network("vjepa2", depth=1)
    meta.patch(model, verify=False)
    torch.compile(forward("vjepa2", masked=False), fullgraph=True, backend=counter)(model)
    assert counter.frame_count == 1
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("linear" in t for t in targets) == 4 and not any("jepa_kernels" in t and "linear" in t for t in targets)
