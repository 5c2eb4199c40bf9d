"""The predictor: from the context's latents to those at the target places."""

from typing import Any

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.nn.block import NORM_EPS, Block, init_weights
from jepa_kernels.nn.encoder import frozen_table
from jepa_kernels.packing import Packing
from jepa_kernels.pairs import Pairs


class Predictor(nn.Module):
    """A narrow ViT over [context | mask tokens], one sequence per target mask and image.

    Targets of different masks do not see one another.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        embed_dim: int,
        predictor_embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        dim = predictor_embed_dim
        if dim % 4:
            fail("Predictor", "predictor_embed_dim", "be a multiple of 4", dim, "position tables have four parts")
        self.predictor_embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.predictor_pos_embed = frozen_table(grid, dim)
        self.predictor_blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(dim, embed_dim)
        self.apply(init_weights)

    def forward(
        self,
        context: Tensor,
        context_ids: Tensor,
        target_ids: Tensor,
        context_packing: Packing | None = None,
        target_packing: Packing | None = None,
        pairs: Pairs | None = None,
    ) -> Tensor:
        """Predict the latents at `target_ids`.

        Rectangular: context [B, Kc, E], context_ids [B, Kc], target_ids [masks * B, Kt] -> [masks * B, Kt, E].
        Packed: context [Tc, E], context_ids [Tc], target_ids [Tt], mask-major, with their packings -> [Tt, E].
        pairs: built from the packings' lengths when left out; pass it in compiled code.
        """
        context = self.predictor_embed(context) + self._positions(context_ids, context_packing)
        target = self.mask_token.view(-1) + self._positions(target_ids, target_packing)
        if context_packing is None or target_packing is None:
            return self._rectangular(context, target)
        if pairs is None:
            lengths = context_packing.lengths, target_packing.lengths
            pairs = Pairs.from_lengths(*lengths, device=context.device)
        x = _Assemble.apply(context, target, pairs.context_rows, pairs.target_rows)
        for block in self.predictor_blocks:
            x = block(x, pairs.packing)
        return self._project(x.index_select(0, pairs.target_rows))

    def _rectangular(self, context: Tensor, target: Tensor) -> Tensor:
        masks, kept = target.shape[0] // max(context.shape[0], 1), context.shape[1]
        x = torch.cat([context.repeat(masks, 1, 1), target], 1)
        for block in self.predictor_blocks:
            x = block(x)
        return self._project(x[:, kept:])

    def _positions(self, ids: Tensor, packing: Packing | None) -> Tensor:
        return jk.gather_tokens(self.predictor_pos_embed, ids, packing)

    def _project(self, x: Tensor) -> Tensor:
        return self.predictor_proj(self.predictor_norm(x))


class _Assemble(torch.autograd.Function):
    """Write contexts (once per mask) and targets to their rows of the packed sequences.

    The rows are distinct and cover everything, so that no buffer is cleared and the backward only reads: a chain
    of index_copy would copy the whole gradient once per mask, an index_select would add with atomics.
    """

    @staticmethod
    def forward(ctx: Any, context: Tensor, target: Tensor, context_rows: Tensor, target_rows: Tensor) -> Tensor:
        dtype = torch.promote_types(context.dtype, target.dtype)
        x = target.new_empty((context_rows.numel() + target.shape[0], target.shape[1]), dtype=dtype)
        x.index_copy_(0, target_rows, target.to(dtype))
        for rows in context_rows:
            x.index_copy_(0, rows, context.to(dtype))
        ctx.save_for_backward(context_rows, target_rows)
        ctx.dtypes = context.dtype, target.dtype
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        context_rows, target_rows = ctx.saved_tensors
        total = torch.promote_types(grad.dtype, torch.float32)
        d_context = grad.index_select(0, context_rows[0]).to(total)
        for rows in context_rows[1:]:
            d_context += grad.index_select(0, rows)
        d_target = grad.index_select(0, target_rows)
        return d_context.to(ctx.dtypes[0]), d_target.to(ctx.dtypes[1]), None, None
