"""What changes in a model after its patch, or stands in it before, in ways that a patch can't know."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from jepa_kernels.integrations import huggingface, meta, ropes
from jepa_kernels.integrations import timm as timm_patch
from tests.integrations import test_ijepa_patch, test_timm, vjepa2_models
from tests.integrations.adapters import Adapter, Integers
from tests.integrations.parity import drawn
from tests.integrations.test_meta import forward, network

vit, make = test_timm.vit, test_ijepa_patch.make  # fixtures
KINDS = ["ijepa", "vjepa", "vjepa2", "no-rope"]


def classifier():
    return vjepa2_models.small("VJEPA2ForVideoClassification")


@pytest.fixture(params=["timm", "meta", "ijepa", "vjepa2"])
def case(request):
    """(a model, its convolution, its patch, what it computes), the same at every call."""
    if request.param == "timm":
        vit = request.getfixturevalue("vit")
        return lambda: (m := vit(), m.patch_embed.proj, timm_patch.patch, lambda: test_timm.logits(m)["logits"])
    if request.param == "meta":
        return lambda: (m := network("vjepa2"), m.patch_embed.proj, meta.patch, lambda: forward("vjepa2")(m)["out"])
    if request.param == "ijepa":
        make = request.getfixturevalue("make")
        inside = "embeddings.patch_embeddings.projection"
        run = test_ijepa_patch.features
        return lambda: (m := make(), m.get_submodule(inside), huggingface.patch, lambda: run(m)["out"])
    inside, clips = "vjepa2.encoder.embeddings.patch_embeddings.proj", vjepa2_models.clips()
    return lambda: (m := classifier(), m.get_submodule(inside), huggingface.patch, lambda: m(clips).logits)


@pytest.mark.parametrize("put", ["hook", "mask"])
def test_what_is_put_around_the_convolution_later_runs(case, put):
    outs = []
    for patched in (True, False):
        model, conv, patch, run = case()
        if patched:
            patch(model, verify=False)
        plain = run()
        if put == "hook":
            conv.register_forward_hook(lambda conv, args, out: 2 * out)
        else:  # a hook of its own computes the weight that the convolution reads
            prune.l1_unstructured(conv, "weight", 0.5)
            conv.weight_orig.data.mul_(2)
        outs.append(run())
        assert not torch.allclose(outs[-1], plain, rtol=0, atol=1e-2)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-3)


def test_a_masked_encoder_refuses_a_convolution_that_is_watched_later():
    model, (context, target) = vjepa2_models.small(), vjepa2_models.masks()
    huggingface.patch(model, masked_encoder=True)
    model.encoder.embeddings.patch_embeddings.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"proj must be the convolution of the patch, got hooks on Conv3d would not r"):
        model(vjepa2_models.clips(), context_mask=[context], target_mask=[target])


def test_dropout_of_weights_that_is_set_later_drops(vit, make):
    def timms():
        model = vit()
        return model, [(block.attn.attn_drop, "p") for block in model.blocks], lambda: test_timm.logits(model)["logits"]

    def metas(kind):
        model = network(kind)
        sdpa, run = kind in ("vjepa", "vjepa2", "no-rope"), forward(kind)
        places = [(b.attn, "proj_drop_prob") if sdpa else (b.attn.attn_drop, "p") for b in model.blocks]
        return model, places, lambda: run(model)["out"]

    def ijepas():
        model, run = make(), test_ijepa_patch.features
        return model, [(layer.attention, "attention_dropout") for layer in model.layers], lambda: run(model)["out"]

    def poolers():
        model, clips = classifier(), vjepa2_models.clips()
        found = [m for m in model.pooler.modules() if type(m).__name__.endswith("Attention")]
        return model, [(m, "dropout") for m in found], lambda: model(clips).logits

    cases = [(timms, timm_patch), (ijepas, huggingface), (poolers, huggingface)]
    for build, integration in cases + [(lambda kind=kind: metas(kind), meta) for kind in KINDS]:
        outs = []
        for patched in (True, False):
            model, places, run = build()
            if patched:
                integration.patch(model, verify=False)
            for owner, name in places:
                setattr(owner, name, 0.5)
            model.train()
            torch.manual_seed(3)
            outs.append(run())
        assert places and not torch.equal(outs[1], run())
        torch.testing.assert_close(*outs, rtol=0, atol=1e-3)


def test_dropout_that_rotary_attention_can_not_have_is_refused():
    model, clips = vjepa2_models.small(), vjepa2_models.clips()
    huggingface.patch(model)
    model.encoder.layer[1].attention.dropout_prob = 0.5
    model(clips)
    with pytest.raises(ValueError, match=r"patched VJEPA2: attention dropout must stay 0, got 0\.5; undo the patch"):
        model.train()(clips)


def test_pixels_without_a_batch_are_refused_by_timm_itself(vit):
    model = vit()
    timm_patch.patch(model)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        model(drawn(3, 32, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_another_kind_are_left_alone_or_not_verified(kind):
    model = network(kind)
    expected = forward(kind)(model)["out"]
    model.blocks[0].attn.qkv = Adapter(model.blocks[0].attn.qkv)  # which tells no sizes
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.lora_B.weight)
    done = meta.patch(model)
    why = "its qkv is Adapter, which does not tell its in_features and out_features"
    assert done.skipped == {"blocks.0.attn": why} and "blocks.1.attn" in done.patched
    torch.testing.assert_close(forward(kind)(model)["out"], expected, rtol=0, atol=1e-3)
    model = network(kind)
    for name in ("qkv", "proj"):
        setattr(model.blocks[1].attn, name, Integers(getattr(model.blocks[1].attn, name)))
    expected = forward(kind)(model)["out"]
    message = "patch: .*Attention must hold floating weights, to be verified, got none; pass verify=False"
    with pytest.raises(ValueError, match=message):
        meta.patch(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not meta.patch(model, verify=False).skipped
    torch.testing.assert_close(forward(kind)(model)["out"], expected, rtol=0, atol=1e-3)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(os.fspath(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_weights_are_left_where_they_are(alone):
    """Others can't stand in their places: FSDP2 puts its own there in every forward."""
    mesh, clips = dist.device_mesh.init_device_mesh("cpu", (1,)), vjepa2_models.clips()
    model, expected = vjepa2_models.small(), vjepa2_models.small()(clips, skip_predictor=True).last_hidden_state
    for part in (*model.encoder.layer, model):
        fully_shard(part, mesh=mesh)
    with pytest.raises(ValueError, match=r"patch: model must hold whole weights to be verified, got sharded ones; pat"):
        huggingface.patch(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(clips, skip_predictor=True).last_hidden_state, expected)
    huggingface.patch(model, verify=False)
    found = model(clips, skip_predictor=True).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    found.square().sum().backward()
    assert all(p.grad.full_tensor().isfinite().all() for p in model.encoder.parameters())


class Interrupting(str):
    """A pairing during whose comparison another thread attends on another grid."""

    meanwhile = None

    def __eq__(self, other):
        if self.meanwhile is not None:
            self.meanwhile()
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_threads_do_not_take_each_others_positions():
    shared, qkv = ropes.Ropes(None), drawn(1, 12, 3, 2, 16)
    expected = shared.of(qkv, None, (3, 4), "tiled")
    pairing = Interrupting("tiled")
    pairing.meanwhile = lambda: shared.of(qkv, None, (4, 3), "tiled")
    assert shared.of(qkv, None, (3, 4), pairing) is expected
