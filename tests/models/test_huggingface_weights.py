"""Our models with Hugging Face's weights give Hugging Face's numbers: VJEPA2, its predictor and its probe, IJepa."""

import pytest
import torch

from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.probes import load_probe
from jepa_kernels.models.vjepa2 import VJEPA2
from jepa_kernels.nn.patch_embed import sincos_2d
from jepa_kernels.testing import hold
from tests.models.weights import shaken

transformers = pytest.importorskip("transformers")


@pytest.fixture
def video():
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        crop_size=24, frames_per_clip=4, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        pred_hidden_size=48, pred_num_hidden_layers=2, pred_num_attention_heads=2, num_labels=5, num_pooler_layers=2,
    )  # fmt: skip
    return shaken(transformers.VJEPA2ForVideoClassification(config), 0.1).eval()


@pytest.fixture
def image():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, layer_norm_eps=1e-6)
    config = transformers.IJepaConfig(image_size=24, patch_size=8, **sizes)
    model = shaken(transformers.IJepaModel(config, add_pooling_layer=False), 0.1).eval()
    model.embeddings.position_embeddings.data.copy_(sincos_2d((3, 3), 64)[None])  # as published
    return model


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}  # before the exact side is made of it


def within(name, ours, theirs, inputs):
    """Ours against theirs in float64, within twice the error of theirs in float32."""
    with torch.no_grad():
        eager, exact = theirs(inputs), theirs(inputs.double())
        parity = hold(name, ours(inputs), exact, eager)
    assert parity.ok, parity


def in_dtype(model, call):
    """call(model, inputs) with the model in the dtype of the inputs."""
    return lambda inputs: call(model.to(inputs.dtype), inputs)


def test_the_encoder_and_the_probe(video):
    state, clips = state_of(video), torch.randn(2, 4, 3, 24, 24)
    encoder, report = VJEPA2.load_encoder(state, num_heads=4)
    assert report.ignored == dict.fromkeys(("predictor", "classifier"), "one encoder was asked for")
    probe, report = load_probe(state, num_heads=4)
    assert report.ignored == dict.fromkeys(("encoder", "predictor"), "not of the probe")
    ours = lambda x: encoder(x.transpose(1, 2))  # noqa: E731
    theirs = in_dtype(video, lambda m, x: m.vjepa2(x, skip_predictor=True).last_hidden_state)
    within("latents", ours, theirs, clips)
    within("logits", lambda x: probe(ours(x)), in_dtype(video, lambda m, x: m(x).logits), clips)


def test_the_predictor(video):
    model, report = VJEPA2.from_checkpoint(state_of(video), num_heads=4, predictor_num_heads=2)
    assert report.ignored == {"classifier": "a probe, which load_probe reads"}
    order = torch.stack([torch.randperm(18) for _ in range(2)])
    context, target = order[:, :7].sort(1).values, order[:, 7:].sort(1).values

    def ours(clips):
        clips = clips.transpose(1, 2)
        seen = model.context_encoder(clips).gather(1, context[..., None].expand(-1, -1, 64))  # encoded with the others
        return model.predictor(seen, context, target, grid=model.context_encoder.grid_of(clips), mask_index=1)

    def theirs(m, clips):
        return m.vjepa2(clips, context_mask=[context], target_mask=[target]).predictor_output.last_hidden_state

    within("predictions", ours, in_dtype(video, theirs), torch.randn(2, 4, 3, 24, 24))


def test_ijepa(image):
    sizes = dict(crop_size=24, patch_size=8, embed_dim=64, depth=2, num_heads=4, predictor_embed_dim=32)
    model = IJEPA(IJEPAConfig(**sizes))
    assert model.load(state_of(image)).missing.keys() == {"target_encoder", "predictor"}
    theirs = in_dtype(image, lambda m, x: m(x).last_hidden_state)
    within("latents", model.target_encoder, theirs, torch.randn(2, 3, 24, 24))
