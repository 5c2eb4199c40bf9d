"""Effective rank of evenly spaced rows, from blocks of their smaller product. What kernels of every device share."""

import math

import torch
from torch import Tensor

ROWS = 1024
BLOCK = 256


def effective_rank(z: Tensor) -> Tensor:
    """trace(G)^2 / |G|^2, G the product of the centred rows of z [N, E] with themselves; 0 where trace(G) is."""
    count = min(len(z), ROWS)
    if count == 0 or z.shape[1] == 0:
        return z.new_zeros((), dtype=torch.float32)
    x = z[torch.arange(count, device=z.device) * len(z) // count].to(torch.float32)
    x -= x[0].clone()  # equal rows give 0 exactly
    x -= x.mean(0)
    top = torch.linalg.vector_norm(x, math.inf)
    x /= torch.where(top == 0, 1.0, top)  # the products of no size overflow, or vanish
    x = x if count < x.shape[1] else x.T
    trace, squares = x.new_zeros((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
    for i in range(0, len(x), BLOCK):  # each block beside the diagonal once; `out=` keeps fp32 under autocast
        own = x[i : i + BLOCK]
        product = torch.mm(own, x[i:].T, out=x.new_empty(len(own), len(x) - i))
        diagonal = product[:, : len(own)]
        trace += diagonal.trace()
        squares += 2 * _square_sum(product) - _square_sum(diagonal)
    return torch.where(trace == 0, 0.0, trace.square() / squares).to(torch.float32)


def _square_sum(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
