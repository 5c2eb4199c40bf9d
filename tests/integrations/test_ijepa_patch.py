"""Hugging Face's IJepa on the kernels: the numbers of the unpatched model, and what stays transformers' own."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from jepa_kernels.integrations.huggingface import patch
from tests.integrations.parity import but_for_products, drawn, failures, far_from_its_start

transformers = pytest.importorskip("transformers")
SIZES = dict(
    hidden_size=160, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=24, patch_size=8
)  # heads of 80 channels, as the published ViT-H
images = drawn(2, 3, 24, 24)


@pytest.fixture
def make():
    def one(seed=0, kind="IJepaModel", implementation="sdpa", dtype=torch.float32, **changes):
        torch.manual_seed(seed)
        config = transformers.IJepaConfig(**{**SIZES, "num_labels": 5, **changes}, attn_implementation=implementation)
        own = {} if "For" in kind else {"add_pooling_layer": False, "use_mask_token": True}
        return far_from_its_start(getattr(transformers, kind)(config, **own)).eval().to(dtype)

    return one


def features(model, **given):
    found = model(images.to(next(model.parameters()).dtype), **given)
    return {"out": found.logits if "logits" in found else found.last_hidden_state}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["IJepaModel", "IJepaForImageClassification"])
def test_outputs_and_gradients_are_those_of_the_unpatched_model(make, kind, dtype):
    assert not failures([make(seed, kind, dtype=dtype) for seed in range(3)], patch, features)


def test_under_autocast_too(make):
    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
            return features(model)

    assert not failures([make(seed) for seed in range(6)], patch, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_compiles_as_one_graph(make, dtype):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    changed = lambda run: torch.compile(run, fullgraph=True, backend=counter)  # noqa: E731
    assert not failures([make(seed, num_hidden_layers=1, dtype=dtype) for seed in range(2)], patch, features, changed)
    assert counter.frame_count == 2  # one for each model


def test_its_attention_compiles_where_tensors_are_laid_out_anew(make):
    """One module: inductor takes minutes for the many kernels of a model."""
    torch._dynamo.reset()
    counter, hidden = CompileCounterWithBackend("inductor"), drawn(2, 9, 160)

    def attention(model):
        return {"out": model.layers[0].attention(hidden.to(next(model.parameters()).dtype))[0]}

    changed = lambda run: torch.compile(run, fullgraph=True, backend=counter)  # noqa: E731
    assert not failures([make(num_hidden_layers=1)], patch, attention, changed)
    assert counter.frame_count == 1


def test_a_report_names_what_was_replaced(make):
    lines = str(patch(make())).split("\n")
    assert lines[:4] == [
        "IJepaModel: 15 modules patched, 0 left alone",
        "  patched: patches embedded by one product over pixels read in place: embeddings.patch_embeddings",
        "  patched: masked_attention: layers.0.attention, layers.1.attention",
        "  patched: large products by linear: layers.0.attention.q_proj, layers.0.attention.k_proj ... "
        "layers.1.mlp.fc2 (12)",
    ]
    assert [line.split(":")[1].strip() for line in lines[4:]] == ["embeddings", "features"]


def test_mask_tokens_and_positions_of_larger_images_stay(make):
    masked = dict(bool_masked_pos=torch.arange(9).lt(4).expand(2, 9))
    assert not failures([make()], patch, lambda model: features(model, **masked))
    larger, model = drawn(1, 3, 32, 43), make()  # of 5 columns and a rest
    expected = model(larger, interpolate_pos_encoding=True).last_hidden_state
    patch(model)
    found = model(larger, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"Input image size \(32\*43\) doesn't match model \(24\*24\)"):
        model(larger)


def test_calls_with_a_mask_or_for_weights_are_transformers_own(make):
    model, mask = make(), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    attention, x = model.layers[0].attention, drawn(2, 9, 160)
    expected = attention(x, mask[:, None, None])
    patch(model)
    assert torch.equal(attention(x, mask[:, None, None])[0], expected[0])
    model.set_attn_implementation("eager")
    out = model(images, output_attentions=True)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (2, 2, 9, 9)


def test_hidden_states_hooks_and_the_state_dict_stay(make):
    model, seen = make(), []
    state, expected = model.state_dict(), model(images, output_hidden_states=True).hidden_states
    model.layers[1].attention.q_proj.register_forward_hook(lambda *_: seen.append("q_proj"))
    patch(model, verify=False)
    found = model(images, output_hidden_states=True).hidden_states
    assert len(found) == 3 and seen == ["q_proj"]
    for actual, own in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, own, rtol=0, atol=1e-3)
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)


def test_dropout_of_hidden_states_stays(make):
    model = make(hidden_dropout_prob=0.5)
    patch(model)
    zeros = (model.train().embeddings(images) == 0).double().mean()
    assert abs(zeros - 0.5) < 0.05


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(attention_probs_dropout_prob=0.25), "attention dropout is 0.25, which the kernel has not: 0 allows it"),
        (dict(num_attention_heads=40), "the kernel takes head dims that are multiples of 8 up to 128, not 4"),
        (
            dict(implementation="eager"),
            "attn_implementation is 'eager': model.set_attn_implementation('sdpa') before the patch allows it",
        ),
    ],
)
def test_other_attention_is_left_alone(make, changes, why):
    done = patch(make(**changes))
    assert done.skipped == {"layers.0.attention": why, "layers.1.attention": why}
    assert but_for_products(done) == ["embeddings.patch_embeddings"]


def test_a_convolution_with_hooks_is_left_alone(make):
    model = make()
    model.embeddings.patch_embeddings.projection.register_forward_hook(lambda *_: None)
    assert patch(model).skipped == {"embeddings.patch_embeddings": "hooks on Conv2d would not run"}


@pytest.mark.parametrize("option", [dict(masked_encoder=True), dict(angle_dtype=torch.float32)], ids=str)
def test_options_of_video_are_refused(make, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"patch: {name} must be left out for IJepa, got .*; it is of VJEPA2"):
        patch(make(), **option)
