"""Networks of the published shape on the kernels: the numbers of the unpatched, shared positions, what is refused."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from jepa_kernels.integrations import meta, ropes
from tests.integrations import published
from tests.integrations.parity import but_for_products, drawn, failures, far_from_its_start
from tests.integrations.published import PatchEmbed, PatchEmbed3D, VisionTransformer, VisionTransformerPredictor

GRID = 2, 3, 4  # of clips
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def network(kind, seed=0, **options):
    torch.manual_seed(seed)
    if kind == "predictor":
        return far_from_its_start(VisionTransformerPredictor(**options)).eval()
    images = kind == "ijepa"
    patch_embed = PatchEmbed(4, 3, 64) if images else PatchEmbed3D(4, 2, 3, 64)
    attention = {
        "ijepa": published.IJEPAAttention,
        "vjepa": published.VJEPAAttention,
        "vjepa2": published.RoPEAttention,
        "vjepa2-ac": published.ACRoPEAttention,
        "no-rope": published.Attention,
    }[kind]
    table = None if attention is published.RoPEAttention else 16 if images else 24
    return far_from_its_start(VisionTransformer(attention, patch_embed, num_patches=table, **options)).eval()


def masks(kept, patches, batch=2):
    generator = torch.Generator().manual_seed(kept)
    rows = [torch.randperm(patches, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(rows)


def forward(kind, *, masked=True):
    """What a network of this kind makes of fixed inputs."""
    if kind == "predictor":
        x, ids = drawn(2, 5, 64), (masks(5, 32), masks(7, 32))
        return lambda model: {"out": model(x.to(next(model.parameters()).dtype), *ids)}
    x = drawn(2, 3, 16, 16) if kind == "ijepa" else drawn(2, 3, 4, 12, 16)
    patches = 16 if kind == "ijepa" else 24
    chosen = [masks(6, patches), masks(9, patches)[:, :6]] if masked else None
    return lambda model: {"out": model(x.to(next(model.parameters()).dtype), chosen)}


@each_dtype
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("kind", ["ijepa", "vjepa", "vjepa2", "no-rope", "predictor"])
def test_outputs_and_gradients_are_those_of_the_unpatched_network(kind, masked, dtype):
    networks = [network(kind, seed).to(dtype) for seed in range(3)]
    assert not failures(networks, meta.patch, forward(kind, masked=masked))


@pytest.mark.parametrize("kind", ["ijepa", "vjepa2"])
def test_under_autocast_too(kind):
    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
            return forward(kind)(model)

    assert not failures([network(kind, seed) for seed in range(6)], meta.patch, run)


def interleaved(x, pos):
    """Both channels of a pair turn by one angle, as in V-JEPA 2.1."""
    count = x.shape[-1] // 2
    omega = 1.0 / 10000 ** (torch.arange(count, dtype=x.dtype, device=x.device) / count)
    cos, sin = ((pos[..., None] * omega).cos(), (pos[..., None] * omega).sin())
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def test_the_pairing_is_that_of_the_function_beside_the_class(monkeypatch):
    tiled = forward("vjepa2")(network("vjepa2"))["out"]
    monkeypatch.setattr(published, "rotate_queries_or_keys", interleaved)
    assert not failures([network("vjepa2")], meta.patch, forward("vjepa2"))
    assert not torch.allclose(tiled, forward("vjepa2")(network("vjepa2"))["out"], atol=1e-2)


@pytest.mark.parametrize("rotate", [lambda x, pos: x * 2, lambda x: x, None], ids=["numbers", "signature", "none"])
def test_another_turn_is_left_alone(monkeypatch, rotate):
    monkeypatch.setattr(published, "rotate_queries_or_keys", rotate)
    skipped = meta.patch(network("vjepa2")).skipped
    why = "no rotate_queries_or_keys(x, pos) of a known pairing stands beside it"
    assert skipped == {"blocks.0.attn": why, "blocks.1.attn": why}


def test_fp32_angles_bring_a_bf16_network_nearer_to_the_exact_one():
    attention, x = network("vjepa2").blocks[0].attn.bfloat16(), drawn(1, 128, 64)
    with torch.no_grad():
        attention.qkv.weight.mul_(4)  # few keys count for each query
    grid = dict(T=128, H_patches=1, W_patches=1)  # bf16 holds angles of the last frames to half a radian
    exact = copy.deepcopy(attention).double()(x.double(), **grid)

    def error(angle_dtype):
        with meta.patch(attention, angle_dtype=angle_dtype, verify=False):
            return (attention(x.bfloat16(), **grid) - exact).norm()

    own = (attention(x.bfloat16(), **grid) - exact).norm()
    assert error(torch.float32) < 0.5 * own and error(None) > 0.9 * own


def test_positions_are_made_once_for_all_layers(monkeypatch):
    calls, own = [], ropes.patch_positions
    monkeypatch.setattr(ropes, "patch_positions", lambda ids, grid: calls.append(ids) or own(ids, grid))
    model = network("vjepa2", depth=4)
    meta.patch(model, verify=False)
    for _ in range(2):
        forward("vjepa2", masked=False)(model)
    assert len(calls) == 1
    for _ in range(2):  # of ids that the encoder joins anew in every forward
        forward("vjepa2")(model)
    assert len(calls) == 3
    with torch.inference_mode():  # where nothing tells whether ids were filled anew
        forward("vjepa2")(model)
    assert len(calls) == 7


def test_ids_that_were_filled_anew_are_read_anew():
    model, x, ids = network("vjepa2").blocks[0], drawn(2, 5, 64), masks(5, 32)
    other = masks(5, 31)
    expected = model(x, mask=other)
    meta.patch(model)
    assert not torch.allclose(model(x, mask=ids), expected, atol=1e-2)
    torch.testing.assert_close(model(x, mask=ids.copy_(other)), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(x, mask=other.int()), expected, rtol=0, atol=1e-4)


def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    changed = lambda run: torch.compile(run, fullgraph=True, backend=counter)  # noqa: E731
    assert not failures([network("predictor", depth=1)], meta.patch, forward("predictor"), changed)
    assert counter.frame_count == 1


def test_other_lengths_compile_nothing_new():
    torch._dynamo.reset()
    model, counter = network("vjepa2", depth=1), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    meta.patch(model)
    clips = drawn(2, 3, 4, 12, 16)
    with torch.no_grad():
        for kept in (6, 9, 11, 14):
            ids = masks(kept, 24)
            assert torch.equal(compiled(clips, [ids]), model(clips, [ids]))
    assert counter.frame_count == 2


def test_weights_are_given_by_a_block_that_is_asked_for_them():
    model, x = network("vjepa", use_sdpa=False), drawn(2, 6, 64)
    block = model.blocks[1]
    expected, (out, weights) = block(x, return_attention=True), block.attn(x)
    done = meta.patch(model)
    assert torch.equal(block(x, return_attention=True), expected)
    patched, none = block.attn(x)
    assert none is None and weights is not None and not torch.equal(patched, out)
    done.undo()
    assert torch.equal(block.attn(x)[1], weights)


def test_a_scale_of_its_own_is_kept_where_the_network_uses_it():
    """Which F.scaled_dot_product_attention is never given."""
    for use_sdpa in (True, False):
        model = network("vjepa2", qk_scale=0.3, use_sdpa=use_sdpa)
        assert not failures([model], meta.patch, forward("vjepa2"))


def test_calls_with_attn_mask_are_attentions_own():
    model, x = network("vjepa2").blocks[0], drawn(1, 6, 64)
    grid, attn_mask = dict(T=1, H_patches=2, W_patches=3), torch.ones(6, 6, dtype=torch.bool).tril()
    expected = model(x, attn_mask=attn_mask, **grid)
    meta.patch(model)
    assert torch.equal(model(x, attn_mask=attn_mask, **grid), expected)


def test_dropout_of_outputs_stays():
    model = network("ijepa", proj_drop=0.5).train()
    meta.patch(model)
    assert abs((model.blocks[0].attn(drawn(2, 16, 64))[0] == 0).double().mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    "kind, options, why",
    [
        ("vjepa2-ac", {}, "action tokens stand among its patches"),
        ("vjepa2", dict(is_causal=True), "it is causal"),
        ("ijepa", dict(attn_drop=0.25), "attention dropout is 0.25, which the kernel has not: 0 allows it"),
        # published code gives SDPA this one, in evaluation too
        ("vjepa2", dict(proj_drop=0.25), "attention dropout is 0.25, which the kernel has not: 0 allows it"),
        ("vjepa2", dict(num_heads=16), "the kernel takes head dims that are multiples of 8 up to 128, not 4"),
    ],
)
def test_other_attention_is_left_alone(kind, options, why):
    assert meta.patch(network(kind, **options)).skipped == {"blocks.0.attn": why, "blocks.1.attn": why}


class MaskedAttention(published.Attention):
    """Whose mask is not of ids: added to logits, of the keys that are seen, or both."""

    def __init__(self, *sizes, read):
        super().__init__(*sizes)
        self.read = read

    def forward(self, x, mask=None):
        return self.attend(*self.heads(x), None if mask is None else self.read(mask))[0]


@pytest.mark.parametrize("read", [lambda mask: mask, lambda mask: mask > 0, lambda mask: mask.float()[:, None, None]])
def test_attention_that_reads_its_mask_is_left_alone(read):
    model = network("no-rope")
    model.blocks[1].attn = MaskedAttention(64, 2, read=read)
    done = meta.patch(model)
    assert done.skipped == {"blocks.1.attn": "its `mask` is more than the ids of its tokens"}
    assert but_for_products(done) == ["patch_embed", "blocks.0.attn"]


class NewAttention(published.Attention):
    def forward(self, x, mask=None, attn_mask=None, registers=0):
        return super().forward(x, mask, attn_mask)


def test_another_signature_is_refused_with_what_was_found():
    model = network("no-rope")
    model.blocks[1].attn = NewAttention(64, 2)
    message = (
        r"patch: NewAttention.forward must take \(x, mask, attn_mask\), got \(x, mask, attn_mask, registers\) "
        r"of module tests.integrations.published; "
    )
    with pytest.raises(ValueError, match=message):
        meta.patch(model)
    assert "forward" not in vars(model.blocks[0].attn)


def test_pixels_that_patches_do_not_divide_are_cut_as_the_convolution_does():
    embed, clips = network("vjepa2").patch_embed, drawn(1, 3, 5, 10, 9)
    expected = embed(clips)
    meta.patch(embed)
    torch.testing.assert_close(embed(clips), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not enough values to unpack"):  # of the network's own
        embed(clips[:, :, 0])


def test_a_convolution_with_hooks_overlap_or_another_forward_is_left_alone():
    hooked, overlapping, changed = (network("ijepa") for _ in range(3))
    changed.patch_embed.proj.forward = lambda x: torch.zeros(2, 64, 4, 4)
    why = "Conv2d has a forward of its own already, set by something else"
    assert meta.patch(changed).skipped == {"patch_embed": why}
    hooked.patch_embed.proj.register_forward_hook(lambda *_: None)
    overlapping.patch_embed.proj.stride = (2, 2)
    assert meta.patch(hooked).skipped == {"patch_embed": "hooks on Conv2d would not run"}
    why = "the convolution is not one product for each square patch"
    assert meta.patch(overlapping).skipped == {"patch_embed": why}


def test_hooks_run_and_the_state_dict_stays():
    model, seen = network("vjepa2"), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    state = model.state_dict()
    forward("vjepa2")(model)
    before, seen[:] = list(seen), []
    done = meta.patch(model, verify=False)
    forward("vjepa2")(model)
    assert seen == before and set(done.skipped) == {"patch_embed"}
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_runs_with_its_own_weights(duplicate):
    model, run = network("vjepa2"), forward("vjepa2")
    meta.patch(model)
    run(model)
    twin = duplicate(model)
    assert torch.equal(run(twin)["out"], run(model)["out"])
    with torch.no_grad():
        twin.blocks[1].attn.qkv.weight.zero_()
    assert not torch.equal(run(twin)["out"], run(model)["out"])
    held = [module.attn.forward.keywords["ropes"] for module in twin.blocks]
    assert held[0] is held[1] is not model.blocks[0].attn.forward.keywords["ropes"]


def test_a_report_names_what_was_replaced():
    lines = str(meta.patch(network("vjepa2"), only=["blocks", "patch_embed"])).split("\n")
    assert lines[:4] == [
        "VisionTransformer: 11 modules patched, 0 left alone",
        "  patched: patches embedded by one product over pixels read in place: patch_embed",
        "  patched: attention that turns queries and keys on the way in: blocks.0.attn, blocks.1.attn",
        "  patched: large products by linear: blocks.0.attn.qkv, blocks.0.attn.proj ... blocks.1.mlp.fc2 (8)",
    ]
    verified = ["patches", "attention", "attention of kept patches"]
    assert [line.split(":")[1].strip() for line in lines[4:]] == verified
