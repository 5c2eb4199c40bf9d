"""Weights far from those at the start of training, and whether two sets of them are equal."""

import torch


def shaken(model, by):
    """Norms with weights and biases, sharp attention, mask tokens that differ; tables of positions stay."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "pos_embed" not in name:
                p.add_(torch.randn_like(p) * by)
    return model


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())
