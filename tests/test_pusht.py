"""The simulator of PushT and its episodes: states set exactly, gym-pusht's own physics, functions of their seeds."""

import math

import numpy as np
import pytest
import torch

from jepa_kernels import pusht
from jepa_kernels.pusht import episodes, simulator
from jepa_kernels.pusht.simulator import STATE, Simulator

pytest.importorskip("gym_pusht", reason="gym-pusht is not installed: pip install 'jepa_kernels[plan]'")

TOUCHING = np.array([173.0, 305.0, 0.0, 0.0, 256.0, 300.0, 0.0, 0.0, 0.0, 0.0])  # left of the bar's left end, 8 px off
MOVING = np.array([100.0, 120.0, 30.0, -20.0, 300.0, 250.0, 7.5, 4.0, -3.0, 0.2])
SMALL = {"steps": 6, "size": 16, "frame_skip": 2, "workers": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jepa_kernels"


@pytest.fixture(scope="module")
def sim():
    return Simulator(16)


@pytest.mark.parametrize("state", [TOUCHING, MOVING])
def test_a_state_that_was_set_is_read_exactly(sim, state):
    sim.set(state)
    np.testing.assert_array_equal(sim.state(), state)


def test_a_state_in_mid_push_goes_round_too():
    sim = Simulator(16, 1)
    sim.set(TOUCHING)
    for _ in range(2):
        sim.step(np.array([1.0, 0.0]))
    reached = sim.state()
    assert reached[6] != 0 and np.abs(reached[7:]).min() > 0, "the push turns and moves the block"
    sim.set(reached)
    np.testing.assert_array_equal(sim.state(), reached)


def test_the_centre_of_gravity_is_pymunks(sim):
    sim.set(MOVING)
    block = sim._env.block
    np.testing.assert_allclose(simulator.centre(MOVING), block.local_to_world(block.center_of_gravity), rtol=1e-12)


@pytest.mark.parametrize("frame_skip", [1, 5])
def test_a_step_is_gym_pushts_own(frame_skip):
    ours, env = Simulator(16, frame_skip), Simulator(16)
    ours.set(TOUCHING)
    env.set(TOUCHING)
    for action in np.random.default_rng(0).uniform(-0.2, 1, (4, 2)):
        target = np.clip(ours.state()[:2] + 64 * action, 20, 492)
        ours.step(action)
        for _ in range(frame_skip):
            env._env.step(target)
        np.testing.assert_array_equal(ours.state(), env.state())
    assert np.abs(ours.state() - TOUCHING)[4:7].min() > 1e-3


def test_a_rollout_is_a_function_of_state_and_actions(sim):
    actions = np.random.default_rng(1).uniform(-0.3, 1, (5, 3, 2))
    together = sim.rollout(TOUCHING, actions)
    assert together.shape == (5, 3, len(STATE))
    other = Simulator(16)
    for i in (3, 0):
        other.set(TOUCHING)
        for t, action in enumerate(actions[i]):
            other.step(action)
            np.testing.assert_array_equal(together[i, t], other.state())


def test_actions_are_cut_and_targets_stay_on_the_table(sim):
    sim.set(TOUCHING)
    x, y = TOUCHING[:2]
    assert sim.target(np.array([0.5, -0.25])) == (x + 32, y - 16)
    assert sim.target(np.array([-3.0, 9.0])) == (x - 64, y + 64)
    sim.set(np.array([480.0, 30.0, *TOUCHING[2:]]))
    assert sim.target(np.array([1.0, -1.0])) == (492, 20)


def test_frames_show_agent_and_block_where_they_are():
    sim = Simulator(64)
    sim.set(MOVING)
    frame = sim.frame()
    assert frame.shape == (3, 64, 64) and frame.dtype == np.uint8
    red, green, blue = frame[:, 120 // 8, 100 // 8].astype(int)
    assert blue > green > red and blue - red > 100, "the agent is blue, x across"
    x, y = simulator.centre(MOVING) / 8
    red, green, blue = frame[:, int(y), int(x)].astype(int)
    assert 100 < red < green < blue < 200, "the block is of a bluish grey"
    assert frame[:, 50, 10].tolist() == [255, 255, 255]
    assert (frame[1] <= frame[2]).all(), "nothing is green: gym-pusht's own goal is left out"
    ghost = sim.frame(ghost=np.array([0, 0, 0, 0, 100.0, 350.0, 0, 0, 0, 0]))
    assert ghost[:, 365 // 8, 100 // 8].tolist() == [144, 238, 144] and (ghost != frame).any(0).sum() > 80


def test_frames_are_functions_of_the_state():
    """Also in mid-push, where gym-pusht's own pictures mark the contacts."""
    pushing, put = Simulator(64, 1), Simulator(64, 1)
    pushing.set(TOUCHING)
    for _ in range(3):
        pushing.step(np.array([1.0, 0.0]))
    put.set(pushing.state())
    assert np.abs(pushing.state()[7:]).min() > 0
    np.testing.assert_array_equal(pushing.frame(), put.frame())


@pytest.mark.parametrize("state", [TOUCHING[:5], np.full(10, math.nan)])
def test_a_state_that_is_none_is_refused(sim, state):
    with pytest.raises(ValueError, match=r"Simulator: state must hold 10 finite numbers, got \(\d+,\); pass agent_x"):
        sim.set(state)


def test_episodes_are_functions_of_seed_part_and_number():
    first, again = (pusht.load(count=2, seed=3, **SMALL) for _ in range(2))
    for name in ("frames", "actions", "states"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    alone = episodes.collect("train", 1, steps=6, size=16, frame_skip=2, seed=3)
    np.testing.assert_array_equal(first.frames[1], alone.frames)
    np.testing.assert_array_equal(first.states[1], alone.states)
    for other in (pusht.load(count=2, seed=4, **SMALL), pusht.load("held_out", 2, seed=3, **SMALL)):
        assert (first.states[:, 0] != other.states[:, 0]).any(-1).all()


def test_what_is_recorded_is_what_happens():
    e = episodes.collect("train", 0, steps=6, size=16, frame_skip=2, seed=0)
    sim = Simulator(16, 2)
    sim.set(e.states[0])
    for i, action in enumerate(e.actions):
        np.testing.assert_array_equal(e.frames[i], sim.frame())
        sim.step(action)
        np.testing.assert_array_equal(e.states[i + 1], sim.state())
    assert e.actions.dtype == np.float32 and np.abs(e.actions).max() <= 1


def test_the_script_moves_the_block_often():
    states = np.stack([episodes.collect("train", i, steps=30, size=1, frame_skip=5, seed=0).states for i in range(4)])
    moved = np.linalg.norm(np.diff(simulator.centre(states), axis=1), axis=-1) > 1
    assert moved.mean() > 0.3, moved.mean(1)


def test_episodes_are_kept_and_a_torn_copy_is_collected_anew(cache):
    fresh = pusht.load(count=1, **SMALL)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="collects anew"):
        again = pusht.load(count=1, **SMALL)
    np.testing.assert_array_equal(fresh.frames, again.frames)
    assert file.stat().st_size > 100


def test_a_cache_that_cannot_be_written_is_a_warning(cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="keeps no copy"):
        assert len(pusht.load(count=1, **SMALL).frames) == 1


def test_windows_are_consecutive_frames_and_functions_of_seed_and_index():
    windows = pusht.Windows(3, episodes=2, length=50, seed=1, **SMALL)
    frames, actions = windows[57]
    assert frames.shape == (3, 3, 16, 16) and frames.dtype == torch.uint8
    assert actions.shape == (2, 2) and actions.dtype == torch.float32
    again = pusht.Windows(3, episodes=2, length=50, seed=1, **SMALL)
    assert torch.equal(frames, again[57][0]) and torch.equal(actions, again[57][1])
    episode, first = windows.place(57)
    np.testing.assert_array_equal(frames, windows.episodes.frames[episode, first : first + 3])
    np.testing.assert_array_equal(actions, windows.episodes.actions[episode, first : first + 2])
    assert episode == 7 % 2 and {windows.place(i)[1] for i in range(50)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pusht.load("test", 1), "pusht.load: part must be one of train, held_out, got 'test'"),
        (lambda: pusht.load(count=0), "pusht.load: count and steps must be at least 1"),
        (lambda: pusht.Windows(8, **SMALL), "Windows: num_frames must lie in 1..7, the frames of an episode, got 8"),
        (lambda: pusht.Windows(3, length=0, **SMALL), "Windows: length must be at least 1"),
        (lambda: Simulator(0), "Simulator: size and frame_skip must be at least 1"),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()


def test_without_gym_pusht_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gym_pusht", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"plan: gym_pusht must be installed.*pip install 'jepa_kernels\[plan\]'"
    ):
        Simulator()
