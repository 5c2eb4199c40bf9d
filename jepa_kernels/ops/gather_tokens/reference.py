"""Specification of `gather_tokens`."""

import torch
from torch import Tensor

from jepa_kernels.packing import Packing


def forward(x: Tensor, ids: Tensor, packing: Packing | None = None) -> Tensor:
    """out[m, k] = x[m % B, ids[m, k]]; packed: out[t] = x[s(t) % B, ids[t]]."""
    if packing is None:
        image = torch.arange(ids.shape[0], device=x.device) % x.shape[0] if ids.shape[0] else ids.new_zeros(0)
        return x[image[:, None], ids]
    sequence = packing.sequence_of_token()
    inside = sequence < packing.sequences
    out = x[torch.where(inside, sequence % max(x.shape[0], 1), 0), torch.where(inside, ids, 0)]
    return torch.where(inside[:, None], out, x.new_zeros(()))
