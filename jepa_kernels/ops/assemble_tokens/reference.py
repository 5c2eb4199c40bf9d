"""Specification of `assemble_tokens`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kernels.packing import Packing


def forward(
    context: Tensor,
    mask_token: Tensor,
    context_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    context_packing: Packing | None = None,
    target_packing: Packing | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Sequence s: context s % Sc plus its positions, then mask token s // (St / G) plus the targets' positions."""
    wide = torch.float64 if context.dtype == torch.float64 else torch.float32
    tables = mask_token.to(wide), None if pos_embed is None else pos_embed.to(wide)
    if context_packing is None or target_packing is None or packing is None:
        out = _rectangular(context.to(wide), *tables, context_ids, target_ids)
    else:
        out = _packed(context.to(wide), *tables, context_ids, target_ids, (context_packing, target_packing, packing))
    return out.to(context.dtype)


def _rectangular(
    context: Tensor, mask_token: Tensor, pos_embed: Tensor | None, context_ids: Tensor | None, target_ids: Any
) -> Tensor:
    sequences, length = target_ids.shape
    token = mask_token[_group(torch.arange(sequences, device=context.device), sequences, mask_token)]
    target = token[:, None].expand(-1, length, -1)
    if pos_embed is not None:
        context, target = context + pos_embed[context_ids], target + pos_embed[target_ids]
    masks = sequences // max(context.shape[0], 1)
    return torch.cat([context.repeat(masks, 1, 1), target], 1)


def _packed(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    context_ids: Tensor | None,
    target_ids: Tensor | None,
    packings: tuple[Packing, Packing, Packing],
) -> Tensor:
    contexts, targets, packing = packings
    context_start, target_start, start = (p.cu_seqlens.long() for p in packings)
    owner = packing.sequence_of_token()
    inside = owner < packing.sequences
    s = torch.where(inside, owner, 0)
    c = s % max(contexts.sequences, 1)
    place = torch.arange(packing.tokens, device=context.device) - start[s]
    behind = place - contexts.cu_seqlens.diff()[c] if contexts.sequences else place
    # The last row of each padded table stands for none.
    row = torch.where(inside & (behind < 0), context_start[c] + place, contexts.tokens)
    target = torch.where(inside & (behind >= 0), target_start[s] + behind, targets.tokens)
    token = torch.where(inside & (behind >= 0), _group(s, packing.sequences, mask_token), mask_token.shape[0])
    out = F.pad(context, (0, 0, 0, 1))[row] + F.pad(mask_token, (0, 0, 0, 1))[token]
    if pos_embed is not None and context_ids is not None and target_ids is not None:
        none = pos_embed.shape[0]
        ids = F.pad(context_ids, (0, 1), value=none)[row].minimum(F.pad(target_ids, (0, 1), value=none)[target])
        out = out + F.pad(pos_embed, (0, 0, 0, 1))[ids]
    return out


def _group(s: Tensor, sequences: int, mask_token: Tensor) -> Tensor:
    """Sequence -> its mask token; the sequences of one token are neighbours."""
    return s // max(sequences // mask_token.shape[0], 1)
