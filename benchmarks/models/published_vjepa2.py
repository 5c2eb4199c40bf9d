"""V-JEPA 2's training step as its authors compute it, on the same weights: the rival of ours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models.bench_encoder import attend, encode
from jepa_kernels import patch_positions
from jepa_kernels.masks import Masks
from jepa_kernels.models.vjepa2 import VJEPA2
from jepa_kernels.nn import Predictor
from jepa_kernels.packing import Packing


class Published(VJEPA2):
    """Mask after mask, of truncated masks: every patch is embedded and most are dropped, each layer turns queries and
    keys by many small operations before SDPA, the predictor sorts its tokens, targets are normalised whole."""

    def forward(self, batch: Tensor, masks: Masks, **options: Any) -> list[Tensor]:  # type: ignore[override]
        return [
            predict(self.predictor, encode(self.context_encoder, batch, context_ids), context_ids, target_ids)
            for context_ids, target_ids in pairs(masks)
        ]

    @torch.no_grad()
    def targets(self, batch: Tensor) -> Tensor:
        every = torch.arange(torch.Size(self.context_encoder.grid_of(batch)).numel(), device=batch.device)
        latents = encode(self.target_encoder, batch, every.expand(len(batch), -1))
        return F.layer_norm(latents, latents.shape[-1:])

    def compare(self, predicted: list[Tensor], targets: Tensor, masks: Masks) -> Tensor:  # type: ignore[override]
        chosen = [targets.gather(1, ids[..., None].expand(-1, -1, targets.shape[-1])) for _, ids in pairs(masks)]
        distances = [(found - wanted).abs().mean() for found, wanted in zip(predicted, chosen, strict=True)]
        return torch.stack(distances).mean()


def pairs(masks: Masks) -> list[tuple[Tensor, Tensor]]:
    """(context ids, target ids) [B, K] of each mask."""
    sides = (masks.context_ids, masks.context_packing), (masks.target_ids, masks.target_packing)
    context_ids, target_ids = (rectangles(ids, packing, masks.batch) for ids, packing in sides)
    return list(zip(context_ids, target_ids, strict=True))


def rectangles(ids: Tensor, packing: Packing | None, batch: int) -> list[Tensor]:
    """Ids that are truncated to one length a mask, mask by mask."""
    assert packing is not None, "masks of both kinds differ in length"
    tokens = [batch * length for length in packing.lengths[::batch]]
    return [part.view(batch, -1) for part in ids.split(tokens)]


def predict(predictor: Predictor, context: Tensor, context_ids: Tensor, target_ids: Tensor) -> Tensor:
    x = predictor.predictor_embed(context)
    token = predictor.mask_tokens[0].expand(*target_ids.shape, -1)
    ids, order = torch.cat([context_ids, target_ids], 1).sort(1)
    x = rows(torch.cat([x, token.to(x.dtype)], 1), order)
    positions = patch_positions(ids, predictor.grid)
    for block in predictor.predictor_blocks:
        x = x + attend(block.attn, block.norm1(x), positions)
        x = x + block.mlp(block.norm2(x))
    x = rows(predictor.predictor_norm(x), order.argsort(1))
    return predictor.predictor_proj(x[:, context_ids.shape[1] :])


def rows(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
