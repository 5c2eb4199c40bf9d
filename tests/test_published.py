"""The configs of published runs: each is one, each line says where it is from, values against a table of their own."""

import re

import pytest
import torch
import yaml

from jepa_kernels import configs, schedules, train
from jepa_kernels.configs import FOLDER, PUBLISHED
from jepa_kernels.models.ijepa import IJEPA
from jepa_kernels.models.vl_jepa import Predictor
from jepa_kernels.recipes import RECIPES
from tests import runs
from tests.test_train import TINY

SOURCES = "public config", "public code", "paper", "minimal example", "unknown", "ours", "yours"
# Written from the papers' tables, not from the files: width, depth, heads, patch, pixels, predictor's depth, tokens.
NETWORKS = {
    "ijepa_vith14_in1k": (1280, 32, 16, 14, 224, 12, 256),
    "ijepa_vith14_in22k": (1280, 32, 16, 14, 224, 12, 256),
    "ijepa_vith16_448_in1k": (1280, 32, 16, 16, 448, 12, 784),
    "ijepa_vitl16_in1k": (1024, 24, 16, 16, 224, 12, 196),
    "ijepa_vitg16_in22k": (1408, 40, 16, 16, 224, 16, 196),
    "vjepa2_vitl": (1024, 24, 16, 16, 256, 12, 2048),
    "vjepa2_vith": (1280, 32, 16, 16, 256, 12, 2048),
    "vjepa2_vitg": (1408, 40, 22, 16, 256, 12, 2048),
    "vjepa2_vitl_cooldown": (1024, 24, 16, 16, 256, 12, 8192),
    "vjepa2_vith_cooldown": (1280, 32, 16, 16, 256, 12, 8192),
    "vjepa2_vitg_cooldown_256": (1408, 40, 22, 16, 256, 12, 8192),
    "vjepa2_vitg_cooldown_384": (1408, 40, 22, 16, 384, 12, 18432),
}
# batch, learning rates of the first step, of the last of the warm-up and of the end, first and last momentum, decays
RUNS = {
    "ijepa_vith14_in1k": (2048, 2e-4, 1e-3, 1e-6, 0.996, 1.0, 0.04, 0.4),
    "ijepa_vith16_448_in1k": (2048, 2e-4, 1e-3, 1e-6, 0.996, 1.0, 0.04, 0.4),
    "ijepa_vitg16_in22k": (2048, 2e-4, 1e-3, 1e-6, 0.996, 1.0, 0.04, 0.4),
    "ijepa_vitl16_in1k": (2048, 1e-4, 1e-3, 1e-6, 0.996, 1.0, 0.04, 0.4),
    "vjepa2_vitl": (3072, 1e-4, 5.25e-4, 5.25e-4, 0.99925, 0.99925, 0.04, 0.04),
    "vjepa2_vitg": (3072, 1e-4, 5.25e-4, 5.25e-4, 0.99925, 0.99925, 0.04, 0.04),
    "vjepa2_vitl_cooldown": (3072, 5.25e-4, 5.25e-4, 1.058e-4, 0.99925, 0.99925, 0.04, 0.04),  # 0.8 of the way
    "vjepa2_vitg_cooldown_384": (3072, 5.25e-4, 5.25e-4, 1.058e-4, 0.99925, 0.99925, 0.04, 0.04),
}
WARM_UP = {"ijepa_vith14_in1k": 40 * 625, "ijepa_vith16_448_in1k": 40 * 625, "ijepa_vitl16_in1k": 15 * 625}
WARM_UP |= {"ijepa_vitg16_in22k": 3 * 6932, "vjepa2_vitl": 12_000, "vjepa2_vitg": 12_000}


def tree(name):
    return yaml.safe_load((FOLDER / PUBLISHED / f"{name}.yaml").read_text())


def test_the_runs_are_there():
    assert {*NETWORKS, *RUNS} <= set(configs.published()) and len(configs.published()) == 15
    assert {tree(name)["architecture"] for name in configs.published()} == set(configs.DEFAULTS)


@pytest.mark.parametrize("name", configs.published())
def test_every_line_says_where_it_is_from(name):
    text, values = (FOLDER / PUBLISHED / f"{name}.yaml").read_text(), 0
    for line in text.splitlines():
        if line.startswith("#") or re.fullmatch(r"\w+:", line):
            continue
        value, _, source = line.partition("  # ")
        assert re.fullmatch(r"(  )?\w+: \S.*", value) and source.startswith(SOURCES), line
        values += 1
    assert values == len(configs.flat(tree(name)))


@pytest.mark.parametrize("name", configs.published())
def test_each_is_a_config_whose_networks_can_be_built(name):
    config = configs.read(name)
    assert config.architecture == tree(name)["architecture"]
    with torch.device("meta"):
        if config.architecture != "vl_jepa":  # its text encoder lies in a package
            RECIPES[config.architecture].model(config.model)
        else:  # 8 layers of Llama 3.2 1B: queries and outputs, keys and values, the MLP, two norms
            layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
            predictor = Predictor(config.model)
            assert sum(p.numel() for p in predictor.layers.parameters()) == 8 * layer
            assert predictor.out_proj.weight.shape == (1536, 2048)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_those_of_the_papers_tables(name):
    width, depth, heads, patch, pixels, predictor, tokens = NETWORKS[name]
    c = configs.read(name).model
    assert (c.embed_dim, c.depth, c.num_heads, c.patch_size, c.crop_size) == (width, depth, heads, patch, pixels)
    assert (c.predictor_depth, c.predictor_embed_dim) == (predictor, 384)
    frames = getattr(c, "num_frames", 1) // getattr(c, "tubelet_size", 1)
    assert (pixels // patch) ** 2 * frames == tokens
    with torch.device("meta"):
        hidden = RECIPES[configs.read(name).architecture].model(c).context_encoder.blocks[0].mlp.fc1.out_features
    assert hidden == {1024: 4096, 1280: 5120, 1408: 6144}[width]


@pytest.mark.parametrize("name", RUNS)
def test_schedules_are_those_of_the_papers(name):
    batch, start, peak, end, first, last, decay, final_decay = RUNS[name]
    config = configs.read(name)
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.config, trainer.optimizer = config, type("Optimizer", (), {"param_groups": []})
    steps = config.optimization.steps

    def at(step):
        trainer.step = step
        return trainer.schedule()

    warm_up = WARM_UP.get(name, 0)
    assert config.data.batch_size == batch
    assert at(0)["lr"] == pytest.approx(start + (peak - start) / warm_up if warm_up else start, rel=1e-3)
    assert warm_up == 0 or at(warm_up - 2)["lr"] < at(warm_up - 1)["lr"] == peak
    assert at(steps - 1)["lr"] == pytest.approx(end, rel=1e-3)
    assert at(0)["momentum"] == first and at(steps - 1)["momentum"] == pytest.approx(last, abs=1e-6)
    assert at(0)["weight_decay"] == pytest.approx(decay) and at(steps - 1)["weight_decay"] == pytest.approx(final_decay)


def test_masks_and_crops_are_those_of_the_papers():
    images, clips = configs.read("ijepa_vith14_in1k"), configs.read("vjepa2_vitg")
    m = images.mask
    assert (m.target_scale, m.context_scale, m.target_aspect_ratio) == ((0.15, 0.2), (0.85, 1.0), (0.75, 1.5))
    assert (m.num_targets, m.min_keep, m.truncate) == (4, 10, True)
    assert images.data.crop_scale == clips.data.crop_scale == (0.3, 1.0)
    assert (images.data.horizontal_flip, clips.data.horizontal_flip) == (False, True)
    m = clips.mask
    assert (m.short_num_blocks, m.short_spatial_scale) == (8, (0.15, 0.15))
    assert (m.long_num_blocks, m.long_spatial_scale, m.aspect_ratio) == (2, (0.7, 0.7), (0.75, 1.5))
    assert (clips.data.fps, clips.data.crop_ratio) == (4, (0.75, 1.35))
    views = configs.read("lejepa_vits8_imagenette")
    assert (views.model.weight, views.model.slices, views.model.knots) == (0.02, 256, 17)
    assert (views.data.global_views, views.data.local_views, views.data.batch_size) == (4, 0, 256)
    d = views.data
    assert (d.region_scale, d.global_scale, d.crop_ratio) == ((1.0, 1.0), (0.08, 1.0), (0.75, 1.3333))
    assert (d.jitter, d.hue, d.grey, d.blur, d.solarize) == (0.8, 0.2, 0.2, 0.5, 0.2 * 0.5)
    world = configs.read("lewm_pusht")
    assert (world.model.sigreg_weight, world.model.history, world.model.dropout) == (0.09, 3, 0.1)
    assert (world.optimization.lr, world.optimization.weight_decay, world.data.batch_size) == (5e-5, 1e-3, 128)
    answers = configs.read("vl_jepa_llama1b").model
    assert (answers.embed_dim, answers.depth, answers.num_heads, answers.num_kv_heads) == (2048, 8, 32, 8)
    assert (answers.hidden, answers.out_dim, answers.text_scale) == (8192, 1536, 0.05)


@pytest.mark.parametrize("name", configs.published())
def test_checkpoints_and_seeds_are_those_of_the_public_code(name):
    config, epoch = configs.read(name), {"ijepa": 1_281_167 // 2048, "vjepa2": 300}
    epoch["ijepa"] = 14_197_122 // 2048 if "in22k" in name else epoch["ijepa"]
    steps = config.logging.checkpoint_every
    assert steps == epoch.get(config.architecture, steps) and "logging" in tree(name)
    assert config.optimization.steps % steps == 0
    assert config.seed == {"vjepa2": 239, "lewm": 3072}.get(config.architecture, 0)


WSD = dict(start=1.0, peak=5.0, final=1.0, warmup=4, anneal=4, total=12)


@pytest.mark.parametrize(
    "step, value", [(0, 2.0), (2, 4.0), (3, 5.0), (7, 5.0), (8, 4.0), (10, 2.0), (11, 1.0), (20, 1.0)]
)
def test_a_rate_that_rises_is_held_and_falls(step, value):
    assert schedules.warmup_stable_decay(step, **WSD) == pytest.approx(value)


def test_a_rate_without_an_end_is_held_past_the_last_step():
    assert schedules.warmup_stable_decay(20, **{**WSD, "anneal": 0}) == 5.0


def test_a_cooldown_is_linear_and_its_own_length_longer_than_the_run():
    cooldown = dict(start=0.0, peak=5.25e-4, final=1e-6, warmup=0, anneal=15_000, total=15_000)
    assert schedules.warmup_stable_decay(0, **cooldown) == pytest.approx(5.25e-4 - 5.24e-4 / 15_000)
    assert schedules.warmup_stable_decay(11_999, **cooldown) == pytest.approx(5.25e-4 - 0.8 * 5.24e-4)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_a_run_begins_with_the_weights_of_another(path, tmp_path):
    torch.manual_seed(7)
    other = IJEPA(configs.read(str(path)).model)
    other.save(tmp_path / "other.safetensors")
    words = ["--set", f"weights={tmp_path / 'other.safetensors'}", "--set", "optimization.lr=0"]
    words += [
        "--set",
        "optimization.start_lr=0",
        "--set",
        "optimization.final_lr=0",
        "--set",
        "optimization.ema=[1, 1]",
    ]
    trained = runs.fit(path, tmp_path / "run", *words).model.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in other.state_dict().items())
    resumed = runs.fit(path, tmp_path / "halves", *words, stop=2)
    resumed = runs.fit(path, tmp_path / "halves", *words, "--resume")
    assert all(torch.equal(x, trained[name]) for name, x in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["optimization.schedule=linear"],
            "train: optimization.schedule must be one of cosine, wsd, got 'linear'; check",
        ),
        (["optimization.anneal=0.5"], "train: optimization.anneal must be 0 with a cosine schedule, got 0.5; set opt"),
        (
            ["optimization.schedule=wsd", "optimization.anneal=0.9"],
            "train: optimization.anneal must begin after the warm-up, got 0.9; lower it, or optimization.warmup",
        ),
        (["optimization.anneal=2"], "train: optimization.anneal must lie in [0, 1], got 2.0; correct the config"),
        (["weights=3"], "train: weights must be str, got 3; correct the config"),
        (
            ["weights=nowhere.safetensors"],
            "train: weights must be a file, got 'nowhere.safetensors'; pass the model.safetens",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(path, tmp_path, capsys, changes, message):
    words = [word for change in changes for word in ("--set", change)]
    assert train.main([str(path), "--out", str(tmp_path / "run"), *words]) == 2
    assert capsys.readouterr().err.startswith(message) and not (tmp_path / "run").exists()
