"""What tests ask of every video model in training: its networks, its loss with all gradients, its error budget."""

import copy

import torch

import jepa_kernels as jk
from jepa_kernels.testing import compare, poisoned_memory
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
    """Several runs side by side: on one, the reference's error of a scalar may be 0 by luck."""
    assert all(run.keys() == exact[0].keys() for run in (*actual, *exact, *eager))
    sides = [[torch.cat([run[name].flatten() for run in runs]) for runs in (actual, exact, eager)] for name in exact[0]]
    parity = [compare(name, *side) for name, side in zip(exact[0], sides, strict=True)]
    return [str(p) for p in parity if not p.ok]


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
