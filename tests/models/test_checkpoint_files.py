"""Models built from files alone, and the files: several, torn, malicious, half written."""

import json
import os
import resource
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from jepa_kernels.models import ijepa, lejepa, sizes, vjepa2
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.lejepa import LeJEPA
from jepa_kernels.models.lewm import LeWorldModel, pusht
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config
from tests.models import published, test_checkpoints, test_vjepa2_checkpoints
from tests.models.weights import same, shaken

SMALL = VJEPA2Config(
    patch_size=8, embed_dim=48, depth=2, num_heads=2, predictor_embed_dim=32, predictor_depth=2, predictor_num_heads=2,
    num_mask_tokens=3, mlp_ratio=3.3, tubelet_size=4,
)  # fmt: skip
HEADS = {"num_heads": 2, "predictor_num_heads": 2}


@pytest.fixture
def donor():
    return shaken(VJEPA2(SMALL), 1)


@pytest.mark.parametrize("norm", ["norm", "fc_norm"])
def test_our_encoder_in_timms_names_comes_back(norm, tmp_path):
    sizes = dict(crop_size=24, patch_size=8, embed_dim=32, depth=2, num_heads=2, predictor_embed_dim=16)
    own = shaken(IJEPA(IJEPAConfig(**sizes, predictor_depth=1)), 1).context_encoder.state_dict()
    theirs = {name.replace("norm.", f"{norm}.", 1) if name.startswith("norm.") else name: x for name, x in own.items()}
    theirs |= {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    assert {n: tuple(x.shape) for n, x in theirs.items()} == published.timm(32, 2, 128, (8, 8), 9, norm, 5)
    save_file(theirs, tmp_path / "model.safetensors")
    encoder, report = IJEPA.load_encoder(tmp_path / "model.safetensors", num_heads=2)
    assert same(encoder.state_dict(), own) and set(report.loaded) == own.keys()
    assert report.ignored == {"classifier": "one encoder was asked for"}


@pytest.mark.parametrize("model", [LeWorldModel, LeJEPA])
def test_another_models_and_torn_files_are_named_before_anything_is_built(model, donor, tmp_path):
    path = tmp_path / "theirs.safetensors"
    donor.save(path)
    with pytest.raises(ValueError, match=rf"^{model.__name__}: checkpoint must be of a \w+, got a config with .+"):
        model.from_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"^{model.__name__}: .+ must be a safetensors file .+: SafetensorError: "):
        model.from_checkpoint(path)
    if model is LeWorldModel:
        with pytest.raises(TypeError, match=r"^LeWorldModel: changes must be fields of LeWMConfig, got wide; leave"):
            LeWorldModel.from_checkpoint(LeWorldModel(pusht()).state_dict(), wide=1)


def shaped(networks):
    """Tensors of these shapes and no values."""
    return {part: {k: torch.empty(v, device="meta") for k, v in own.items()} for part, own in networks.items()}


def ijepa_networks(width, depth, hidden, patch, tokens, predictor_depth):
    encoder = published.meta_encoder(width, depth, hidden, (patch, patch), tokens)
    return shaped({"encoder": encoder, "predictor": published.meta_predictor(width, predictor_depth, None)})


def vjepa2_networks(width, depth, heads, hidden, *rest):
    encoder = published.meta_encoder(width, depth, hidden, (2, 16, 16))
    return shaped({"target_encoder": encoder, "predictor": published.meta_predictor(width, 12, 10)})


@pytest.mark.parametrize("name", ijepa.SIZES)
def test_the_config_of_every_ijepa_is_told_by_its_shapes(name):
    networks = ijepa_networks(*test_checkpoints.SIZES[name])
    assert sizes.config_for("test", ijepa.SIZES, networks, {}) == ijepa.SIZES[name]()
    assert sizes.config_for("test", ijepa.SIZES, networks, {"in_chans": 1}) == ijepa.SIZES[name](in_chans=1)


@pytest.mark.parametrize("name", vjepa2.SIZES)
def test_the_config_of_every_vjepa2_is_told_by_its_shapes(name):
    networks = vjepa2_networks(*test_vjepa2_checkpoints.SIZES[name])
    changes = {"crop_size": 384} if name.endswith("_384") else {}  # which no weight tells
    assert sizes.config_for("test", vjepa2.SIZES, networks, changes) == vjepa2.SIZES[name]()


def test_a_table_of_positions_tells_the_crop():
    networks = ijepa_networks(1280, 32, 5120, 14, 1024, 12)
    assert sizes.config_for("test", ijepa.SIZES, networks, {}) == ijepa.vit_huge_14(crop_size=448)


def test_a_model_is_built_from_its_file_alone(donor, tmp_path):
    donor.save(tmp_path / "model.safetensors")
    model, report = VJEPA2.from_checkpoint(tmp_path / "model.safetensors")
    assert same(model.state_dict(), donor.state_dict()) and not report.missing and model.config == SMALL
    model, _ = VJEPA2.from_checkpoint(load_file(tmp_path / "model.safetensors"), **HEADS)  # by shapes alone
    assert same(model.state_dict(), donor.state_dict())
    assert replace(model.config, mlp_ratio=SMALL.mlp_ratio) == SMALL


def test_what_no_weight_tells_comes_back_from_the_file_and_is_not_loaded_into_another(tmp_path):
    path = tmp_path / "model.safetensors"
    config = replace(SMALL, rope="interleaved", frame_causal=True, crop_size=(32, 16), context_weight=0.25)
    donor = VJEPA2(config)
    donor.save(path)
    model, _ = VJEPA2.from_checkpoint(path)
    encoder, _ = VJEPA2.load_encoder(path)
    clips = torch.randn(1, 3, 8, 32, 16)
    assert model.config == config and torch.equal(model.ema(clips), donor.ema(clips))
    assert torch.equal(encoder(clips), donor.ema(clips))
    assert VJEPA2.from_checkpoint(path, frame_causal=False)[0].config == replace(config, frame_causal=False)
    other = VJEPA2(SMALL)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError) as error:
        other.load(path)
    assert str(error.value) == (
        "VJEPA2: checkpoint must be of rope='tiled', frame_causal=False, got rope='interleaved', frame_causal=True; "
        "build the model by from_checkpoint, or pass the file's tensors"
    )
    assert same(other.state_dict(), before)
    VJEPA2(replace(config, crop_size=16, context_weight=0.5)).load(path)  # which do not change what weights compute
    other.load(load_file(path))


@pytest.mark.parametrize("text", ["{", "3"])
def test_a_config_that_is_none_is_refused(donor, tmp_path, text):
    save_file(donor.state_dict(), tmp_path / "model.safetensors", metadata={"jepa_kernels.config": text})
    with pytest.raises(ValueError, match=r"VJEPA2: .*model\.safetensors must be a file with a config in JSON of plain"):
        VJEPA2(SMALL).load(tmp_path / "model.safetensors")


def test_heads_that_shapes_do_not_tell_are_asked_for(donor):
    wanted = "VJEPA2: checkpoint must be of a published size, got embed_dim 48, depth 2, patch_size 8; pass "
    for given in ({}, {"num_heads": 2}):
        with pytest.raises(ValueError) as error:
            VJEPA2.from_checkpoint(donor.state_dict(), **given)
        assert str(error.value) == wanted + "num_heads and predictor_num_heads, which shapes do not tell"
    with pytest.raises(TypeError, match="VJEPA2: changes must be fields of VJEPA2Config, got heads; leave them out"):
        VJEPA2.from_checkpoint(donor.state_dict(), heads=2, **HEADS)
    _, report = VJEPA2.from_checkpoint({"encoder": donor.context_encoder.state_dict()}, num_heads=2)
    assert report.missing["predictor"] == "at its random start"
    with pytest.raises(ValueError, match="VJEPA2: checkpoint must hold an encoder, got no patch_embed"):
        VJEPA2.from_checkpoint({"predictor": {}})


@pytest.mark.parametrize("network", ["encoder", "target_encoder"])
def test_an_encoder_is_built_alone(donor, network):
    encoder, report = VJEPA2.load_encoder(donor.state_dict(), network=network, num_heads=2)
    own = donor.context_encoder if network == "encoder" else donor.target_encoder
    other = "target_encoder" if network == "encoder" else "encoder"
    assert same(encoder.state_dict(), own.state_dict()) and not report.missing
    assert set(report.loaded) == encoder.state_dict().keys()
    assert report.ignored == dict.fromkeys((other, "predictor"), "one encoder was asked for")
    assert not any(p.requires_grad for p in encoder.parameters())
    clips = torch.randn(1, 3, 8, 16, 24)
    assert torch.equal(encoder(clips), own(clips).detach())


def test_a_model_without_memory_loads_nothing_and_says_so(donor, tmp_path):
    """A copy to the meta device does nothing."""
    donor.save(tmp_path / "own.safetensors")
    views = lejepa.LeJEPA.of(lejepa.digits(depth=1))
    views.save(tmp_path / "views.safetensors")
    for model, path in ((VJEPA2(SMALL), "own"), (views, "views")):
        message = f"{type(model).__name__}: model must hold memory to load into, got .+ on the meta device; build it"
        with pytest.raises(ValueError, match=message):
            model.to("meta").load(tmp_path / f"{path}.safetensors")


def test_the_one_encoder_of_a_file_takes_the_place_of_the_other(donor):
    encoder, report = VJEPA2.load_encoder({"encoder": donor.context_encoder.state_dict()}, num_heads=2)
    assert same(encoder.state_dict(), donor.context_encoder.state_dict())
    assert report.missing == {"target_encoder": "the encoder takes its place"}
    with pytest.raises(ValueError, match="VJEPA2: network must be encoder or target_encoder, got 'predictor'; leave"):
        VJEPA2.load_encoder({}, network="predictor")


def test_a_file_without_a_predictor_leaves_the_models(donor):
    model = VJEPA2(SMALL)
    before = {name: value.clone() for name, value in model.predictor.state_dict().items()}
    report = model.load({"target_encoder": donor.target_encoder.state_dict(), "epoch": 3})
    assert set(report.loaded) == {name for name in model.state_dict() if not name.startswith("predictor.")}
    for encoder in (model.context_encoder, model.target_encoder):
        assert same(encoder.state_dict(), donor.target_encoder.state_dict())
    assert same(model.predictor.state_dict(), before)
    assert str(report) == (
        "VJEPA2: 56 of its tensors loaded from Meta's layout\n"
        "  ignored: epoch (no weights of a network)\n"
        "  missing: encoder (the target_encoder's weights are in its place)\n"
        "  missing: predictor (left as it was)"
    )


def test_a_long_report_stays_short(donor):
    state = {"encoder": donor.context_encoder.state_dict(), **{f"key{i}": i for i in range(8)}}
    said = str(VJEPA2(SMALL).load(state))
    assert "\n  ignored: key0, key1, key2, key3, key4, key5 and 2 more (no weights of a network)\n" in said


def test_a_probe_in_the_file_is_reported(donor):
    report = VJEPA2(SMALL).load({"encoder": donor.context_encoder.state_dict(), "classifier": {"linear.bias": 0}})
    assert report.ignored == {"classifier": "a probe, which load_probe reads"}


# Several files.


def shards(donor, folder):
    donor.save(folder / "whole.safetensors", "huggingface")
    tensors = load_file(folder / "whole.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == shard}, folder / shard)
    return places


def index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / "model.safetensors.index.json"


def test_a_model_in_several_files_loads_by_its_index(donor, tmp_path):
    model = VJEPA2(SMALL)
    model.load(index(tmp_path, shards(donor, tmp_path)))
    assert same(model.target_encoder.state_dict(), donor.target_encoder.state_dict())
    assert same(model.predictor.state_dict(), donor.predictor.state_dict())


@pytest.mark.parametrize("kind", ["elsewhere", "a name too many", "a name too few", "absent", "no map", "no json"])
def test_an_index_that_does_not_fit_its_files_is_refused(donor, tmp_path, kind):
    places = shards(donor, tmp_path)
    first = min(places)
    if kind == "elsewhere":
        places[first] = f"../{places[first]}"
    if kind == "a name too many":
        places["encoder.extra"] = places[first]
    if kind == "a name too few":
        del places[first]
    if kind == "absent":
        (tmp_path / places[first]).unlink()
    path = index(tmp_path, None if kind == "no map" else places)
    if kind == "no json":
        path.write_text("{")
    with pytest.raises(FileNotFoundError if kind == "absent" else ValueError) as error:
        VJEPA2(SMALL).load(path)
    if kind != "absent":
        assert str(error.value).startswith(f"VJEPA2: {tmp_path}/model")
        assert ("must be an index" in str(error.value)) == (kind in ("elsewhere", "no map", "no json"))


# Files of others.


class Evil:
    """A pickle that would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    for zipped in (True, False):
        torch.save({"encoder": Evil(tmp_path / "ran")}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"VJEPA2: .*evil\.pt must be a torch file of plain tensors, got: "):
            VJEPA2(SMALL).load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_torn_anywhere_is_refused(donor, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    donor.save(path) if suffix == ".safetensors" else torch.save({"encoder": donor.state_dict()}, path)
    whole, model = path.read_bytes(), VJEPA2(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for part in (0.0, 0.001, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match=r"VJEPA2: .*must be a \w+ file of plain tensors, got: .*; save it again"):
            model.load(path)
    assert same(model.state_dict(), before)


# Writing.


def test_a_file_that_can_not_be_written_leaves_the_old_one(donor, tmp_path):
    path, (soft, hard) = tmp_path / "model.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    donor.save(path)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # files end there, as on a full disk
    try:
        with pytest.raises(OSError, match=r"VJEPA2: .*model\.safetensors must be writable, got .*; free space"):
            donor.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_asked_of_save_is_checked(donor, tmp_path):
    with pytest.raises(ValueError, match=r"VJEPA2: path must end in \.safetensors, got .*model\.pt; the name tells"):
        donor.save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="VJEPA2: layout must be meta or huggingface, got 'timm'; leave it"):
        donor.save(tmp_path / "model.safetensors", "timm")
    with pytest.raises(TypeError, match=r"VJEPA2: dtype must be real and floating, got torch\.int8; leave it out"):
        donor.save(tmp_path / "model.safetensors", dtype=torch.int8)
    with pytest.raises(OSError, match=r"VJEPA2: .*absent/model\.safetensors must be writable, got .*; free space"):
        donor.save(tmp_path / "absent/model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_of_half_precision_is_half_as_large_and_keeps_the_values(donor, tmp_path):
    donor.save(tmp_path / "full.safetensors")
    donor.save(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    full, half = load_file(tmp_path / "full.safetensors"), load_file(tmp_path / "half.safetensors")
    assert same({name: value.bfloat16() for name, value in full.items()}, half)
    assert {name.split(".")[0] for name in full} == {"encoder", "target_encoder", "predictor"}


def test_an_ijepa_file_tells_what_its_positions_are_of(tmp_path):
    small = IJEPAConfig(crop_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, predictor_embed_dim=32)
    IJEPA(small).save(tmp_path / "model.safetensors")
    assert IJEPA.from_checkpoint(load_file(tmp_path / "model.safetensors"), num_heads=2)[0].config == small
    with pytest.raises(ValueError, match="; its size seems to be embed_dim 48, depth 2, patch_size 8 with 16 patches"):
        IJEPA(replace(small, crop_size=40)).load(tmp_path / "model.safetensors")
