"""AdamWEMA: torch's AdamW, clipping and scaler, then the average; and all that a torch optimizer must be able to."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels import _C
from jepa_kernels.testing import hold

MOMENTUM, LR = 0.99, 1e-2


def network(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 3)).to(dtype)


def batch(i, dtype=torch.float32):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(i)).to(dtype)


def backward(net, i, scale=1.0):
    """Gradients of a regression whose size changes from step to step."""
    x = batch(i, next(net.parameters()).dtype)
    loss = (net(x) - x[:, :3].sin() * (1 + i % 3)).square().mean()
    (loss * scale).backward()
    return loss.detach()


def groups(net):
    """Weights decay, biases and norms do not."""
    named = list(net.named_parameters())
    return [
        dict(params=[p for _, p in named if p.dim() > 1], weight_decay=0.1),
        dict(params=[p for _, p in named if p.dim() == 1], weight_decay=0.0),
    ]


def paired(net, target):
    return dict(zip(net.parameters(), target.parameters(), strict=True))


class Run:
    """Training of one network with an average: torch's optimizer and a lerp, or ours."""

    def __init__(self, kind, dtype=torch.float32, clip=None, **options):
        self.net, self.target, self.kind, self.clip = network(dtype), network(dtype), kind, clip
        if kind == "ours":
            targets = paired(self.net, self.target)
            options = dict(momentum=MOMENTUM, max_grad_norm=clip) | options
            self.optimizer = jk.AdamWEMA(groups(self.net), targets, LR, **options)
        else:
            own = {} if kind == "exact" else {kind: True}
            self.optimizer = torch.optim.AdamW(groups(self.net), LR, **own, **options)

    def step(self, i):
        self.optimizer.zero_grad()
        backward(self.net, i)
        if self.clip is not None and self.kind != "ours":
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.optimizer.step()
        self.average()

    def average(self):
        if self.kind != "ours":
            with torch.no_grad():
                torch._foreach_lerp_(list(self.target.parameters()), list(self.net.parameters()), 1 - MOMENTUM)

    def train(self, steps, first=0):
        for i in range(first, first + steps):
            self.step(i)
        return self

    def weights(self):
        return [p.detach() for p in (*self.net.parameters(), *self.target.parameters())]


def assert_as_good_as_torchs(ours, exact, rivals):
    """Held to the budget; the same-dtype reference is the worse of torch's own for each tensor."""
    for i, (a, e) in enumerate(zip(ours.weights(), exact.weights(), strict=True)):
        worst = max((r.weights()[i] for r in rivals), key=lambda r: (r.double() - e).norm())
        parity = hold(f"weights[{i}]", a, e, worst)
        assert parity.ok, parity


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_hundred_steps_are_as_near_to_fp64_as_torchs_own(clip):
    exact = Run("exact", torch.float64, clip).train(100)
    rivals = [Run(kind, clip=clip).train(100) for kind in ("fused", "foreach")]
    assert_as_good_as_torchs(Run("ours", clip=clip).train(100), exact, rivals)


def test_clipping_by_hand():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    optimizer = jk.AdamWEMA([p], max_grad_norm=1.0, betas=(0.0, 0.0), weight_decay=0.0, eps=1.0, lr=1.0)
    optimizer.step()
    assert optimizer.grad_norms["all"].item() == 5.0 and p.grad.tolist() == [3.0, 4.0]
    expected = [-g / (g + 1) for g in (0.6, 0.8)]  # m = g, v = g^2
    assert p.tolist() == pytest.approx(expected, rel=1e-6)


def test_groups_of_one_name_share_a_norm():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    for p, g in zip(params, (3.0, 4.0, 12.0, 7.0), strict=True):
        p.grad = torch.tensor([g])
    names = [dict(clip="a"), dict(clip="a"), dict(clip="b"), dict(max_grad_norm=None)]
    made = [dict(params=[p], **options) for p, options in zip(params, names, strict=True)]
    optimizer = jk.AdamWEMA(made, max_grad_norm=1.0, betas=(0.0, 0.0), weight_decay=0.0, eps=1.0, lr=1.0)
    optimizer.step()
    assert {k: v.item() for k, v in optimizer.grad_norms.items()} == {"a": 5.0, "b": 12.0}
    expected = [-g / (g + 1) for g in (0.6, 0.8, 1.0, 7.0)]
    assert [p.item() for p in params] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_spoil_what_torchs_clipping_spoils(value):
    results = []
    for clipped in (True, False):
        params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        for p in params:
            p.grad = torch.ones(3)
        params[0].grad[1] = value
        if clipped:
            jk.AdamWEMA(params, max_grad_norm=1.0).step()
        else:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            torch.optim.AdamW(params).step()
        results.append([p.detach() for p in params])
    assert torch.allclose(torch.stack(results[0]), torch.stack(results[1]), equal_nan=True, rtol=1e-6)


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("first, second", [("fused", "ours"), ("foreach", "ours"), ("ours", "fused"), ("ours", "ours")])
def test_training_continues_from_the_other_ones_state(first, second):
    begun, goes_on = Run(first).train(40), Run(second)
    goes_on.net.load_state_dict(begun.net.state_dict())
    goes_on.target.load_state_dict(begun.target.state_dict())
    goes_on.optimizer.load_state_dict(saved(begun.optimizer))
    assert [g["weight_decay"] for g in goes_on.optimizer.param_groups] == [0.1, 0.0]
    goes_on.train(60, 40)
    exact = Run("exact", torch.float64).train(100)
    assert_as_good_as_torchs(goes_on, exact, [Run(kind).train(100) for kind in ("fused", "foreach")])


def test_resuming_from_a_saved_state_changes_no_bit():
    whole, begun, resumed = Run("ours").train(20), Run("ours").train(12), Run("ours")
    resumed.net.load_state_dict(begun.net.state_dict())
    resumed.target.load_state_dict(begun.target.state_dict())
    resumed.optimizer.load_state_dict(saved(begun.optimizer))
    assert_same(resumed.train(8, 12).weights(), whole.weights())


def test_the_state_is_torchs():
    ours, torchs = Run("ours").train(2).optimizer.state_dict(), Run("fused").train(2).optimizer.state_dict()
    assert ours["state"].keys() == torchs["state"].keys()
    for a, b in zip(ours["state"].values(), torchs["state"].values(), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in torchs["param_groups"]]


def test_a_loaded_group_keeps_its_own_value_of_what_the_saved_one_lacks():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = jk.AdamWEMA([dict(params=[p], momentum=0.5, clip="head"), dict(params=[q])], momentum=0.75)
    other = torch.optim.AdamW([dict(params=[nn.Parameter(torch.ones(3))], lr=0.125) for _ in range(2)])
    optimizer.load_state_dict(other.state_dict())
    found = [(g["momentum"], g["clip"], g["lr"], g["max_grad_norm"]) for g in optimizer.param_groups]
    assert found == [(0.5, "head", 0.125, None), (0.75, "all", 0.125, None)]
    assert optimizer.state[p]["step"].item() == 0.0


SCHEDULERS = {
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=40),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda i: 1 / (1 + i), lambda i: min(1.0, i / 10)]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=30),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_schedulers_drive_the_rate_as_they_drive_torchs(name, lr):
    runs = [Run("exact", torch.float64), Run("fused"), Run("foreach"), Run("ours")]
    for run in runs:
        if lr == "tensor" and run.kind == "ours":
            for group in run.optimizer.param_groups:
                group["lr"] = torch.tensor(LR, dtype=torch.float64)
        scheduler = SCHEDULERS[name](run.optimizer)
        for i in range(30):
            run.step(i)
            scheduler.step()
    exact, *rivals, ours = runs
    assert [g["betas"] for g in ours.optimizer.param_groups] == [g["betas"] for g in exact.optimizer.param_groups]
    assert_as_good_as_torchs(ours, exact, rivals)


def test_the_momentum_of_a_group_is_read_at_every_step():
    p, k = nn.Parameter(torch.ones(3)), torch.zeros(3)
    optimizer = jk.AdamWEMA([p], [k], momentum=torch.tensor(1.0), lr=0.0)
    optimizer.step()
    assert k.tolist() == [0.0] * 3
    optimizer.param_groups[0]["momentum"].fill_(0.5)
    optimizer.step()
    assert k.tolist() == [0.5] * 3


def test_a_scaler_skips_infinite_gradients_and_the_average_still_runs():
    run, scaler = Run("ours"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.train(3)
    state = copy.deepcopy(run.optimizer.state_dict()["state"])
    before, targets = [p.detach().clone() for p in run.net.parameters()], [t.clone() for t in run.target.parameters()]
    run.optimizer.zero_grad()
    scaler.scale(torch.ones(()))  # which makes the scale
    backward(run.net, 3, 1024.0)
    next(run.net.parameters()).grad[0, 0] = float("inf")
    scaler.step(run.optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same([p.detach() for p in run.net.parameters()], before)
    for a, b in zip(state.values(), run.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    jk.ema_update(targets, before, MOMENTUM)
    assert_same(run.target.parameters(), targets)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaled_loss_gives_the_bits_of_an_unscaled_one(clip, unscaled):
    plain, scaled, scaler = (
        Run("ours", clip=clip),
        Run("ours", clip=clip),
        torch.amp.GradScaler("cpu", init_scale=256.0),
    )
    for i in range(5):
        plain.step(i)
        scaled.optimizer.zero_grad()
        scaler.scale(torch.ones(()))
        backward(scaled.net, i, 256.0)
        if unscaled:
            scaler.unscale_(scaled.optimizer)
        scaler.step(scaled.optimizer)
        scaler.update()
    assert_same(plain.weights(), scaled.weights())
    assert clip is None or plain.optimizer.grad_norms["all"] == scaled.optimizer.grad_norms["all"]


def shadowed(dtype=torch.bfloat16, **options):
    """A parameter, its target, and a shadow of each; the online one takes the gradient."""
    p, k = nn.Parameter(torch.linspace(-1, 1, 300)), torch.linspace(1, 2, 300)
    online, copied = p.detach().to(dtype).requires_grad_(), k.to(dtype)
    optimizer = jk.AdamWEMA([p], [k], shadow=([online], [copied]), momentum=0.5, **options)
    return p, k, online, copied, optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_online_shadow_is_its_parameters(dtype):
    p, k, online, copied, optimizer = shadowed(dtype)
    twin = nn.Parameter(p.detach().clone())
    alone = jk.AdamWEMA([twin])
    for _ in range(3):
        optimizer.zero_grad()
        assert online.grad is None
        (online * online.detach()).sum().backward()
        twin.grad = online.grad.float()
        optimizer.step()
        alone.step()
    assert p.grad is None and torch.equal(p, twin)
    assert torch.equal(online, p.to(dtype)) and torch.equal(copied, k.to(dtype))


def test_shadow_gradients_are_zeroed_in_place_where_asked():
    *_, online, _, optimizer = shadowed()
    online.sum().backward()
    grad = online.grad
    optimizer.zero_grad(set_to_none=False)
    assert online.grad is grad and not grad.any()


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_would_not_see_infinities_in_shadow_gradients(unscaled):
    *_, online, _, optimizer = shadowed()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    online.grad = torch.ones_like(online)
    if unscaled:
        scaler.unscale_(optimizer)
    message = (
        "AdamWEMA: the gradients of online shadows must be unscaled, got a GradScaler, .+; use bf16 shadows, and no"
    )
    with pytest.raises(ValueError, match=message):
        scaler.step(optimizer)


def test_closures_are_called_with_gradients_and_their_loss_is_returned():
    run, twin = Run("ours"), Run("ours")

    def closure():
        run.optimizer.zero_grad()
        return backward(run.net, 0)

    assert run.optimizer.step(closure) == backward(twin.net, 0)
    twin.optimizer.step()
    assert_same(run.weights(), twin.weights())


def test_a_parameter_without_gradient_keeps_its_state_and_its_target_moves():
    params = [
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(3), requires_grad=False),
    ]
    targets = [torch.zeros(3) for _ in params]
    optimizer = jk.AdamWEMA(params, targets, momentum=0.5)
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert params[0].ne(1).all() and params[1].eq(1).all() and params[2].eq(1).all()
    assert [optimizer.state[p]["step"].item() for p in params[:2]] == [1.0, 0.0]
    assert params[2] not in optimizer.state
    assert targets[1].eq(0.5).all() and targets[2].eq(0.5).all()
    params[2].requires_grad_()
    params[2].grad = torch.ones(3)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2.0, 0.0, 1.0]


def test_targets_may_be_missing_for_some_parameters():
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(3)
    k = torch.zeros(3)
    jk.AdamWEMA(params, [None, k, None], momentum=0.5, lr=0.0).step()
    assert k.tolist() == [0.5] * 3


def test_groups_may_carry_targets_and_shadows_of_their_own():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    k, shadow = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
    made = [dict(params=p), dict(params=[q], target_params=[k], shadow=(None, {q: shadow}), momentum=0.25)]
    optimizer = jk.AdamWEMA(made)
    assert made[1]["target_params"] == [k] and set(optimizer.param_groups[1]) == set(optimizer.param_groups[0])
    optimizer.step()
    assert k.tolist() == [0.75] * 3 == shadow.tolist()


def test_a_group_may_be_added_later():
    p, q, targets = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), [torch.zeros(3), torch.zeros(2)]
    optimizer = jk.AdamWEMA([p], targets[:1], momentum=0.5)
    optimizer.step()
    optimizer.add_param_group(dict(params=[q], target_params=targets[1:], weight_decay=0.0, momentum=0.25))
    q.grad = torch.ones(2)
    optimizer.step()
    assert [t.tolist() for t in targets] == [[0.75] * 3, pytest.approx([0.75] * 2, abs=1e-3)]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0 and optimizer.state[q]["step"].item() == 1.0


def test_named_parameters_and_empty_groups_are_taken():
    net, target = network(), network()
    optimizer = jk.AdamWEMA(net.named_parameters(), target.parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    jk.AdamWEMA([dict(params=[]), dict(params=[nn.Parameter(torch.ones(1))])]).step()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_train_on_by_themselves(copier):
    run = Run("ours").train(3)
    net, target, optimizer = copier((run.net, run.target, run.optimizer))
    twin = Run("ours")
    twin.net, twin.target, twin.optimizer = net, target, optimizer
    assert_same(twin.train(2, 3).weights(), run.train(2, 3).weights())


def test_hooks_run_around_the_step():
    run, seen = Run("ours"), []
    run.optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    run.train(1)
    assert seen == ["before", "after"]


def test_a_compiled_step_has_the_bits_of_an_eager_one():
    eager, compiled = Run("ours", clip=0.3), Run("ours", clip=0.3)
    step = torch.compile(compiled.step, backend="aot_eager")
    for i in range(4):
        eager.step(i)
        step(i)
    assert_same(eager.weights(), compiled.weights())


def test_accumulated_gradients_make_one_step():
    run, twin = Run("ours"), Run("fused")
    for i in range(3):
        backward(run.net, i)
        backward(twin.net, i)
    run.optimizer.step()
    twin.optimizer.step()
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(run.net.parameters(), twin.net.parameters(), strict=True)
    )


def test_the_reference_backend_takes_the_same_step():
    ours, plain = Run("ours", clip=0.3).train(5), Run("ours", clip=0.3)
    with jk.use_backend("reference"):
        plain.train(5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.weights(), plain.weights(), strict=True))


def test_new_storage_of_a_parameter_is_followed():
    run, twin = Run("ours").train(2), Run("ours").train(2)
    for p in (*run.net.parameters(), *run.target.parameters()):
        p.data = p.data.clone()
    for p, state in run.optimizer.state.items():
        run.optimizer.state[p] = {k: v.clone() for k, v in state.items()}
    assert_same(run.train(2, 2).weights(), twin.train(2, 2).weights())


def test_gradients_are_let_go_of_after_the_step():
    run = Run("ours", clip=1.0)
    backward(run.net, 0)
    grads = [weakref.ref(p.grad) for p in run.net.parameters()]
    run.optimizer.step()
    run.optimizer.zero_grad()
    assert not any(ref() is not None for ref in grads)


def test_no_memory_is_taken_but_for_tables():
    p, k = nn.Parameter(torch.ones(1 << 20)), torch.zeros(1 << 20)
    p.grad = torch.ones(1 << 20)
    optimizer = jk.AdamWEMA([p], [k], max_grad_norm=1.0)
    optimizer.step()
    _C.reset_most_held()
    in_blocks = _C.block_bytes()["held"]
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert _C.block_bytes()["most_held"] == in_blocks
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 1024


@pytest.mark.gpu
def test_a_captured_step_replays_with_other_rates_and_momenta():
    def make():
        params = [nn.Parameter(t.cuda()) for t in (torch.ones(1000, 3), torch.ones(7))]
        lr, momentum = (torch.tensor(x, device="cuda", dtype=torch.float64) for x in (1e-2, 0.9))
        targets = [torch.zeros_like(p) for p in params]
        options = dict(lr=lr, momentum=momentum, capturable=True, max_grad_norm=1.0)
        return params, targets, lr, momentum, jk.AdamWEMA(params, targets, **options)

    def set_values(made, i):
        params, _, lr, momentum, _ = made
        lr.fill_(1e-2 / (i + 1))
        momentum.fill_(0.9 + 0.01 * i)
        for p in params:
            p.grad.copy_(torch.full_like(p, 0.1 * (i + 1)))

    eager, graphed = make(), make()
    for made in (eager, graphed):
        for p in made[0]:
            p.grad = torch.ones_like(p)
        made[-1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed[-1].step()
    for i in range(4):
        set_values(eager, i)
        set_values(graphed, i)
        eager[-1].step()
        graph.replay()
    assert_same([*eager[0], *eager[1]], [*graphed[0], *graphed[1]])
