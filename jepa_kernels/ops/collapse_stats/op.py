"""Public face of `collapse_stats`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from jepa_kernels._core.check import check_tensor
from jepa_kernels._core.define import define
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.ops.collapse_stats import reference

OP = "collapse_stats"

KERNELS = (Kernel("triton"), Kernel("cpu"))


class CollapseStats(NamedTuple):
    """What `collapse_stats` finds: 0-dim fp32 tensors, on the device of the embeddings."""

    std: Tensor
    min_std: Tensor
    rank: Tensor
    cosine: Tensor


def collapse_stats(z: Tensor, *, backend: str | None = None) -> CollapseStats:
    """Tell whether embeddings have collapsed, cheaply enough for every step: one pass over z, no device sync.

    std, min_std: mean and least over the features of the standard deviation over the rows (not Bessel's); 0 where all
        rows are equal.
    rank: effective rank (sum l)^2 / sum l^2 of the eigenvalues l of the covariance, between 1 and E; of at most 1024
        rows, evenly spaced, from the Frobenius norm of a matrix product: no eigenvalues are computed. 0 where all rows
        are equal.
    cosine: mean cosine of pairs of rows, from the norm of the sum of unit rows; near 1 where all point one way. A row
        of zeros has cosine 0 with every other.

    z: [..., N, E]: rows are all but the last dimension; fp32, bf16 or fp16, any strides. NaN reaches every number.
    No rows, or no features: all 0. One row: all 0.

    The rank is that of spreads of any size; std and cosine square in fp32: within 1e-18 to 1e18.

    No gradient. Statistics are fp32, also under autocast, and summed in a fixed order.
    Raises TypeError and ValueError for what is no such tensor.
    Source: participation ratio as in Roy and Vetterli, The effective rank (EUSIPCO 2007), with squares for entropy.
    """
    dims = z.dim() if isinstance(z, Tensor) else 2
    check_tensor(OP, "z", z, "B " * (dims - 2) + "N E")
    backend = select(OP, KERNELS, backend, z)
    if backend == "reference":
        std, least, rank, cosine = reference.forward(z)
    else:
        std, least, rank, cosine = _forward(z.detach().flatten(0, -2), backend).unbind()
    return CollapseStats(std, least, torch.where(std.isnan(), std, rank), cosine)  # a NaN may be in a row it left out


def _fake(z: Tensor, backend: str) -> Tensor:
    return z.new_empty(4, dtype=torch.float32)


_forward: Any = define(OP, "forward", "(Tensor z, str backend) -> Tensor", _fake)
