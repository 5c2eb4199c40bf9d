"""A patched model against the unpatched one: outputs and every gradient within the error budget."""

import copy

import torch

from jepa_kernels.testing import compare, poisoned_memory


def results(model, run):
    """Outputs of run(model), by name, and the gradients of a fixed weighting of them, by parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = run(model)
    generator = torch.Generator().manual_seed(2)
    total = sum((x.double() * torch.randn(x.shape, generator=generator).double()).sum() for x in found.values())
    grads = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    named = {f"d {name}": g for name, g in zip(trained, grads, strict=True) if g is not None}
    return {name: x.detach() for name, x in {**found, **named}.items()}


def failures(model, patch, run, changed=lambda forward: forward):
    """What leaves the budget once `patch` has patched `model`; changed: of the patched run, by torch.compile."""
    exact, eager = results(copy.deepcopy(model).double(), run), results(model, run)
    with patch(model), poisoned_memory():
        actual = results(model, changed(run))
    again = results(model, run)
    assert all(torch.equal(again[name], eager[name]) for name in eager), "undo gives every bit back"
    assert any(not torch.equal(actual[name], eager[name]) for name in eager), "the patch did something"
    parity = [compare(name, actual[name], exact[name], eager[name]) for name in exact]
    return [str(p) for p in parity if not p.ok]


def far_from_its_start(model):
    """Weights and biases with which attention is sharp and norms do something."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model
