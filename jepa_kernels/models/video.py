"""What the models of video share: targets of whole clips, L1 distances at the masked places, rectangular masks."""

from __future__ import annotations

import torch
from torch import Tensor

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.masks import Masks
from jepa_kernels.models.jepa import JEPA
from jepa_kernels.packing import Packing


class VideoJEPA(JEPA):
    """A JEPA of clips [B, C, T, H, W], of sides and frames that are multiples of the patch's.

    .grid: (Gt, Gh, Gw) of the config's clips, as `MultiBlock3d` takes it.

    Masks are `Masks` of that grid (a MaskBatch of `MultiBlock3d` moved with `.to(device)`: every spec's masks of every
    clip in one packed pass), or a pair of rectangular ids (context [masks * B, Kc], target [masks * B, Kt],
    mask-major).
    """

    inputs = "clips"
    grid: tuple[int, int, int]

    @torch.no_grad()
    def targets(self, batch: Tensor) -> Tensor:
        """The target encoder's features of every patch, before its last norms, which `compare` applies.

        [B, N, E], or with several levels [B, N, levels * E].
        """
        with self.ema.cast_weights():
            return self.target_encoder.features(batch)

    def _distance(
        self,
        predicted: Tensor,
        targets: Tensor,
        ids: Tensor,
        packing: Packing | None,
        *,
        power: float = 1.0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """|d|^power / power of predictions to layer-normalised targets: mean per mask, mean of masks (`average`).

        The target encoder's last norms and those without weights are all computed at the rows of `ids` alone.
        """
        encoder = self.target_encoder
        return jk.latent_loss(
            predicted,
            targets,
            ids,
            packing=packing,
            kind="l1",
            power=power,
            norm=encoder.last_norm(),
            levels=encoder.levels or 1,
            weight=weight,
            reduction=self.average,
        )

    def _rectangular(self, batch: int, context_ids: Tensor, target_ids: Tensor) -> Masks:
        rows = context_ids.shape[0], target_ids.shape[0]
        if rows[0] % max(batch, 1) or rows[0] != rows[1]:
            requirement, remedy = (
                f"hold a multiple of {batch} contexts, and of these as many targets",
                "pass ids [masks * B, Kc] and [masks * B, Kt], mask-major",
            )
            fail(type(self).__name__, "masks", requirement, rows, remedy)
        return Masks(batch, context_ids, target_ids)
