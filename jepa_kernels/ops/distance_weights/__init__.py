"""Weights of context tokens by their distance to the targets."""
