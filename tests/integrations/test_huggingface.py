"""Patched models of transformers against the same models, unpatched and in float64."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from jepa_kernels.integrations.huggingface import patch, register_attention, vjepa2
from jepa_kernels.models import vjepa2 as own_vjepa2
from tests.integrations.parity import but_for_products, failures
from tests.integrations.vjepa2_models import (
    PATCHES,
    arguments,
    assert_within_budget,
    clips,
    exactly,
    masks,
    numbers,
    outputs,
    small,
)

pytest.importorskip("transformers")
WIDTHS = {
    32: {},
    64: dict(hidden_size=128, pred_hidden_size=64),
    80: dict(hidden_size=160, pred_hidden_size=48),
    88: dict(hidden_size=176, pred_hidden_size=64, mlp_ratio=48 / 11),
}


SHALLOW = dict(num_hidden_layers=1, pred_num_hidden_layers=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_patched_equals_unpatched_forward_and_every_gradient(width, dtype):
    model, given, pixels = small(dtype=dtype, **WIDTHS[width]), arguments(), clips(dtype=dtype)
    exact, own = exactly(model, pixels, **given), numbers(model, pixels, **given)
    done = patch(model)
    assert not done.skipped and len(but_for_products(done)) == 9
    assert_within_budget(numbers(model, pixels, **given), exact, own)


def test_under_autocast_too():
    """Several models side by side: single numbers of one are near their budget by chance."""

    def run(model):
        dtype, given = next(model.parameters()).dtype, arguments()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            return outputs(model, clips(dtype=dtype), **given)

    assert not failures([small(seed=seed, **SHALLOW) for seed in range(6)], patch, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_patched_classifier_equals_unpatched(dtype):
    model, pixels = small("VJEPA2ForVideoClassification", dtype), clips(dtype=dtype)
    exact, own = exactly(model, pixels), numbers(model, pixels)
    done = patch(model)
    assert {name for name in but_for_products(done) if name.startswith("pooler")} == {
        "pooler.cross_attention_layer.cross_attn",
        "pooler.self_attention_layers.0.self_attn",
    }
    assert_within_budget(numbers(model, pixels), exact, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
def test_compiled_as_one_graph_it_equals_unpatched_forward_and_every_gradient(kind, dtype):
    pixels, given = clips(), arguments() if kind == "VJEPA2Model" else {}  # a classifier takes no masks

    def run(model):
        return outputs(model, pixels.to(next(model.parameters()).dtype), **given)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    changed = lambda run: torch.compile(run, fullgraph=True, backend=counter)  # noqa: E731
    assert not failures([small(kind, dtype, seed, **SHALLOW) for seed in range(2)], patch, run, changed)
    assert counter.frame_count == 2  # a graph for each model


def test_the_patch_takes_every_break_out_of_the_graph():
    model, pixels, breaks = small(**SHALLOW), clips(), []
    for patched in (False, True):
        if patched:
            patch(model, verify=False)
        torch._dynamo.reset()
        breaks.append(torch._dynamo.explain(model)(pixels, **arguments()).graph_break_count)
    assert breaks == [5, 0]


def test_a_second_graph_takes_masks_of_all_lengths_and_gives_the_same_numbers():
    model, graphs, pixels = small(**SHALLOW), CompileCounter(), clips()
    patch(model, verify=False)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for context, target in (masks(), masks(13, 5), masks(17, 11), masks(8)):
        given = dict(context_mask=[context], target_mask=[target])
        with torch.no_grad():
            expected, found = outputs(model, pixels, **given), outputs(compiled, pixels, **given)
        assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert graphs.frame_count == 2


def test_calls_without_masks_and_without_the_predictor():
    model, pixels = small(), clips()
    for given in ({}, {"skip_predictor": True}):
        exact, own = exactly(model, pixels, **given), numbers(model, pixels, **given)
        with patch(model, verify=False):
            assert_within_budget(numbers(model, pixels, **given), exact, own)


@pytest.mark.parametrize("shape", [(2, 4, 3, 32, 48), (1, 5, 3, 35, 30), (2, 1, 3, 32, 32)], ids=str)
def test_clips_of_other_sizes(shape):
    model, pixels = small(), torch.randn(shape, generator=torch.Generator().manual_seed(4))
    exact, own = exactly(model, pixels, skip_predictor=True), numbers(model, pixels, skip_predictor=True)
    patch(model)
    assert_within_budget(numbers(model, pixels, skip_predictor=True), exact, own)


def test_undo_gives_every_bit_back():
    model, given, pixels = small(), arguments(), clips()
    before, names = numbers(model, pixels, **given), list(model.state_dict())
    done = patch(model)
    assert list(model.state_dict()) == names
    assert not torch.equal(outputs(model, pixels, **given)["predicted"], before["predicted"])
    done.undo()
    after = numbers(model, pixels, **given)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_angles_are_rounded_as_the_model_rounds_them(dtype):
    from transformers.models.vjepa2.modeling_vjepa2 import rotate_queries_or_keys

    attention = small(dtype=dtype).encoder.layer[0].attention
    ids = torch.arange(700)[None]
    cos = vjepa2._rope(attention, torch.zeros(1, 700, 64, dtype=dtype), ids, None).turns(32)[0][0, :, 0]
    x = torch.zeros(1, 1, 700, 10, dtype=dtype)
    x[..., 4] = 1.0  # its partner is 0: what comes out is the cosine
    frames, rows, columns = attention.get_position_ids(torch.zeros(1, 700, 64), ids)
    for axis, at in enumerate((frames, rows, columns)):
        theirs, ours = rotate_queries_or_keys(x, at[:, :1])[0, 0, :, 4].float(), cos[:, 10 * axis + 4]
        assert (theirs - ours).abs().max() <= (2**-23 if dtype == torch.float32 else 0)  # a cosine's own ulp


def test_exact_angles_come_closer_to_the_exact_model():
    model, pixels = small(dtype=torch.bfloat16, num_hidden_layers=1), clips(dtype=torch.bfloat16)
    far = torch.arange(64)[None].repeat(2, 1) + 200 * 16
    hidden = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    layer = model.encoder.layer[0].attention
    layer.query.weight.data.mul_(8)  # sharp attention: angles matter more than other rounding

    def error():
        return (layer(hidden, far)[0].double() - exact).norm()

    exact = copy.deepcopy(layer).double()(hidden.double(), far)[0]
    own = error()
    with patch(model):
        same = error()
    patch(model, angle_dtype=torch.float32)
    assert error() < 0.5 * own and 0.8 * own < same < 1.2 * own
    assert torch.isfinite(outputs(model, pixels)["last"]).all()


def test_training_with_drop_path_and_checkpointing():
    given, pixels = arguments(), clips()

    def train(model, checkpointing):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        return numbers(model, pixels, **given)

    model = small(drop_path_rate=0.5, num_hidden_layers=3)
    own = train(model, False)
    keep = model.encoder.layer[1].drop_path
    torch.manual_seed(7)
    dropped = keep(torch.ones(64, 1, 1)).flatten()
    assert sorted(set(dropped.tolist())) == pytest.approx([0.0, 1 / (1 - keep.drop_prob)])
    patch(model)
    plain, checkpointed = train(model, False), train(model, True)
    assert all(torch.equal(checkpointed[name], x) for name, x in plain.items())
    for name, x in own.items():
        torch.testing.assert_close(plain[name], x, rtol=1e-3, atol=1e-4 * x.abs().max().item())


def test_the_table_of_angles_is_made_once_for_all_layers(monkeypatch):
    """One of the encoder, one of the predictor, whose last layer takes a part of it."""
    calls, own = [], vjepa2.published_rope
    monkeypatch.setattr(vjepa2, "published_rope", lambda ids, *how: calls.append(tuple(ids.shape)) or own(ids, *how))
    model, pixels = small(num_hidden_layers=4, pred_num_hidden_layers=3), clips()
    patch(model, verify=False)
    model(pixels, skip_predictor=True)
    assert calls == [(PATCHES,)]
    calls.clear()
    model(pixels, **arguments())
    assert calls == [(PATCHES,), (2, 20)]  # 11 rows of context, 9 of the target


def test_hidden_states_are_recorded_and_hooks_run():
    model, pixels, calls = small(), clips(), []
    own = model(pixels, output_hidden_states=True, skip_predictor=True).hidden_states
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append("embeddings"))
    model.encoder.layer[1].attention.query.register_forward_hook(lambda *_: calls.append("query"))
    patch(model, verify=False)
    found = model(pixels, output_hidden_states=True, skip_predictor=True).hidden_states
    assert calls == ["embeddings", "query"] and len(found) == len(own) == 3
    for a, b in zip(found, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", ["nothing", "layer", "attention"])
def test_the_predictors_last_layer_computes_targets_alone_unless_it_keeps_its_own(own):
    """11 rows of context, 9 of the target."""
    model, given, pixels, rows = small(), arguments(), clips(), {}
    exact, plain = exactly(model, pixels, **given), numbers(model, pixels, **given)
    for i, layer in enumerate(model.predictor.layer):
        layer.mlp.register_forward_hook(lambda *args, i=i: rows.update({i: args[-1].shape[1]}))
    last = model.predictor.layer[1]
    if own != "nothing":
        kept = last if own == "layer" else last.attention
        kept.forward = kept.forward
    patch(model)
    assert_within_budget(numbers(model, pixels, **given), exact, plain)
    assert rows == {0: 20, 1: 9 if own == "nothing" else 20}


def gathered(model, pixels, context_mask, target_mask=None):
    """What a masked encoder means, in the model's own layers."""
    x = model.encoder.embeddings(pixels)
    ids = torch.cat(context_mask)
    x = x.repeat(len(context_mask), 1, 1).gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
    for layer in model.encoder.layer:
        x = layer(x, ids)[0]
    return {"last": model.encoder.layernorm(x)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_masked_encoder_equals_the_models_layers_on_kept_tokens(dtype):
    model, pixels, several = small(dtype=dtype), clips(dtype=dtype), [masks(seed=s)[0] for s in (2, 3)]

    def run(model, pixels, context_mask):
        out = model(pixels, context_mask=context_mask, skip_predictor=True)
        assert out.masked_hidden_state is out.last_hidden_state
        return {"last": out.last_hidden_state}

    exact, own = (f(model, pixels, gathered, context_mask=several) for f in (exactly, numbers))
    done = patch(model, masked_encoder=True)
    assert "masked encoder" in done.verified
    assert_within_budget(numbers(model, pixels, run, context_mask=several), exact, own)


def test_a_masked_encoder_never_reads_what_is_dropped_and_predicts():
    model, pixels = small(), clips()
    context, target = masks()
    patch(model, masked_encoder=True)
    out = model(pixels, context_mask=[context], target_mask=[target])
    kept = torch.zeros(2, PATCHES, dtype=torch.bool).scatter(1, context, True).view(2, 2, 1, 1, 4, 1, 4, 1)
    poisoned = pixels.view(2, 2, 2, 3, 4, 8, 4, 8).where(kept, float("nan")).view_as(pixels)
    again = model(poisoned, context_mask=[context], target_mask=[target])
    assert torch.equal(again.predictor_output.last_hidden_state, out.predictor_output.last_hidden_state)
    assert out.predictor_output.target_hidden_state is None
    assert out.predictor_output.last_hidden_state.shape == (2, 9, 64)
    own = model.predictor(out.last_hidden_state, [torch.arange(11).repeat(2, 1)], [target])
    assert not torch.equal(own.last_hidden_state, out.predictor_output.last_hidden_state)  # positions are the ids
    torch.testing.assert_close(model(pixels, skip_predictor=True).last_hidden_state, small().encoder(pixels)[0])
    assert model(pixels, context_mask=[context], skip_predictor=True, return_dict=False)[0].shape == (2, 11, 64)


@pytest.mark.parametrize("masked_encoder", [False, True])
def test_ids_of_int32_are_those_of_int64(masked_encoder):
    model, pixels, given = small(), clips(), arguments()
    patch(model, masked_encoder=masked_encoder, verify=False)
    narrow = {name: [ids.int() for ids in each] for name, each in given.items()}
    expected, found = (model(pixels, **masks).predictor_output.last_hidden_state for masks in (given, narrow))
    assert torch.equal(found, expected)


def test_several_masks_are_each_mask_alone():
    model, pixels, pairs = small(), clips(), [masks(seed=s) for s in (2, 3, 4)]
    contexts, targets = ([pair[i] for pair in pairs] for i in (0, 1))
    each = [outputs(model, pixels, context_mask=[c], target_mask=[t]) for c, t in pairs]
    patch(model)
    together = outputs(model, pixels, context_mask=contexts, target_mask=targets)
    for name in ("masked", "predicted", "target"):
        torch.testing.assert_close(together[name], torch.cat([one[name] for one in each]), rtol=1e-4, atol=1e-5)


def test_only_some_modules_by_name():
    model, given, pixels = small(), arguments(), clips()
    exact, own = exactly(model, pixels, **given), numbers(model, pixels, **given)
    for only in ("predictor", ["encoder.layer.0", "predictor.embeddings"]):
        with patch(model, only=only) as done:
            assert all(name.startswith(("predictor", "encoder.layer.0")) for name in done.patched)
            assert_within_budget(numbers(model, pixels, **given), exact, own)


def test_our_model_gives_the_same_numbers_from_the_same_weights():
    model, pixels = small(), clips()
    context, target = masks()
    own = own_vjepa2.VJEPA2(
        own_vjepa2.VJEPA2Config(
            crop_size=32,
            num_frames=4,
            patch_size=8,
            embed_dim=64,
            depth=2,
            num_heads=2,
            predictor_embed_dim=32,
            predictor_depth=2,
            predictor_num_heads=2,
            num_mask_tokens=3,
        )
    )
    own.load(model.state_dict())
    exact = outputs(copy.deepcopy(model).double(), pixels.double(), context_mask=[context], target_mask=[target])
    theirs = outputs(model, pixels, context_mask=[context], target_mask=[target])
    encoder = own.context_encoder
    kept = encoder(pixels.transpose(1, 2)).gather(1, context[..., None].expand(-1, -1, 64))
    predicted = own.predictor(kept, context, target, grid=(2, 4, 4), mask_index=1)
    ours = {"last": encoder(pixels.transpose(1, 2)), "masked": kept, "predicted": predicted}
    names = ours.keys()
    assert_within_budget(ours, {name: exact[name] for name in names}, {name: theirs[name] for name in names})


def test_our_model_rounds_angles_as_theirs_does_in_bf16():
    """On a clip of many frames of one patch; by sharp attention, whose numbers show them."""
    model = small(dtype=torch.bfloat16, crop_size=8, **SHALLOW)
    model.encoder.layer[0].attention.query.weight.data.mul_(16)
    pixels = torch.randn(1, 600, 3, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    theirs, apart = model(pixels, skip_predictor=True).last_hidden_state.float(), {}
    for precision in ("float32", "bfloat16"):
        sizes = dict(crop_size=8, num_frames=4, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_mask_tokens=3)
        narrow = dict(predictor_embed_dim=32, predictor_depth=1, predictor_num_heads=2)
        config = own_vjepa2.VJEPA2Config(**sizes, **narrow, rope_precision=precision)
        own = own_vjepa2.VJEPA2(config)
        own.load(model.state_dict())
        apart[precision] = (own.bfloat16().context_encoder(pixels.transpose(1, 2)) - theirs).norm() / theirs.norm()
    assert apart["bfloat16"] < 0.3 * apart["float32"]


def ijepa(**changes):
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_attention_heads=2, num_hidden_layers=2, image_size=32, patch_size=8)
    return transformers.IJepaModel(transformers.IJepaConfig(**{**sizes, **changes}), add_pooling_layer=False).eval()


def test_registered_attention_by_name_in_the_config_and_on_a_live_model():
    register_attention()
    pixels, images = clips(), clips()[:, 0]
    for build, given in ((small, (pixels,)), (ijepa, (images,))):
        exact = build().double()(*(x.double() for x in given)).last_hidden_state
        own = build()(*given).last_hidden_state
        live = build()
        live.set_attn_implementation("jepa_kernels")
        for model in (live, build(attn_implementation="jepa_kernels")):
            assert model.config._attn_implementation == "jepa_kernels"
            found = model(*given).last_hidden_state
            assert_within_budget({"last": found}, {"last": exact}, {"last": own})


def test_registered_attention_never_ignores_what_it_lacks():
    register_attention()
    images = clips()[:, 0]
    padding = torch.ones(2, 16, dtype=torch.long)
    padding[1, 9:] = 0
    own = ijepa()(images, attention_mask=padding).last_hidden_state
    model = ijepa(attn_implementation="jepa_kernels")
    assert torch.equal(model(images, attention_mask=padding).last_hidden_state, own)
    assert not torch.allclose(model(images).last_hidden_state[1], own[1])
    with pytest.raises(ValueError, match=r"attn_implementation='jepa_kernels': dropout must be 0, got 0.5"):
        small(attn_implementation="jepa_kernels", attention_probs_dropout_prob=0.5).train()(clips())
    causal = small(attn_implementation="jepa_kernels")
    causal.encoder.layer[0].attention.is_causal = True
    with pytest.raises(ValueError, match="is_causal must be False, got True"):
        causal(clips())
