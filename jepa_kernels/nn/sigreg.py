"""SIGReg as a module that counts its own steps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.nn.sync import one_batch


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularisation of embeddings (LeJEPA, arXiv:2511.08544): `jepa_kernels.sigreg`.

    SIGReg(num_slices=1024, n_points=17) stands for the lejepa package's SlicingUnivariateTest(EppsPulley(n_points=17),
    num_slices=1024). Each call in training mode takes new directions: the count of these calls is part of the state
    dict, so that a resumed run goes on where it stopped. In evaluation mode the directions stay. RuntimeError for a
    call in training mode that `torch.utils.checkpoint` repeats in backward: its gradient would be of other directions.
    group: ranks whose embeddings count as one batch; None: all ranks, where a default group has been initialised.
    """

    global_step: Tensor

    def __init__(
        self,
        num_slices: int = 1024,
        n_points: int = 17,
        t_max: float = 3.0,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_slices, self.n_points, self.t_max, self.seed, self.group = num_slices, n_points, t_max, seed, group
        self.register_buffer("global_step", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> Tensor:
        """z [..., N, E], views first -> the statistic, an fp32 scalar."""
        if self.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            repeated, remedy = "a call that a checkpoint repeats", "take the loss outside of the checkpoint"
            fail("SIGReg", "forward", "run outside of backward", repeated, remedy, RuntimeError)
        step = self.global_step.clone()  # backward may draw these directions again
        if self.training:
            self.global_step.add_(1)
        group = one_batch(self.group)
        return jk.sigreg(
            z, slices=self.num_slices, knots=self.n_points, t_max=self.t_max, step=step, seed=self.seed, group=group
        )
