"""What the tests of masked_attention share."""

import pytest
import torch

import jepa_kernels as jk

OURS = ("cpu", pytest.param("triton", marks=pytest.mark.interp))


def with_gradients(q, k, v, packing=None, k_packing=None, threads=2, backend="cpu", **options):
    """Output and gradients of a kernel for a gradient that depends on the output."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = jk.masked_attention(*leaves, packing, k_packing=k_packing, backend=backend, **options)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)
    finally:
        torch.set_num_threads(before)


def equal(a, b):
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
