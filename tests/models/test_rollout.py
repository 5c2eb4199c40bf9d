"""Frames imagined with kept keys and values: equal to computing every prefix anew, whatever the lengths."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels as jk
from benchmarks.memory import peak_bytes
from jepa_kernels.models.vjepa2_ac import WorldModel, WorldModelConfig
from jepa_kernels.models.world import Context
from jepa_kernels.nn import compile_blocks
from jepa_kernels.nn.kv_cache import KVCache
from jepa_kernels.testing import hold
from tests.models import world_equations
from tests.models.test_vjepa2_ac import SMALL, given, world

LENGTHS = [("tokens", 1), ("tokens", 2), ("tokens", 3), ("no_state", 2), ("adaln", 1), ("adaln", 3)]


def seen(model, frames):
    """A context, with numbers that do not turn poses near a pole."""
    latents, actions, states, _ = given(model, batch=1, frames=frames)
    return Context(latents[0], actions[0, : frames - 1] if frames > 1 else None, None if states is None else states[0])


def chosen(model, samples=3, horizon=4):
    return torch.randn(samples, horizon, model.config.action_dim) * 0.3


def wide(context):
    tensors = (context.latents, context.actions, context.states)
    return Context(*(None if x is None else x.double() for x in tensors))


def by_the_equations(model, context, actions):
    """In float64, a sample at a time."""
    p = {name: x.double() for name, x in model.predictor.named_parameters()}
    c, past = wide(context), context.actions
    past = actions.new_zeros(0, actions.shape[-1]).double() if past is None else past.double()
    one = [world_equations.imagine(c.latents, past, c.states, a.double(), p, model.config) for a in actions]
    return torch.stack(one)


def imagined(model, context, actions, samples=None, horizon=None):
    with torch.no_grad():
        return model.imagine(context, samples or len(actions), horizon or actions.shape[1])(actions)


@pytest.mark.parametrize("kind, frames", LENGTHS)
def test_imagined_frames_are_those_of_whole_prefixes(kind, frames):
    """Against the equations, within 1e-5; and as exact as `forward` of each prefix on the same machine."""
    model = world(kind)
    context, actions = seen(model, frames), chosen(model, samples=2)
    exact, found = by_the_equations(model, context, actions), imagined(model, context, actions)
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    with jk.use_backend("reference"):
        double, eager = copy.deepcopy(model).double(), imagined(model, context, actions)
        reference = imagined(double, wide(context), actions.double())
    parity = hold("latents", found, reference, eager)
    assert parity.ok, parity
    for steps in (1, 2, 3):  # of another plan, and of the same
        assert torch.equal(imagined(model, context, actions[:, :steps]), found[:, :steps])
        assert torch.equal(imagined(model, context, actions[:, :steps], horizon=4), found[:, :steps])


def test_long_rollouts_are_exact_too():
    """Eight frames seen, sixteen imagined."""
    model = world(num_frames=48)
    context, actions = seen(model, 8), chosen(model, samples=1, horizon=16)
    exact = by_the_equations(model, context, actions)
    assert (imagined(model, context, actions) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("frames", [1, 2])
def test_one_camera_serves_all_imagined_frames(frames):
    model, actions = world("camera"), chosen(world("camera"))
    latents, past, states, extrinsics = given(model, batch=1, frames=frames)
    extrinsics = extrinsics[:, :1].expand(-1, frames, -1)
    context = Context(latents[0], past[0, :-1], states[0], extrinsics[0])
    found = imagined(model, context, actions)
    seen, past, states = (x.expand(3, -1, *x.shape[2:]) for x in (latents, past[:, :-1], states))
    for n in range(actions.shape[1]):
        past = torch.cat([past, actions[:, n, None]], 1)
        with torch.no_grad():
            new = model(seen, past, states, extrinsics[:, :1].expand(3, frames + n, -1))[:, -1:]
        torch.testing.assert_close(found[:, n, None], new, rtol=1e-4, atol=2e-5)
        seen = torch.cat([seen, new], 1)
        moved = [
            world_equations.moved(s.double(), a.double()) for s, a in zip(states[:, -1], actions[:, n], strict=True)
        ]
        states = torch.cat([states, torch.stack(moved).float()[:, None]], 1)


@pytest.mark.parametrize("kind, frames", [("tokens", 1), ("tokens", 3), ("adaln", 2)])
def test_unrolled_frames_are_the_same_and_have_the_gradient_of_the_equations(kind, frames):
    """next_state of the equations is SciPy's, which has no gradient: states stay here, by a function given."""
    model = world(kind)
    model.next_state = stays
    context, actions = seen(model, frames), chosen(model, samples=2, horizon=3).requires_grad_()
    found, weights = model.unroll(context, actions), torch.randn(2, 3, 6, 24)
    torch.testing.assert_close(found, imagined(model, context, actions.detach()), rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad((found * weights).sum(), actions)
    p = {name: x.double() for name, x in model.predictor.named_parameters()}
    c = wide(context)
    past = torch.zeros(0, actions.shape[-1]).double() if c.actions is None else c.actions
    double = actions.detach().double().requires_grad_()
    stated = torch.stack(
        [world_equations.imagine(c.latents, past, c.states, a, p, model.config, stays) for a in double]
    )
    assert (found - stated).norm() <= 1e-5 * stated.norm()
    (exact,) = torch.autograd.grad((stated * weights).sum(), double)
    assert (grad - exact).norm() <= 1e-5 * exact.norm()


def stays(state, action):
    return state


def test_poses_have_a_gradient_too():
    model = world()
    context, actions = seen(model, 2), chosen(model).requires_grad_()
    (grad,) = torch.autograd.grad(model.unroll(context, actions).square().sum(), actions)
    moved = actions.detach().clone()
    moved[1, 0] += 1.0
    before, after = (imagined(model, context, a) for a in (actions.detach(), moved))
    assert grad.isfinite().all() and (grad != 0).all()
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])  # samples stay apart


def test_a_plan_gives_the_same_bits_at_every_call_and_takes_fewer_samples():
    model = world()
    context, actions, others = seen(model, 2), chosen(model, samples=5), chosen(model, samples=5)
    with torch.no_grad():
        plan = model.imagine(context, 5, 4)
        first = plan(actions)
        kept = first.clone()
        plan(others)
        assert torch.equal(plan(actions), kept) and torch.equal(first, kept)
        assert (plan(actions[:2]) - kept[:2]).norm() <= 1e-5 * kept[:2].norm()


def test_on_a_cpu_samples_take_turns(monkeypatch):
    model = world()
    context, actions = seen(model, 2), chosen(model, samples=5)
    whole = imagined(model, context, actions)
    monkeypatch.setattr("jepa_kernels.models.vjepa2_ac.CPU_TOKENS", 2 * model.predictor.frame_tokens)
    turns, futures = [], model._futures
    monkeypatch.setattr(model, "_futures", lambda *args: turns.append(len(args[-1])) or futures(*args))
    assert (imagined(model, context, actions) - whole).norm() <= 1e-5 * whole.norm()
    assert turns == [3, 2]


def test_the_cache_is_allocated_once_and_as_large_as_said(monkeypatch):
    made = []
    monkeypatch.setattr("jepa_kernels.nn.rollout.KVCache", lambda *args: made.append(KVCache(*args)) or made[-1])
    model = world()
    context, actions = seen(model, 2), chosen(model)
    with torch.no_grad():
        plan = model.imagine(context, 3, 4)
        (cache,) = made
        numbers = 2 * 2 * 48 * (2 - 1 + 4) * 8 * 3  # 2 L D, tokens of T - 1 + horizon frames, samples
        place = cache._kept.data_ptr()
        plan(actions)
    assert cache._kept.numel() == numbers and cache._kept.data_ptr() == place and len(made) == 1


@torch.no_grad()
def test_a_plans_memory_grows_by_the_same_with_every_frame():
    """Of 8, 16, 24 imagined frames: nothing is as large as all frames' pairs."""
    model = world(num_frames=64)
    context = seen(model, 2)
    calls = [(n, chosen(model, samples=4, horizon=n)) for n in (8, 16, 24)]
    for _ in range(2):  # the first calls build what later ones find
        eight, sixteen, more = (peak_bytes(lambda n=n, a=a: model.imagine(context, 4, n)(a)) for n, a in calls)
    assert abs((more - sixteen) - (sixteen - eight)) <= 0.02 * (sixteen - eight)


@pytest.mark.parametrize("function", ["imagine", "unroll"])
def test_a_step_costs_one_frame_and_its_attention_to_those_before(function):
    """Counted operations of 1..4 steps: their differences grow by the scores and sums of one more frame alone."""
    model, counts = world(), []
    context, actions = seen(model, 2), chosen(model)
    for steps in (1, 2, 3, 4):
        with torch.no_grad():
            plan = partial(model.unroll, context) if function == "unroll" else model.imagine(context, 3, 4)
            with FlopCounterMode(display=False) as counter:
                plan(actions[:, :steps])
        counts.append(counter.get_total_flops())
    steps = [b - a for a, b in itertools.pairwise(counts)]
    samples, tokens, width, depth = 3, 8, 48, 2
    growth = samples * depth * 4 * tokens * tokens * width
    assert [b - a for a, b in itertools.pairwise(steps)] == [growth] * 2


@pytest.mark.parametrize("kind, tokens", [("tokens", 8), ("adaln", 6)])
def test_what_all_samples_share_is_computed_once(kind, tokens):
    """Counted operations of a first step: a sample more embeds no patch and no state of the frame seen. With tokens for
    action and state, all of them but the action's share the first block's product of queries, keys and values too;
    with AdaLN the action changes them."""
    model, counts = world(kind), []
    context, width, depth = seen(model, 2), 48, 2
    for samples in (2, 3):
        with torch.no_grad():
            plan = model.imagine(context, samples, 1)
            with FlopCounterMode(display=False) as counter:
                plan(chosen(model, samples, 1))
        counts.append(counter.get_total_flops())
    products = 2 * tokens * width * width * depth * (3 + 1 + 8)  # qkv, projection, mlp of four times the width
    attention = depth * 4 * tokens * 2 * tokens * width  # of one frame's queries to two frames' keys
    ends = 2 * 6 * width * 24 + 2 * model.config.action_dim * width  # projections of the patches out, of the action in
    shared = 2 * (tokens - 1) * width * 3 * width if kind == "tokens" else 0
    modulation = 0 if kind == "tokens" else 2 * width * 6 * width * depth
    assert counts[1] - counts[0] == products - shared + attention + modulation + ends


@pytest.mark.parametrize("kind", ["tokens", "adaln"])
def test_under_autocast_it_is_as_exact_as_forward(kind):
    """bf16 products: the error of a rollout against float64 is at most a little more than that of plain prefixes."""
    model = world(kind)
    context, actions = seen(model, 2), chosen(model, horizon=2)
    exact = by_the_equations(model, context, actions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = imagined(model, context, actions)
        with jk.use_backend("reference"):
            eager = prefixes(model, context, actions)
    parity = hold("latents", found.float(), exact, eager.float())
    assert parity.relative <= 2e-2 and parity.rms_err <= 1.25 * (eager - exact).square().mean().sqrt(), parity


@torch.no_grad()
def test_a_model_of_low_precision_keeps_poses_in_full():
    """By 0.001 at a time, which bf16 would lose beside 1."""
    model, low = world(), world().bfloat16()
    low.load_state_dict(model.state_dict())
    states, kept = torch.ones(1, 7), []
    low.next_state = lambda state, action: kept.append(state + 1e-3) or kept[-1]
    context, actions = Context(torch.randn(1, 6, 24).bfloat16(), None, states), chosen(model).bfloat16()
    found = low.imagine(context, 3, 4)(actions)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    torch.testing.assert_close(kept[-1], states.expand(3, 7) + 3e-3)


@torch.no_grad()
def prefixes(model, context, actions):
    latents = context.latents.expand(len(actions), *context.latents.shape)
    past = context.actions.expand(len(actions), *context.actions.shape)
    states = None if context.states is None else context.states.expand(len(actions), *context.states.shape)
    begin = latents.shape[1]
    for n in range(actions.shape[1]):
        past = torch.cat([past, actions[:, n, None]], 1)
        latents = torch.cat([latents, model(latents, past, states)[:, -1:]], 1)
        if states is not None:
            states = torch.cat([states, model.next_state(states[:, -1], actions[:, n])[:, None]], 1)
    return latents[:, begin:]


def test_states_of_other_worlds_move_by_the_function_given():
    model = WorldModel(WorldModelConfig(**SMALL, action_dim=2, state_dim=2), next_state=torch.add)
    context, actions = seen(model, 1), chosen(model)
    first = imagined(model, context, actions)
    model.next_state = lambda state, action: state
    assert torch.equal(first[:, 0], imagined(model, context, actions)[:, 0])
    assert not torch.isclose(first[:, 1:], imagined(model, context, actions)[:, 1:]).all()
    model.next_state = None
    with pytest.raises(ValueError, match="next_state must be given for states of 2 and actions of 2 numbers, got None"):
        imagined(model, context, actions)
    imagined(model, context, actions[:, :1])  # the state after it is not asked for


@torch.no_grad()
def test_what_does_not_fit_the_model_is_refused():
    model = world()
    context, actions = seen(model, 2), chosen(model)
    c = context
    plan = model.imagine(context, 3, 4)
    for call, message in (
        (lambda: plan(torch.zeros(3, 4, 4)), r"actions must be \[S, horizon, 7\], of one or more, got \(3, 4, 4\)"),
        (lambda: plan(torch.zeros(3, 5, 7)), r"actions must be \[3, 4, 7\] at most, got \(3, 5, 7\)"),
        (lambda: plan(torch.zeros(4, 4, 7)), r"got \(4, 4, 7\); prepare the plan for as many"),
        (lambda: model.imagine(context, 3, 6), "horizon must lie in 1..5: the model takes 6 frames, of which 2 are"),
        (lambda: model.imagine(context, 3, 0), "horizon must lie in 1..5"),
        (lambda: model.unroll(context, torch.zeros(3, 6, 7)), "horizon must lie in 1..5"),
        (lambda: model.imagine(Context(c.latents, None, c.states), 3, 4), r"actions must be \(1, 7\), got None"),
        (lambda: model.imagine(Context(c.latents, c.actions), 3, 4), r"states must be \(2, 7\), got None"),
        (
            lambda: model.imagine(Context(c.latents[:, :5], c.actions, c.states), 3, 4),
            r"latents must be \[T, 6, 24\], .* got \(2, 5, 24\)",
        ),
        (lambda: model.imagine(Context(c.latents[:0]), 3, 4), r"latents must be \[T, 6, 24\], of a frame or more"),
        (lambda: model.unroll(context, torch.zeros(3, 7)), r"actions must have shape \[S, horizon, A\]"),
        (lambda: model.unroll(context, torch.zeros(3, 0, 7)), r"actions must be \[S, horizon, 7\], of one or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(
        TypeError, match=r"context must be a Context, got Tensor; pass Context\(world.encode\(frames\)\)"
    ):
        model.imagine(context.latents, 3, 4)
    with torch.enable_grad():
        for call in (lambda: plan(actions), lambda: model.imagine(context, 3, 4)):
            with pytest.raises(RuntimeError, match="imagine must run where no gradients are recorded, got grad mode"):
                call()


@pytest.mark.parametrize("kind", ["tokens", "adaln"])
def test_what_unroll_keeps_for_backward_is_linear_in_the_frames(kind):
    model = world(kind, num_frames=128)
    context, kept = seen(model, 2), {}
    model.requires_grad_(False)

    def keep(x):
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    for horizon in (8, 32):
        sizes, actions = {}, chosen(model, samples=2, horizon=horizon).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.unroll(context, actions)
        kept[horizon] = sum(sizes.values()) / horizon
    assert kept[32] <= 1.02 * kept[8], kept


def test_unrolled_frames_have_their_gradient_under_autocast_too():
    """Against that of float64, as exact as that of plain prefixes in the same low precision."""
    model = world("adaln").requires_grad_(False)
    context, actions = seen(model, 2), chosen(model, samples=2, horizon=3).requires_grad_()

    def slope(function, *given, low=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            out = function(*given)
        return torch.autograd.grad(out.square().sum(), given[-1])[0].double()

    found, eager = slope(model.unroll, context, actions), slope(partial(prefixes.__wrapped__, model), context, actions)
    double = actions.detach().double().requires_grad_()
    exact = slope(partial(by_the_equations, model), context, double, low=False)
    assert (found - exact).norm() <= 1.25 * (eager - exact).norm() and (found - exact).norm() <= 5e-2 * exact.norm()


@pytest.mark.parametrize(
    "kind, frames, window", [("adaln", 1, 2), ("adaln", 4, 3), ("tokens", 3, 2), ("no_state", 2, 1)]
)
def test_with_a_window_only_the_last_frames_are_seen_numbered_anew(kind, frames, window):
    """Longer than the model's num_frames, which the window alone is bound by."""
    model = world(kind, window=window)
    context, actions = seen(model, frames), chosen(model, samples=2, horizon=12)
    p, c = {name: x.double() for name, x in model.predictor.named_parameters()}, wide(context)
    stated = []
    for future in actions.double():
        latents, states = list(c.latents), None if c.states is None else list(c.states)
        taken = [] if c.actions is None else list(c.actions)
        for action in future:
            taken.append(action)
            given = [None if x is None else torch.stack(x[-window:]) for x in (latents, taken, states)]
            latents.append(world_equations.predict(*given, None, p, model.config)[-1])
            if states is not None:
                states.append(world_equations.moved(states[-1], action))
        stated.append(torch.stack(latents[frames:]))
    stated = torch.stack(stated)
    with torch.no_grad():
        plan = model.imagine(context, 2, 12)
        found = plan(actions)
        assert torch.equal(plan(actions), found)
    assert (found - stated).norm() <= 2e-5 * stated.norm()
    leaf = actions.clone().requires_grad_()
    unrolled = model.unroll(context, leaf)
    torch.testing.assert_close(unrolled.detach(), found, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(unrolled.sum(), leaf)[0].isfinite().all()


@torch.no_grad()
def test_a_window_that_no_frame_leaves_changes_no_bit():
    whole, model = world("adaln"), world("adaln", window=4)
    model.load_state_dict(whole.state_dict())
    context, actions = seen(model, 2), chosen(model, horizon=3)
    assert torch.equal(imagined(model, context, actions), imagined(whole, context, actions))


@torch.no_grad()
def test_latents_are_cast_to_the_weights_dtype():
    model = world("adaln").bfloat16()
    context, actions = seen(model, 2), chosen(model)
    found = imagined(model, context, actions)
    low = Context(context.latents.bfloat16(), context.actions)
    assert found.dtype == torch.bfloat16 and torch.equal(found, imagined(model, low, actions))
    assert torch.equal(model.unroll(context, actions), model.unroll(low, actions))


@pytest.mark.parametrize("kind", ["tokens", "adaln"])
def test_blocks_of_a_rollout_compile_once_for_all_layers_and_lengths(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = world(kind, predictor_depth=3)
    plain = copy.deepcopy(model)
    compile_blocks(model, fullgraph=True, backend="aot_eager")
    for frames, horizon in ((2, 3), (3, 3)):
        context, actions = seen(model, frames), chosen(model, horizon=horizon)
        assert torch.equal(imagined(model, context, actions), imagined(plain, context, actions))
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    imagined(copy.deepcopy(model), context, chosen(model, samples=4, horizon=2))
    imagined(model, context, chosen(model, samples=7, horizon=2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert model.state_dict().keys() == plain.state_dict().keys()
