"""The closed loop on PushT: distances, tasks, the ceiling, what all comes to, and the verb `plan`."""

import json
import math
import signal

import numpy as np
import pytest
import torch

from jepa_kernels import __main__ as command
from jepa_kernels import plan
from jepa_kernels.models.lewm import LeWMConfig, LeWorldModel
from jepa_kernels.models.world import Context
from jepa_kernels.pusht import goals, loop, policies, simulator
from jepa_kernels.pusht.simulator import Simulator

pytest.importorskip("gym_pusht", reason="gym-pusht is not installed: pip install 'jepa_kernels[plan]'")

GOAL = np.array([100.0, 200.0, 0, 0, 256.0, 300.0, 0.0, 0, 0, 0])
policies_cem = policies.cem
QUICK = ["--episodes", "2", "--actions", "2", "--samples", "8", "--elites", "3", "--iterations", "1"]


def moved(**changes: float) -> np.ndarray:
    state = GOAL.copy()
    for name, value in changes.items():
        state[simulator.STATE.index(name)] += value
    return state


def test_distance_has_three_parts():
    d = goals.distance(moved(agent_x=30, agent_y=-40), GOAL)
    assert (d.block, d.turn, d.agent, d.total) == (0, 0, 50, 5)
    d = goals.distance(moved(block_x=-6, block_y=8), GOAL)
    assert d.turn == d.agent == 0 and d.total == d.block == pytest.approx(10)
    d = goals.distance(moved(agent_vx=9, block_vy=3, block_spin=2), GOAL)
    assert d.total == 0


@pytest.mark.parametrize(
    "turn, arc", [(0.2, 9.0), (-0.2, 9.0), (math.tau - 0.2, 9.0), (4 * math.pi, 0.0), (math.pi, 141.372)]
)
def test_a_turn_about_the_centre_is_an_arc_the_shorter_way_round(turn, arc):
    sim = Simulator(1)
    sim.set(GOAL)
    sim._env.block.angle = turn  # pymunk turns bodies about their centre of gravity
    d = goals.distance(sim.state(), GOAL)
    assert d.block == pytest.approx(0, abs=1e-9) and d.turn == pytest.approx(arc, abs=1e-3)
    assert d.total == pytest.approx(arc, abs=1e-3)


def test_tasks_are_the_same_for_every_count_and_reached_by_the_script():
    two, three = goals.tasks(2, seed=1), goals.tasks(3, seed=1)
    for a, b in zip(two, three, strict=False):
        np.testing.assert_array_equal(a.start, b.start)
        np.testing.assert_array_equal(a.goal, b.goal)
    for task in three:
        assert goals.distance(task.start, task.goal).block >= 40 and 5 <= task.actions <= 10
        from_script = goals.collect("held_out", task.episode, steps=40, size=1, frame_skip=5, seed=1).states
        at = np.flatnonzero((from_script == task.start).all(1))
        np.testing.assert_array_equal(from_script[at[0] + task.actions], task.goal)
    assert (goals.tasks(1, seed=2)[0].start != two[0].start).any()


def test_the_true_world_imagines_what_happens():
    task = goals.tasks(1)[0]
    world, sim = policies.TrueWorld(5), Simulator(1)
    actions = torch.rand(3, 4, 2, dtype=torch.float64) * 2 - 1
    imagined = world.imagine(Context(torch.from_numpy(task.start)[None, None]), 3, 4)(actions)
    assert imagined.shape == (3, 4, 1, 10)
    sim.set(task.start)
    for action, state in zip(actions[2], imagined[2, :, 0], strict=True):
        sim.step(action.numpy())
        np.testing.assert_array_equal(sim.state(), state.numpy())


def test_the_ceiling_comes_close_and_an_episode_repeats(world):
    task = goals.tasks(1)[0]
    search = policies.Search(horizon=4, samples=16, iterations=2, elites=4)
    first, again = (
        loop.run(task, policies.ceiling(5, search), world, Simulator(16), actions=8, seed=3) for _ in range(2)
    )
    np.testing.assert_array_equal(first.states, again.states)
    far, near = (goals.distance(first.states[i], task.goal).total for i in (0, -1))
    assert near < far / 2, (far, near)


def test_energies_are_of_what_was_seen():
    class Colours:
        def encode(self, frames):
            return frames.double().mean((2, 3))[:, None]

    task = goals.tasks(1)[0]
    trace = loop.run(task, policies.Random(), Colours(), Simulator(16), actions=2, seed=0)
    sim, colours = Simulator(16), []
    for state in (task.goal, *trace.states):
        sim.set(state)
        colours.append(sim.frame().mean((1, 2)))
    np.testing.assert_allclose(trace.energies, np.square(np.array(colours[1:]) - colours[0]).mean(1), rtol=1e-12)
    assert trace.actions.shape == (2, 2) and trace.invalid == 0


class Agents:
    """A world whose latents are where the agent is, in pixels."""

    action_dim = 2

    def encode(self, frames):
        blue = (frames[:, 2].float() - frames[:, 0].float()).clamp(min=0)
        blue = torch.where(blue > 60, blue, 0)
        x = torch.arange(64.0)
        place = torch.stack([(blue.sum(1) * x).sum(1), (blue.sum(2) * x).sum(1)], -1) / blue.sum((1, 2))[:, None]
        return 8 * (place + 0.5)[:, None]

    def imagine(self, context, samples, horizon):
        return lambda actions: (context.latents[-1] + 64 * actions.cumsum(1))[:, :, None]


def test_a_planner_moves_to_what_its_world_says():
    task = goals.Task(0, moved(agent_x=180, agent_y=-100), GOAL, 0)
    search = policies.Search(horizon=3, samples=64, iterations=3, elites=6, frames="all")
    policy = policies.planned(Agents(), 64, 5, search)
    trace, again = (loop.run(task, policy, Agents(), Simulator(64), actions=5, seed=0) for _ in range(2))
    np.testing.assert_array_equal(trace.states, again.states)
    away = goals.distance(trace.states, task.goal).agent
    assert away[0] > 200 and away[-1] < 15, away
    assert trace.energies[-1] < 0.02 * trace.energies[0] and trace.invalid == 0


def test_a_plan_is_followed_as_far_as_asked(monkeypatch):
    plans, seeds = [], []

    def plan(*given, seed, **options):
        seeds.append(seed)
        plans.append(policies_cem(*given, seed=seed, **options))
        return plans[-1]

    monkeypatch.setattr(policies, "cem", plan)
    policy = policies.planned(Agents(), 64, 5, policies.Search(horizon=3, samples=8, iterations=1, elites=3, take=2))
    task = goals.Task(0, moved(agent_x=180), GOAL, 0)
    trace = loop.run(task, policy, Agents(), Simulator(64), actions=5, seed=7)
    assert len(plans) == 3 and seeds == [7, 9, 11], "of the actions taken: each plan has noise of its own"
    followed = torch.cat([plan.actions[:2] for plan in plans])[:5]
    np.testing.assert_array_equal(trace.actions, followed.double().numpy())


def test_samples_that_a_world_gives_nan_for_lose_and_are_counted():
    class Torn(Agents):
        def imagine(self, context, samples, horizon):
            imagined = super().imagine(context, samples, horizon)
            return lambda actions: torch.where(actions[:, :1, None, :1] > 0.2, torch.nan, imagined(actions))

    task = goals.Task(0, moved(agent_x=180), GOAL, 0)
    policy = policies.planned(Torn(), 64, 5, policies.Search(2, samples=32, iterations=2, elites=4, frames="all"))
    trace = loop.run(task, policy, Torn(), Simulator(64), actions=3, seed=0)
    assert 0 < trace.invalid < 3 * 2 * 32 and trace.actions[:, 0].max() <= 0.2
    assert goals.distance(trace.states[-1], task.goal).agent < 40


def test_summary_is_median_and_ratio():
    ends = {"random": [100.0, 200.0, 150.0, 120.0], "cem": [50.0, 100.0, 75.0, 60.0]}
    episodes = [
        {"policies": {name: {"total": [999.0, v[i]], "invalid_samples": i} for name, v in ends.items()}}
        for i in range(4)
    ]
    found = loop.summary(episodes)
    assert found["random"]["median_distance"] == 135 and found["cem"]["median_distance"] == 67.5
    assert found["cem"]["ratio_to_random"] == 0.5
    np.testing.assert_allclose(found["cem"]["ratio_ci95"], 0.5, err_msg="paired: every draw gives a half")
    low, high = found["random"]["ci95"]
    assert 100 <= low < 135 < high <= 200
    assert found["cem"]["invalid_samples"] == 0 + 1 + 2 + 3
    alone = loop.summary([{"policies": {"cem": e["policies"]["cem"]}} for e in episodes])
    assert alone["cem"]["ratio_to_random"] is None


def test_intervals_of_medians_hold_95_percent():
    ends = np.linspace(0, 1, 100)  # the median of n such numbers has a deviation of 1 / (2 sqrt n)
    found = loop.summary([{"policies": {"cem": {"total": [end], "invalid_samples": 0}}} for end in ends])
    low, high = found["cem"]["ci95"]
    assert high - low == pytest.approx(2 * 1.96 / (2 * 10), rel=0.1)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    return LeWorldModel(tiny()).eval()


def tiny(**changes):
    sizes = dict(crop_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, projector_hidden=16, action_dim=2)
    sizes |= dict(predictor_depth=1, predictor_num_heads=1, predictor_head_dim=16, predictor_hidden=16)
    return LeWMConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "tiny.safetensors"
    world.save(path)
    return path


def test_plan_writes_json_video_and_curves(checkpoint, tmp_path, capsys):
    av = pytest.importorskip("av")
    arguments = ["plan", *QUICK, "--policies", "cem,random", "--checkpoint", str(checkpoint)]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "of random's" in capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["complete"] and len(found["episodes"]) == 2
    rows = found["episodes"][1]["policies"]
    assert list(rows) == ["random", "cem"] and all(len(rows["cem"][key]) == 3 for key in ("total", "turn", "energy"))
    assert rows["random"]["total"][0] == rows["cem"]["total"][0]
    ends = {name: [e["policies"][name]["total"][-1] for e in found["episodes"]] for name in rows}
    assert found["summary"]["cem"]["median_distance"] == pytest.approx(np.median(ends["cem"]))
    ratio = np.median(ends["cem"]) / np.median(ends["random"])
    assert found["summary"]["cem"]["ratio_to_random"] == pytest.approx(ratio)
    assert found["search"]["samples"] == 8 and found["machine"]["torch"] == torch.__version__
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with av.open(str(tmp_path / "plan.mp4")) as video:
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(pictures) == 2 * (3 + 6) and pictures[0].shape == (288, 720, 3)


def test_an_interrupted_plan_keeps_finished_episodes(checkpoint, tmp_path, monkeypatch, capsys):
    real, calls = plan.run, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(plan, "run", interrupted)
    arguments = [*QUICK, "--policies", "random,greedy", "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    assert plan.main(arguments) == 130
    found = json.loads((tmp_path / "plan.json").read_text())
    assert not found["complete"] and len(found["episodes"]) == 1 and (tmp_path / "plan.mp4").exists()
    printed = capsys.readouterr()
    assert "stopped after 1 of 2 episodes" in printed.err and "(interrupted)" in printed.out


def test_a_plan_interrupted_before_its_first_episode_writes_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "run", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert plan.main([*QUICK, "--checkpoint", str(checkpoint), "--out", str(tmp_path)]) == 130
    assert "stopped after 0 of 2 episodes" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_plan_interrupted_while_it_draws_tasks_ends_with_a_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan.goals, "tasks", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert plan.main([*QUICK, "--checkpoint", str(checkpoint), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped before the first of 2 episodes\n" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--policies", "cem,oracle"],
            "plan: --policies must name some of random, greedy, cem, simulator, got 'oracle'",
        ),
        (["--episodes", "0"], "plan: --episodes must be at least 1, got 0"),
        (["--actions", "-1"], "plan: --actions must be at least 1, got -1"),
        (["--horizon", "0"], "plan: --horizon must be at least 1, got 0"),
        (["--horizon", "3", "--take", "4"], "plan: --take must be at most the horizon, 3, got 4"),
        (["--seed", "-1"], "plan: --seed must be at least 0, got -1; leave it out for 0"),
        (["--elites", "9"], "plan: --elites must lie in 2..8, got 9"),
    ],
)
def test_impossible_options_are_refused(checkpoint, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert plan.main([*QUICK, "--checkpoint", str(checkpoint), "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_a_folder_that_cannot_be_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert plan.main([*QUICK, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "file")]) == 2
    assert "plan: --out must be a folder, got" in capsys.readouterr().err


def test_a_full_disk_is_an_error_and_names_the_file(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "plan.json.part").mkdir()  # nothing can be written there
    arguments = [*QUICK, "--policies", "random", "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    assert plan.main(arguments) == 1
    assert f"plan: {tmp_path / 'plan.json'} must be writable" in capsys.readouterr().err


def test_checkpoints_of_other_worlds_are_refused(tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    LeWorldModel(tiny(action_dim=7)).save(other)
    assert plan.main([*QUICK, "--checkpoint", str(other), "--out", str(tmp_path)]) == 2
    assert "plan: --checkpoint must be of a world of 2 numbers an action, got 7" in capsys.readouterr().err
    other.write_bytes(b"nothing")
    assert plan.main([*QUICK, "--checkpoint", str(other), "--out", str(tmp_path)]) == 2
    assert str(other) in capsys.readouterr().err
    assert plan.main([*QUICK, "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_without_gym_pusht_the_extra_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gym_pusht", None)
    assert plan.main([*QUICK, "--checkpoint", str(checkpoint), "--out", str(tmp_path)]) == 2
    assert "pip install 'jepa_kernels[plan]'" in capsys.readouterr().err
