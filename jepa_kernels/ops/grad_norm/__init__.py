"""Norm of all gradients together, in one pass."""
