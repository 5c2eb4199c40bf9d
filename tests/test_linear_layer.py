"""nn.Linear: torch's layer in everything but who multiplies, and when that is the kernel."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels as jk
from jepa_kernels import _C, nn
from jepa_kernels._core import define
from jepa_kernels.models import lejepa, lewm, vjepa2, vjepa2_ac
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.nn.block import MLP
from jepa_kernels.nn.linear import Linear, product
from jepa_kernels.nn.shadow import Shadow
from jepa_kernels.ops.linear import op

ROWS, K, N = 2048, 256, 256  # 2^27 multiply-adds, enough for two threads


@pytest.fixture
def calls(monkeypatch):
    """The backend of every product that the kernel computes."""
    found = []
    for stage in ("forward", "backward"):
        real = define.implementation("linear", stage, "cpu")

        def run(*args, real=real, stage=stage):
            found.append(stage)
            return real(*args)

        monkeypatch.setitem(define._implementations, ("linear", stage, "cpu"), run)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield found
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def ahead(monkeypatch):
    """As on a processor of AMD's, whoever made this one."""
    monkeypatch.setattr(_C, "is_amd", lambda: True)


def test_it_is_torchs_layer(calls):
    torch.manual_seed(0)
    ours = nn.Linear(K, N)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(K, N)
    assert isinstance(ours, torch.nn.Linear) and repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    x = torch.randn(2, ROWS // 2, K)
    wanted = ours(x)
    assert torch.allclose(wanted, theirs(x), atol=1e-5)
    assert all(type(other) is nn.Linear and torch.equal(other(x), wanted) for other in copies)
    assert calls == ["forward"] * 3


def test_large_products_are_the_kernels_and_their_gradients_too(calls):
    layer, x = nn.Linear(K, N), torch.randn(ROWS, K, requires_grad=True)
    layer(x).sum().backward()
    assert calls == ["forward", "backward"]
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(ROWS, K), atol=1e-4)
    assert layer.bias.grad.eq(ROWS).all()


def of(rows=ROWS, dtype=torch.float32):
    return torch.randn(rows, K, dtype=dtype), torch.randn(N, K, dtype=dtype)


class Tagged(torch.Tensor):
    """A tensor that another library knows better than we do."""


def under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        return product(*of())


def in_forward_mode():
    x, weight = of()
    with torch.autograd.forward_ad.dual_level():
        return product(torch.autograd.forward_ad.make_dual(x, x), weight)


def of_fakes():
    with FakeTensorMode():
        return product(*of())


def by_reference():
    with jk.use_backend("reference"):
        return product(*of())


OTHERS = {
    "few rows": lambda: product(*of(100)),
    "bf16": lambda: product(*of(dtype=torch.bfloat16)),
    "float64": lambda: product(*of(dtype=torch.float64)),
    "meta": lambda: product(*(x.to("meta") for x in of())),
    "autocast": under_autocast,
    "compiled": lambda: torch.compile(product, fullgraph=True, backend="aot_eager")(*of()),
    "fake tensors": of_fakes,
    "nested tensors": lambda: product(torch.nested.nested_tensor([of()[0], of(5)[0]]), of()[1]),
    "sparse rows": lambda: product(of()[0].to_sparse(), of()[1]),
    "a subclass": lambda: product(of()[0], of()[1].as_subclass(Tagged)),
    "torch.func": lambda: grad(lambda w: product(of()[0], w).sum())(of()[1]),
    "vmap": lambda: vmap(product)(torch.randn(2, ROWS, K), torch.randn(2, N, K)),
    "forward mode": in_forward_mode,
    "the reference": by_reference,
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_is_torchs(name, calls, recwarn):
    OTHERS[name]()
    assert not calls and not [w for w in recwarn if issubclass(w.category, jk.BackendWarning)]


class Twice(nn.Linear):
    """One that does more than multiply."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_an_mlps_gelu_is_its_first_products(calls, monkeypatch):
    mlp, x = MLP(K, N), torch.randn(ROWS, K)
    wanted = mlp.fc2(F.gelu(mlp.fc1(x)))
    monkeypatch.setattr(F, "gelu", None)
    calls.clear()
    assert torch.allclose(mlp(x), wanted, atol=1e-6) and calls == ["forward"] * 2


def watched(mlp, seen):
    mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out))


def with_own_forward(mlp, seen):
    forward = mlp.fc1.forward
    mlp.fc1.forward = lambda x: seen.append(forward(x)) or seen[-1]


def of_another_class(mlp, seen):
    mlp.fc1.__class__ = Twice


def compiled(mlp, seen):
    mlp.fc1.compile(backend=lambda graph, inputs: lambda *args: seen.append(graph(*args)[0]) or (seen[-1],))


@pytest.mark.parametrize("change", [watched, with_own_forward, of_another_class, compiled])
def test_a_layer_that_does_more_than_multiply_is_called(change, calls):
    mlp, x, seen = MLP(K, N), torch.randn(ROWS, K), []
    own = mlp.fc1(x)
    change(mlp, seen)
    factor = 2 if change is of_another_class else 1
    wanted = mlp.fc2(F.gelu(factor * own))
    with torch.no_grad():
        assert torch.allclose(mlp(x), wanted, atol=1e-6)
    assert len(seen) == (change is not of_another_class) and all(torch.allclose(out, own, atol=1e-5) for out in seen)


def test_a_global_hook_sees_a_layers_own_output(calls):
    mlp, x, seen = MLP(K, N), torch.randn(ROWS, K), []
    own = mlp.fc1(x)
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append((module, out))):
        mlp(x)
    ((_, found),) = [(module, out) for module, out in seen if module is mlp.fc1]
    assert torch.equal(found, own)


def test_where_the_kernel_does_not_lead_the_layer_is_called(calls, monkeypatch):
    mlp, x, seen = MLP(K, N), torch.randn(8, K), []
    monkeypatch.setattr(Linear, "__call__", lambda layer, x: seen.append(layer) or layer.forward(x))
    wanted = F.linear(F.gelu(F.linear(x, *mlp.fc1.parameters())), *mlp.fc2.parameters())
    assert torch.equal(mlp(x), wanted) and seen == [mlp.fc1, mlp.fc2] and not calls


def test_another_makers_processor_multiplies_by_torch(calls, monkeypatch):
    monkeypatch.setattr(_C, "is_amd", lambda: False)
    product(*of())
    assert not calls


def test_avx2_alone_is_enough(calls):
    assert _C.set_isa("avx2")
    try:
        product(*of())
    finally:
        _C.set_isa("best")
    assert calls == ["forward"]


def test_without_the_extension_it_is_torchs(calls, monkeypatch):
    monkeypatch.setattr(op.extension, "load", lambda: "not built")
    x, weight = of()
    assert torch.equal(product(x, weight), F.linear(x, weight)) and not calls


def test_functional_calls_take_other_weights(calls):
    layer, (x, weight) = nn.Linear(K, N, bias=False), of()
    assert torch.allclose(functional_call(layer, {"weight": weight}, (x,)), F.linear(x, weight), atol=1e-4)
    assert calls == ["forward"]


def test_shadows_copy_its_weights():
    layer = nn.Linear(4, 3)
    shadow = Shadow(layer, torch.bfloat16)
    assert set(shadow.copies) == set(layer.parameters())
    with torch.autocast("cpu", torch.bfloat16), shadow.lent():
        assert layer.weight.dtype == torch.bfloat16 and layer(torch.randn(2, 4)).dtype == torch.bfloat16


def test_every_large_product_of_a_model_is_the_kernels(calls):
    """Torch multiplies nothing; all in all FLOPs are the plain model's."""
    sizes = dict(crop_size=64, patch_size=8, embed_dim=256, depth=2, num_heads=4)
    model = IJEPA(IJEPAConfig(**sizes, predictor_embed_dim=96, predictor_depth=1))
    pixels = torch.randn(32, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model.context_encoder(pixels)
    with jk.use_backend(linear="reference"), FlopCounterMode(display=False) as plain:
        model.context_encoder(pixels)
    found = counter.get_flop_counts()["Global"]
    assert not [o for o in found if o in (torch.ops.aten.addmm, torch.ops.aten.mm)] and len(calls) == 8
    assert sum(found.values()) == plain.get_total_flops()


TINY = dict(embed_dim=32, depth=1, num_heads=2)
WORLD = dict(predictor_embed_dim=32, predictor_depth=1, predictor_num_heads=2, state_dim=None, extrinsics_dim=None)
MODELS = {
    "ijepa": lambda: IJEPA(IJEPAConfig(crop_size=32, patch_size=8, **TINY)),
    "vjepa2": lambda: vjepa2.VJEPA2(vjepa2.VJEPA2Config(crop_size=32, num_frames=4, **TINY)),
    "world": lambda: vjepa2_ac.WorldModel(
        vjepa2_ac.WorldModelConfig(crop_size=32, num_frames=4, conditioning="adaln", **TINY, **WORLD)
    ),
    "lejepa": lambda: lejepa.LeJEPA.of(lejepa.ViTConfig(**TINY)),
    "lewm": lambda: lewm.LeWorldModel(lewm.pusht()),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_made_of_it(name):
    plain = [n for n, module in MODELS[name]().named_modules() if type(module) is torch.nn.Linear]
    assert not plain


class Adapted(torch.nn.Module):
    """As adapters are: in a layer's place, with its weights and more."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, torch.nn.Linear(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.more(x)


@pytest.mark.parametrize("how", ["adapter", "hook", "forward"])
def test_what_stands_in_for_a_layer_is_asked_where_its_weights_would_be_cut(how):
    attention, x, context = nn.block.Attention(32, 2), torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    more = torch.nn.Linear(32, 96)
    merged = copy.deepcopy(attention)
    with torch.no_grad():
        merged.qkv.weight += more.weight
        merged.qkv.bias += more.bias
    if how == "adapter":
        attention.qkv = Adapted(attention.qkv)
        attention.qkv.more = more
    elif how == "hook":
        attention.qkv.register_forward_hook(lambda _, args, out: out + more(*args))
    else:
        attention.qkv.forward = lambda x, own=attention.qkv.forward: own(x) + more(x)
    torch.testing.assert_close(attention.cross(x, context), merged.cross(x, context))
    attention.cross(x, context).sum().backward()
    assert more.weight.grad.abs().max() > 0


def test_a_convolution_that_is_more_than_its_weights_is_refused():
    encoder, images = nn.Encoder(16, 8, 32, depth=1, num_heads=2), torch.randn(1, 3, 16, 16)
    own = encoder.patch_embed.proj
    own.forward = lambda x: own._conv_forward(x, own.weight, own.bias) * 2
    with pytest.raises(TypeError, match="PatchEmbed: proj must be a plain convolution, got Conv2d; merge an adapter"):
        encoder(images)
    stand_in = encoder.patch_embed.proj = torch.nn.Identity()
    stand_in.kernel_size, stand_in.weight, stand_in.bias = own.kernel_size, own.weight, own.bias
    with pytest.raises(TypeError, match="PatchEmbed: proj must be a plain convolution, got Identity; merge an adapter"):
        encoder(images)
