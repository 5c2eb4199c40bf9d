"""Runs of several processes, and what befalls them: killed, hung, asked to end, given what they must refuse, shown what
is not finite.

JEPA_KILLS sets how often ranks are killed: 5 if unset.
"""

import contextlib
import io
import os
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

import jepa_kernels as jk
from jepa_kernels import configs, train
from jepa_kernels.nn import Block
from jepa_kernels.training import log as logs
from jepa_kernels.training import networks, saves
from jepa_kernels.training.ranks import Ranks, _slurm, first_node
from tests import runs, test_train_lejepa, test_train_pusht
from tests.processes import side_by_side
from tests.test_train import TINY, same
from tests.torchrun import Run, free_port

EVERY, KILLS = 5, int(os.environ.get("JEPA_KILLS", 5))
STEPS = 12 * max(KILLS, 5)  # two saves between two kills, and time for a signal to arrive
LOST = r"train: every rank must finish .+ in the \w+ (pass )?of step \d+ within 600 s, got no answer of rank [01] \("

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a config of two ranks, saved now and then."""
    path = tmp_path_factory.mktemp("config") / "faults.yaml"
    tree = {**TINY, "optimization": {"steps": STEPS}, "logging": {"checkpoint_every": EVERY}}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a run of two processes that nothing befell."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with Run(config, out, fork=False) as run:
        assert run.wait() == 0, run.said.read_text()
    return out


def assert_same_run(out, whole):
    """Every step once, as it was; the same weights, moments and generators at the end."""
    assert runs.rows(out, "images") == runs.rows(whole, "images")
    assert same(runs.held(runs.newest(out)), runs.held(runs.newest(whole)))


def test_killed_ranks_start_again_and_nothing_is_lost(config, whole, tmp_path):
    """At random points of the run, in steps and in saves, now one rank and now the other."""
    draw = random.Random()
    with Run(config, tmp_path / "run", restarts=KILLS) as run:
        for kill in range(KILLS):
            run.reach(1 + round(kill * (STEPS - 20) / KILLS) + draw.randrange(10), restart=kill)
            assert run.send(signal.SIGKILL, draw.randrange(2))
        assert run.wait() == 0, run.said.read_text()
    assert run.said.read_text().count("exitcode: -9") == KILLS
    assert_same_run(tmp_path / "run", whole)
    assert run.lines() and all(re.match(LOST, line) for line in run.lines()), run.lines()


def test_a_hung_rank_is_named_with_the_collective(config, whole, tmp_path):
    with Run(config, tmp_path / "run", "--timeout", "4") as run:
        run.reach(2 * EVERY + 2)  # the next save waits for the one before
        run.send(signal.SIGSTOP, 1)
        run.says("train: ")
        run.send(signal.SIGKILL, -1)
        assert run.wait() == 1
    (line,) = run.lines()
    named = (
        r"train: every rank must finish all_reduce( of gradients)? in the (log|backward pass) of step \d+ within 4 s"
    )
    assert re.match(named + r", got no answer of rank 1 \(.*[Tt]imed out", line), line
    assert line.endswith("; look at that rank's own output, or raise --timeout")
    with Run(config, tmp_path / "run", "--resume") as run:
        assert run.wait() == 0, run.said.read_text()
    assert_same_run(tmp_path / "run", whole)


def test_a_rank_that_is_asked_to_end_ends_all_after_saving(config, whole, tmp_path):
    with Run(config, tmp_path / "run") as run:
        run.reach(EVERY + 2)
        run.send(signal.SIGTERM, 1)
        assert run.wait() == 0, run.said.read_text()
    last = runs.rows(tmp_path / "run", "images")[-1]["step"]
    assert EVERY + 2 <= last < STEPS and runs.newest(tmp_path / "run").name == f"step-{last:08d}"
    assert f"stopped at step {last}; continue with the same command and --resume" in run.said.read_text()
    with Run(config, tmp_path / "run", "--resume") as run:
        assert run.wait() == 0, run.said.read_text()
    assert_same_run(tmp_path / "run", whole)


def test_a_group_of_processes_that_is_asked_to_end_saves(config, tmp_path):
    """torchrun hands SIGTERM to all processes of each rank, those that load data among them."""
    with Run(config, tmp_path / "run", "--set", "data.num_workers=2", fork=False) as run:
        run.reach(EVERY + 2)
        run.process.terminate()
        run.wait()  # torchrun's own code tells of the signal
    last = runs.rows(tmp_path / "run", "images")[-1]["step"]
    assert last < STEPS and runs.newest(tmp_path / "run").name == f"step-{last:08d}", run.said.read_text()
    assert f"stopped at step {last}; " in run.said.read_text() and "DataLoader" not in run.said.read_text()


def test_what_was_refused_is_refused_when_torchrun_starts_again(config, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    with Run(config, whole, "--steps", "80", restarts=1) as run:
        assert run.wait() == 1
    assert len(run.lines()) == 2 and all("--out must be a folder without a checkpoint" in x for x in run.lines())
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_one_process_that_is_asked_to_end_saves_and_ends_well(config, tmp_path, monkeypatch, capsys):
    runs.signal_after(monkeypatch, 3, signal.SIGTERM)
    assert train.main([str(config), "--out", str(tmp_path / "run")]) == 0
    assert "stopped at step 3; continue with the same command and --resume" in capsys.readouterr().out
    assert runs.newest(tmp_path / "run").name == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


CASES = {  # the words of both ranks, or of each; what is said
    "a misspelt key": (["--set", "optimization.step=1"], r"config must use known keys .*step'; did you mean steps\?$"),
    "a batch of 5": (
        ["--resume", "--set", "data.batch_size=5"],
        r"data.batch_size must be a multiple of 2, for 2 ranks, 1 parts each, got 5; change one of them$",
    ),
    "another config": (
        ["--resume", "--set", "seed=1"],
        r"checkpoint .+ must be of this config, got seed = 0 in the ch",
    ),
    "a run that is there": ([], r"--out must be a folder without a checkpoint, got .+; pass --resume to continue, or "),
    "a misspelt key on one": ([["--resume"], ["--resume", "--set", "sed=1"]], r"config must use .+\(rank 1\)$"),
    "another config on one": (
        [["--resume"], ["--resume", "--set", "probe.seeds=3"]],
        r"the config must be the same on all ranks, got probe.seeds = 2 on rank 0, 3 on rank 1; give all ranks the ",
    ),
    "another version on one": (
        ["--resume"],
        r"the versions must be the same on all ranks, got jepa_kernels = .+ on rank 0, 0\.0 on rank 1; inst",
    ),
}


def refuse(rank, port, config, out, folder):
    """Every case in turn, as one of two ranks: exit code and what was said."""
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    for n, (name, (words, _)) in enumerate(CASES.items()):
        os.environ["MASTER_PORT"] = str(port + n)
        saves.__version__ = "0.0" if rank == 1 and "version" in name else jk.__version__
        own = words[rank] if words and isinstance(words[0], list) else words
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = train.main([str(config), "--out", str(out), *own])
        Path(folder, f"{name}.{rank}").write_text(f"{code}\n{said.getvalue()}")


@pytest.fixture(scope="module")
def refused(config, whole, tmp_path_factory):
    """The folder in which two ranks left that: one start of processes for all cases."""
    folder = tmp_path_factory.mktemp("refused")
    side_by_side(refuse, (free_port(len(CASES)), config, whole, folder), 2)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_every_rank_refuses_and_the_first_says_why(name, refused):
    first, second = (Path(refused, f"{name}.{rank}").read_text().split("\n", 1) for rank in range(2))
    assert first[0] == second[0] == "2" and second[1] == "", (first, second)
    assert re.match(r"train: " + CASES[name][1], first[1].rstrip("\n")) and first[1].count("\n") == 1, first[1]


@pytest.mark.parametrize("name", ["loss", "gradient"])
@pytest.mark.parametrize("what", ["skip", "stop"])
def test_a_step_that_is_not_finite_leaves_all_as_it_was(config, tmp_path, monkeypatch, what, name):
    trainer = train.Trainer(configs.read(str(config), [f"optimization.nonfinite={what}"]))
    feed = iter(train.batches(trainer.config))
    trainer.advance(next(feed))
    before = {n: x.clone() for n, x in trainer.state().items()}
    with monkeypatch.context() as patched:
        if name == "loss":
            spoil = lambda predicted: (predicted * torch.inf).sum()  # noqa: E731
        else:
            spoil = lambda predicted: predicted.clamp(min=0).sqrt().sum()  # noqa: E731
            trainer.model.predictor.predictor_proj.weight.data.zero_()  # so that its gradient is infinite
            trainer.model.predictor.predictor_proj.bias.data.zero_()
            before |= {n: x.clone() for n, x in trainer.state().items()}
        targets = trainer.model.targets
        patched.setattr(trainer.model, "objective", lambda predicted, batch, _: (targets(batch), spoil(predicted))[1])
        step = trainer.advance(next(feed))
        row = step.row | step.measured()
    assert row["skipped"] == 1 and not row["grad_norm"] < torch.inf and row["step"] == 2
    assert same(trainer.state(), before)
    if what == "stop":
        with pytest.raises(ValueError, match=r"^train: the norm of gradients must be finite, got .+ at step 2 \(loss"):
            logs._check_finite(row, what)
    else:
        logs._check_finite(row, what)
    assert trainer.advance(next(feed)).measured()["skipped"] == 0 and not same(trainer.state(), before)


@pytest.mark.parametrize("tiny", [test_train_lejepa.TINY, test_train_pusht.TINY], ids=["lejepa", "lewm"])
def test_batch_norms_forget_what_is_not_finite(tmp_path, tiny):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    trainer = train.Trainer(configs.read(str(path), ["optimization.nonfinite=skip"]))
    feed = iter(train.batches(trainer.config))
    trainer.advance(next(feed))
    before = {n: x.clone() for n, x in trainer.state().items() if not n.startswith("rng")}
    assert any(n.endswith("running_var") for n in before)
    norm = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.BatchNorm1d))
    with norm.register_forward_pre_hook(lambda _, given: (given[0] * torch.nan,)):
        assert trainer.advance(next(feed)).measured()["skipped"] == 1
    assert same({n: x for n, x in trainer.state().items() if not n.startswith("rng")}, before)
    assert trainer.advance(next(feed)).measured()["skipped"] == 0


def test_gradients_are_clipped_together(config):
    """AdamW does not see the scale of a single step: what a step keeps of its gradient is the moment's."""
    norms, moments = [], []
    for most in (0.0, 0.05, 1e6):
        trainer = train.Trainer(configs.read(str(config), [f"optimization.max_grad_norm={most}"]))
        norms.append(trainer.advance(next(iter(train.batches(trainer.config)))).measured()["grad_norm"])
        first = (s["exp_avg"] for s in trainer.optimizer.state.values())
        moments.append(torch.cat([x.flatten() for x in first]).norm().item() / 0.1)
    assert norms[0] == norms[1] == norms[2] > 0.1
    assert moments == pytest.approx([norms[0], 0.05, norms[0]], rel=1e-4)


@pytest.mark.parametrize("how", ["activation_checkpointing", "compile", "activation_checkpointing compile"])
def test_what_saves_memory_or_time_changes_no_result(config, how):
    found = []
    for changes in ([], [f"parallel.{which}=true" for which in how.split()]):
        trainer = train.Trainer(configs.read(str(config), changes))
        feed = iter(train.batches(trainer.config))
        rows = [trainer.advance(next(feed)).measured() for _ in range(2)]
        found.append(([row["loss"] for row in rows], trainer.model.state_dict()))
    (losses, weights), (others, changed) = found
    if how == "activation_checkpointing":
        assert losses == others and same(dict(weights), dict(changed))
    else:
        assert others == pytest.approx(losses, rel=1e-5) and weights.keys() == changed.keys()


@pytest.mark.parametrize(
    "asked, device, compiled",
    [("null", "cuda", True), ("null", "cpu", False), ("true", "cpu", True), ("false", "cuda", False)],
)
def test_blocks_are_compiled_on_gpus_unless_the_config_says(config, asked, device, compiled):
    how = configs.read(str(config), [f"parallel.compile={asked}"]).parallel
    assert networks.compiles(how, torch.device(device)) is compiled
    model = networks.spread(train.Trainer(configs.read(str(config))).model, how, Ranks(), torch.device(device))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert blocks and all((block._compiled_call_impl is not None) is compiled for block in blocks)


def test_a_switch_is_a_bool_or_left_to_the_device(config):
    assert configs.read(str(config)).parallel.compile is None
    with pytest.raises(TypeError, match=r"parallel\.compile must be bool, got 'always'"):
        configs.read(str(config), ["parallel.compile=always"])


def saved_bytes(config, *changes):
    """What one forward pass keeps for its backward pass."""
    kept = {}
    trainer = train.Trainer(configs.read(str(config), [*changes, "model.depth=8", "data.batch_size=8"]))
    ((pixels, masks),) = next(iter(train.batches(trainer.config)))

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trainer.model.loss(trainer.recipe.prepare(pixels), masks.to("cpu"))
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    return sum(n for place, n in kept.items() if place not in weights)


def test_activation_checkpointing_keeps_a_fraction(config):
    assert saved_bytes(config, "parallel.activation_checkpointing=true") < 0.35 * saved_bytes(config)


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[03-07,12],cpu1", "gpu03"), ("node1,node2", "node1"), ("a-b[7]", "a-b7"), ("single", "single")],
)
def test_the_first_machine_of_a_slurm_job(nodes, first):
    assert first_node(nodes) == first


def test_tasks_of_srun_find_their_place(monkeypatch):
    told = {"STEP_ID": "0", "PROCID": "3", "NTASKS": "16", "LOCALID": "1", "STEP_NODELIST": "gpu[07-08]", "JOB_ID": "7"}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert _slurm() == (3, 16, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "20007")
    monkeypatch.delenv("SLURM_STEP_ID")  # the script of a batch job itself
    assert _slurm() is None
