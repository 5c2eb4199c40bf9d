"""What a planner found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_kernels._core.check import fail


@dataclass(frozen=True)
class Plan:
    """Tensors on the world's device; nothing has waited for them.

    actions [H, A]: of the world, to be taken one after another.
    latents [H, N, E]: what they are imagined to lead to.
    energy []: the cost of that; NaN if the world or the cost gave NaN for it.
    energies [iterations, S]: of every sample; infinite where the world or the cost gave NaN or -inf.
    invalid [iterations], int64: how many samples that was. They lose. Where all did, mean and std stayed as they were.
    mean, std [H, D]: of the last distribution, in the numbers of the `ActionSpace`. Of a gradient plan: the chosen
        start, and the standard deviation of all.
    """

    actions: Tensor
    latents: Tensor
    energy: Tensor
    energies: Tensor
    invalid: Tensor
    mean: Tensor
    std: Tensor

    def shifted(self, steps: int) -> Tensor:
        """The mean after `steps` actions were taken, [H, D]. Zeros at its end: the `mean=` of the next plan."""
        horizon = len(self.mean)
        if not 0 <= steps <= horizon:
            fail("Plan.shifted", "steps", f"lie in 0..{horizon}", steps, "pass the number of actions taken")
        return torch.cat((self.mean[steps:], torch.zeros_like(self.mean[:steps])))
