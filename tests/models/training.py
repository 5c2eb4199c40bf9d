"""What tests ask of every video model in training: its networks, its loss with all gradients, its error budget."""

import copy

import torch

import jepa_kernels as jk
from jepa_kernels.testing import hold, poisoned_memory
from tests.models import video_equations


def rows(ids, lengths):
    return torch.from_numpy(ids).flatten().split(lengths.tolist())


def networks(model):
    names = "context_encoder", "predictor", "target_encoder"
    return {name: dict(getattr(model, name).named_parameters()) for name in names}


def results(loss, model):
    """Loss and every gradient that there is, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {"loss": loss.detach(), **{n: g for n, g in zip(trained, grads, strict=True) if g is not None}}


def by_the_equations(model, clips, masks, token):
    """Loss, and the predictions at the targets; token: of a mask's number, its mask token's."""
    contexts, targets = rows(masks.context_ids, masks.context_lengths), rows(masks.target_ids, masks.target_lengths)
    return video_equations.loss(networks(model), clips, contexts, targets, model.config, token)


def failures(actual, exact, eager):
    """Several runs side by side: on one, the reference's error of a scalar may be 0 by luck. Each in units of its own
    largest number, so that no run alone, whose numbers happen to be large, is what all are judged by."""
    assert all(run.keys() == exact[0].keys() for run in (*actual, *exact, *eager))
    parity = []
    for name in exact[0]:
        units = [power_of_two(run[name].abs().max()) for run in exact]
        sides = [
            torch.cat([run[name].flatten() / unit.to(run[name].dtype) for run, unit in zip(runs, units, strict=True)])
            for runs in (actual, exact, eager)
        ]
        parity.append(hold(name, *sides))
    return [str(p) for p in parity if not p.ok]


def power_of_two(x):
    """The one at or above x, by which a division is exact; 1 for 0."""
    return torch.exp2(torch.frexp(x.double()).exponent.double())


def over_budget(runs):
    """Of loss and gradients of the kernels, in runs of (model, clips, masks)."""
    actual, exact, eager = [], [], []
    for model, clips, masks in runs:
        double = copy.deepcopy(model).double()
        with poisoned_memory():
            actual.append(results(model.loss(clips, masks), model))
        with jk.use_backend("reference"):
            eager.append(results(model.loss(clips, masks), model))
            exact.append(results(double.loss(clips.double(), masks), double))
    return failures(actual, exact, eager)
