"""A patched model against the unpatched one: outputs and every gradient within the error budget."""

import copy

import torch

from jepa_kernels.integrations.layers import LINEAR
from jepa_kernels.testing import hold, poisoned_memory


def results(model, run):
    """Outputs of run(model), by name, and the gradients of a fixed weighting of them, by module.

    Those of a module stand side by side: of a key's bias it may be zero, and its error is then of the weight's size.
    """
    found = run(model)
    generator = torch.Generator().manual_seed(2)
    total = sum((x.double() * torch.randn(x.shape, generator=generator).double()).sum() for x in found.values())
    model.zero_grad()
    total.backward()
    for name, module in model.named_modules():
        grads = [p.grad.flatten() for p in module.parameters(recurse=False) if p.grad is not None]
        if grads:
            found[f"d {name}"] = torch.cat(grads)
    return {name: x.detach() for name, x in found.items()}


def failures(models, patch, run, changed=lambda run: run):
    """What leaves the budget where `patch` patches models, held side by side: one alone may be exact by luck.

    changed: of the patched run, by torch.compile.
    """
    sides = [_sides(model, patch, run, changed) for model in models]
    joined = {name: [torch.cat(side) for side in zip(*(s[name] for s in sides), strict=True)] for name in sides[0]}
    parity = [hold(name, *given) for name, given in joined.items()]
    return [str(p) for p in parity if not p.ok]


def _sides(model, patch, run, changed):
    """Of one model, {name: (patched, in float64, unpatched)}."""
    exact, eager = results(copy.deepcopy(model).double(), run), results(model, run)
    with patch(model), poisoned_memory():
        actual = results(model, changed(run))
    again = results(model, run)
    assert all(torch.equal(again[name], eager[name]) for name in eager), "undo gives every bit back"
    assert any(not torch.equal(actual[name], eager[name]) for name in eager), "the patch did something"
    return {name: [side[name].flatten() for side in (actual, exact, eager)] for name in exact}


def far_from_its_start(model):
    """Weights and biases with which attention is sharp and norms do something."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def drawn(*shape):
    """Numbers that every type holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(16).round().div(16)


def but_for_products(done):
    """Names of what a patch replaced, linear layers left out."""
    return [name for name, what in done.patched.items() if what != LINEAR.what]
