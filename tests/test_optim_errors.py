"""AdamWEMA: what is wrong, from the first or between steps, is named before anything is written."""

import copy

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from tests.test_optim import Run, assert_same, backward, shadowed


def resize(run):
    run.net[3].weight.data = torch.zeros(2, 33)


def halve(run):
    run.net.bfloat16()


def free(run):
    run.target[3].weight.data = torch.zeros(0)


def share(run):
    run.target[3].bias.data = run.net[3].bias.data


def state_lost(run):
    del run.optimizer.state[run.net[3].weight]["exp_avg"]


def sparse(run):
    run.net[3].weight.grad = None
    run.net[3].weight.grad = torch.zeros(3, 33).to_sparse()


def option(**values):
    return lambda run: run.optimizer.param_groups[1].update(values)


WEIGHT = r"param_groups\[0\]\['params'\]\[1\]"
BIAS = r"param_groups\[1\]\['params'\]\[3\]"
BROKEN = [
    (resize, ValueError, f"adamw_ema: the grad of {WEIGHT} must have shape .2, 33. and strides"),
    (
        halve,
        TypeError,
        r"adamw_ema: param_groups\[0\]\['params'\]\[0\] must be float32, got bfloat16; keep fp32 weights",
    ),
    (free, ValueError, f"adamw_ema: the target of {WEIGHT} must have shape .3, 33. and strides"),
    (share, ValueError, f"adamw_ema: .+{BIAS} must share no memory with .+{BIAS}, got overlapping storage"),
    (state_lost, TypeError, rf"adamw_ema: exp_avgs\[1\] must be a tensor, as {WEIGHT} has a gradient, got None"),
    (sparse, TypeError, f"adamw_ema: the grad of {WEIGHT} must be a strided tensor, got torch.sparse_coo; convert it"),
    (option(momentum=float("nan")), ValueError, r"adamw_ema: momentum must lie in \[0, 1\], got nan"),
    (option(lr=-1.0), ValueError, "adamw_ema: lr must be at least 0, got -1.0"),
    (option(max_grad_norm=0.0), ValueError, "AdamWEMA: max_grad_norm must be a positive number or None, got 0.0; 1.0"),
]


@pytest.mark.parametrize("break_it, error, message", BROKEN, ids=[m[:60] for *_, m in BROKEN])
def test_what_breaks_between_steps_is_named_and_nothing_is_written(break_it, error, message):
    run = Run("ours").train(2)
    run.optimizer.zero_grad()
    backward(run.net, 2)
    break_it(run)
    before = copy.deepcopy((run.weights(), run.optimizer.state_dict()["state"]))
    with pytest.raises(error, match=message):
        run.optimizer.step()
    assert_same(run.weights(), before[0])
    for a, b in zip(before[1].values(), run.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


P, K = nn.Parameter(torch.ones(3)), torch.ones(3)
WRONG = [
    (dict(params=P), TypeError, "params argument given to the optimizer should be an iterable of Tensors or dicts"),
    (dict(params=[]), ValueError, "optimizer got an empty parameter list"),
    (dict(params=[dict(params={P})]), TypeError, "optimizer parameters need to be organized in ordered collections"),
    (
        dict(params=[nn.Parameter(torch.ones(3).bfloat16())]),
        TypeError,
        "must be float32, got bfloat16; keep fp32 weights",
    ),
    (dict(params=[nn.Parameter(torch.ones(3).cfloat())]), TypeError, "must be float32, got complex64"),
    (dict(target_params=[K, K]), ValueError, r"AdamWEMA: target_params must hold 1 tensors, got 2; pass one"),
    (
        dict(target_params=[K.bfloat16()]),
        TypeError,
        r"the target of param_groups\[0\]\['params'\]\[0\] must be float32",
    ),
    (
        dict(target_params=[torch.ones(4)]),
        ValueError,
        r"the target of param_groups.+ must have shape \(3,\) and strides",
    ),
    (dict(target_params=[P]), ValueError, "must share no memory with .+, got overlapping storage; give each a tensor"),
    (
        dict(shadow=[K]),
        TypeError,
        r"AdamWEMA: shadow must be a pair \(online, target\), got list; pass None for either",
    ),
    (dict(shadow=([K], None)), TypeError, "the online_shadow of .+ must be bfloat16 or float16, got float32"),
    (
        dict(shadow=(None, [K.bfloat16()])),
        ValueError,
        "the target_shadow of .+ must have a target to copy, got no target",
    ),
    (dict(lr=-1.0), ValueError, "adamw_ema: lr must be at least 0, got -1.0"),
    (dict(momentum=2), ValueError, r"adamw_ema: momentum must lie in \[0, 1\], got 2"),
    (dict(betas=(0.9, 1.5)), ValueError, r"adamw_ema: betas must lie in \[0, 1\), got"),
    (dict(max_grad_norm=-1.0), ValueError, "AdamWEMA: max_grad_norm must be a positive number or None, got -1.0"),
    (
        dict(params=[dict(params=[P], target_params=[K])], target_params=[K]),
        ValueError,
        "AdamWEMA: targets and shadows must be given for all groups or by each, got both; leave one of them out",
    ),
]


@pytest.mark.parametrize("wrong, error, message", WRONG, ids=[m[:60] for *_, m in WRONG])
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        jk.AdamWEMA(**dict(params=[P]) | wrong)


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    p, q, k = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), torch.zeros(3)
    optimizer = jk.AdamWEMA([p], [k], momentum=0.5)
    with pytest.raises(ValueError, match=r"the target of param_groups\[0\].+ must share no memory with"):
        optimizer.add_param_group(dict(params=[q], target_params=[k]))
    assert len(optimizer.param_groups) == 1 and q not in optimizer.state
    optimizer.step()
    assert k.tolist() == [0.5] * 3


def test_both_gradients_of_one_weight_are_refused():
    p, *_, online, _, optimizer = shadowed()
    p.grad, online.grad = torch.ones(300), torch.ones(300, dtype=torch.bfloat16)
    message = (
        r"AdamWEMA: one of param_groups\[0\]\['params'\]\[0\] and its online shadow must have a gradient, got both"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_a_state_of_another_kind_of_optimizer_is_refused():
    p = nn.Parameter(torch.ones(3))
    theirs, ours = torch.optim.SGD([p], lr=0.1, momentum=0.9), jk.AdamWEMA([p])
    p.grad = torch.ones(3)
    theirs.step()
    with pytest.raises(ValueError, match=r"AdamWEMA: a loaded state must hold step, .+, got momentum_buffer"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}, "nothing is half-loaded"


OTHERS = {"amsgrad": True, "differentiable": True, "decoupled_weight_decay": False}


@pytest.mark.parametrize("option", OTHERS)
def test_what_only_torchs_optimizer_does_is_refused_wherever_a_group_says_it(option):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    message = f"AdamWEMA: a group must have {option}={not OTHERS[option]}, got {OTHERS[option]}; take torch's own"
    group = {"params": [p], option: OTHERS[option]}
    optimizer = jk.AdamWEMA([q])
    with pytest.raises(ValueError, match=message):
        jk.AdamWEMA([group])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    optimizer.param_groups[0][option], q.grad = OTHERS[option], torch.ones(3)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert q.tolist() == [1.0] * 3 and len(optimizer.param_groups) == 1


def foreign(change):
    """A state_dict of torch.optim.AdamW's that is no longer one."""
    p = nn.Parameter(torch.ones(3))
    torchs = torch.optim.AdamW([p])
    p.grad = torch.ones(3)
    torchs.step()
    saved = torchs.state_dict()
    change(saved["state"][0], saved["param_groups"][0])
    return saved


FOREIGN = [
    (lambda state, group: group.update(amsgrad=True), "a group must have amsgrad=False, got True; take torch's own"),
    (lambda state, group: group.update(lr=-1.0), "lr must be at least 0, got -1.0; 1e-3 is usual"),
    (
        lambda state, group: state.pop("exp_avg"),
        "a loaded state must hold step, exp_avg, exp_avg_sq, got step, ",
    ),
    (
        lambda state, group: state.update(exp_avg_sq=torch.zeros(4)),
        r"a loaded exp_avg_sq must have its parameter's shape \(3,\), got \(4,\); load the state of this network",
    ),
]


@pytest.mark.parametrize("change, message", FOREIGN, ids=[m[:40] for _, m in FOREIGN])
def test_a_state_that_does_not_fit_is_refused_and_none_of_it_loaded(change, message):
    p = nn.Parameter(torch.ones(3))
    optimizer = jk.AdamWEMA([p], lr=0.25)
    before, groups = optimizer.state[p], optimizer.param_groups
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign(change))
    assert optimizer.state[p] is before and optimizer.param_groups is groups
    assert before["step"].item() == 0.0 and groups[0]["lr"] == 0.25


def test_a_hook_may_change_what_is_loaded_before_it_is_checked():
    p = nn.Parameter(torch.ones(3))
    optimizer = jk.AdamWEMA([p])
    renamed = foreign(lambda state, group: state.update(first=state.pop("exp_avg")))

    def back(optimizer, saved):
        state = {**saved["state"][0], "exp_avg": saved["state"][0]["first"]}
        state.pop("first")
        return {**saved, "state": {0: state}}

    optimizer.register_load_state_dict_pre_hook(back)
    optimizer.load_state_dict(renamed)
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((3,), 0.1))


def resized(tensor, size):
    tensor.untyped_storage().resize_(size)


def pair(first_step=True):
    p = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    targets = [torch.ones(4, 4) for _ in p]
    optimizer = jk.AdamWEMA(p, targets)
    for x in p:
        x.grad = torch.ones(4, 4)
    if first_step:
        optimizer.step()
    return p, targets, optimizer


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("role", ["param", "target", "exp_avg", "grad"])
def test_storage_that_was_freed_or_shrunk_is_refused_before_anything_is_written(role, size):
    p, targets, optimizer = pair()
    last = p[1]
    of = dict(param=last, target=targets[1], exp_avg=optimizer.state[last]["exp_avg"], grad=last.grad)
    resized(of[role], size)
    before = p[0].detach().clone(), targets[0].clone()
    with pytest.raises(ValueError, match=f"adamw_ema: .*must hold its 64 bytes, got a storage with {size}; do not"):
        optimizer.step()
    assert torch.equal(p[0], before[0]) and torch.equal(targets[0], before[1])


def test_a_negated_view_is_no_gradient():
    p, _, optimizer = pair()
    p[1].grad = torch._neg_view(torch.ones(4, 4))
    with pytest.raises(TypeError, match=r"adamw_ema: the grad of .+ must be stored as it reads, got a tensor with the"):
        optimizer.step()


class Two(torch.Tensor):
    """A tensor of tensors, as quantised and nested ones are: its own memory is not where its elements are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_a_tensor_of_another_class_is_refused():
    p, other = torch.ones(4), Two(torch.ones(4))
    with pytest.raises(TypeError, match=r"grad_norm: grads\[1\] must be a plain tensor or a DTensor of such, got Two"):
        jk.grad_norm([p, other])
    with pytest.raises(TypeError, match=r"ema_update: a tensor of online must be a plain tensor or a DTensor .+ Two"):
        jk.ema_update([p], [other], 0.5)
    with pytest.raises(
        TypeError, match=r"adamw_ema: targets\[0\] must be a plain tensor or a DTensor of such, got Two"
    ):
        jk.AdamWEMA([nn.Parameter(p)], [other])


def test_construction_plans_each_group_a_fixed_number_of_times(monkeypatch):
    made = []
    plan = jk.AdamWEMA._plan
    monkeypatch.setattr(jk.AdamWEMA, "_plan", lambda self, i, grads: made.append(i) or plan(self, i, grads))
    jk.AdamWEMA([dict(params=[nn.Parameter(torch.ones(2))]) for _ in range(20)])
    assert len(made) == 40
