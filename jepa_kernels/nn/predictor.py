"""The predictor: from the context's latents to those at the target places."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import INT64, check_ids, check_tensor, fail
from jepa_kernels.nn.block import NORM_EPS, Block, init_weights
from jepa_kernels.nn.encoder import check_rope, modality_embeddings, rounding
from jepa_kernels.nn.linear import Linear
from jepa_kernels.nn.patch_embed import frozen_table
from jepa_kernels.packing import Packing
from jepa_kernels.pairs import Pairs
from jepa_kernels.rotary import Rope, patch_positions


class Predictor(nn.Module):
    """A narrow ViT over [context | mask tokens], one sequence per target mask and image.

    Targets of different masks do not see one another. Three shortcuts change no number beyond rounding: tokens are
    written once, in their place, and never sorted; with `rope` the first block's product is computed once for all
    copies of a context or of a mask token; the last block computes the target rows alone, if no others are asked.

    grid: (Gh, Gw) or (Gt, Gh, Gw), the latter with `rope`, of the patches.
    rope, rope_precision, uniform_power, pretrained_grid: as of `Encoder`; without rope: a table of positions, of `grid`
        alone.
    num_mask_tokens: None: one mask token, `mask_token`, as I-JEPA's; else so many in the list `mask_tokens`, 0 at the
        start, as V-JEPA's.
    levels: so many latents of width embed_dim stand side by side in the context; several are embedded by two layers
        with a GELU between them.
    out_dim: of the predictions; None: levels * embed_dim.
    modality_embedding: a learned vector is added to every token, one for images and one for videos.
    context_proj: predictions at the context's own places too, by a layer of their own (V-JEPA 2.1).
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        embed_dim: int,
        predictor_embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        rope: str | None = None,
        rope_precision: str = "float32",
        num_mask_tokens: int | None = None,
        uniform_power: bool = True,
        pretrained_grid: int | None = None,
        levels: int = 1,
        out_dim: int | None = None,
        modality_embedding: bool = False,
        context_proj: bool = False,
    ) -> None:
        super().__init__()
        dim = predictor_embed_dim
        check_rope("Predictor", rope, rope_precision)
        if len(grid) != 3 and (rope is not None or len(grid) != 2):
            wanted = "be (Gh, Gw) or (Gt, Gh, Gw)" if rope is None else "be (Gt, Gh, Gw) with rope"
            fail("Predictor", "grid", wanted, grid, "pass the encoder's grid")
        for name, count in (("depth", depth), ("num_mask_tokens", num_mask_tokens), ("levels", levels)):
            if count is not None and count < 1:
                fail("Predictor", name, "be at least 1", count, "the published predictors have 12 blocks")
        self.grid, self.rope, self.pretrained_grid = tuple(grid), rope, pretrained_grid
        self.rope_precision, self.head_dim = rope_precision, dim // num_heads
        self.predictor_embed: nn.Module = Linear(embed_dim, dim)
        if levels > 1:
            wide = Linear(levels * embed_dim, embed_dim)
            self.predictor_embed = nn.Sequential(wide, nn.GELU(), self.predictor_embed)
        self.img_mod_embed, self.video_mod_embed = modality_embeddings(dim, modality_embedding)
        if num_mask_tokens is None:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        else:
            self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, dim) for _ in range(num_mask_tokens))
        self.predictor_pos_embed = None
        if rope is None:
            named = "Predictor", "predictor_embed_dim"
            self.predictor_pos_embed = frozen_table(*named, self.grid, dim, uniform_power=uniform_power)
        self.predictor_blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        out_dim = levels * embed_dim if out_dim is None else out_dim
        self.predictor_proj = Linear(dim, out_dim)
        self.predictor_proj_context = Linear(dim, out_dim) if context_proj else None
        self.apply(init_weights)

    def forward(
        self,
        context: Tensor,
        context_ids: Tensor,
        target_ids: Tensor,
        context_packing: Packing | None = None,
        target_packing: Packing | None = None,
        pairs: Pairs | None = None,
        *,
        grid: tuple[int, int, int] | None = None,
        mask_index: int | Sequence[int] = 0,
        image: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the latents at `target_ids`, which look at one context each: target s at context s % contexts.

        Rectangular: context [S, Kc, E], context_ids [S, Kc], target_ids [M, Kt], S divides M -> [M, Kt, E].
        Packed: context [Tc, E], context_ids [Tc], target_ids [Tt], with their packings -> [Tt, E].
        With context_proj: a pair, the latter at `context_ids` of every sequence, [M, Kc, E] or [Tc, E] for S = M.
        pairs: built from the packings' lengths when left out; pass it in compiled code.
        grid: (Gt, Gh, Gw) of these ids, with rope; None: the constructor's. It may go on after the clip's last frame.
        mask_index: which of `mask_tokens` stands at the targets: one for all, or one for each group of consecutive
            sequences (masks).
        image: whose modality embedding is added, images' or videos'.
        """
        token = self._tokens(mask_index)
        checked = self._checked(grid, context, (context_ids, context_packing), (target_ids, target_packing))
        context = self.predictor_embed(context).to(token.dtype)  # under autocast the blocks add up in full precision
        modality = self.img_mod_embed if image else self.video_mod_embed
        if modality is not None:
            context, token = context + modality[0], token + modality[0]
        if context_packing is not None and target_packing is not None and pairs is None:
            lengths, tokens = context_packing.lengths, context_packing.tokens
            both: Any = dict(context_tokens=tokens, target_tokens=target_packing.tokens)
            pairs = Pairs.from_lengths(lengths, target_packing.lengths, **both, device=context.device)
        packing = None if pairs is None else pairs.packing
        place = partial(
            jk.assemble_tokens,
            context_ids=context_ids,
            target_ids=target_ids,
            context_packing=context_packing,
            target_packing=target_packing,
            packing=packing,
        )
        x = place(context, token, pos_embed=None if self.predictor_pos_embed is None else self.predictor_pos_embed[0])
        rope, target_rope = self._ropes(context_ids, target_ids, pairs, checked)
        *blocks, last = (cast(Block, block) for block in self.predictor_blocks)
        for i, block in enumerate(blocks):
            repeated = i == 0 and rope is not None
            x = block(x, packing, rope, place(block.qkv(context), block.qkv(token)) if repeated else None)
        kept = context_ids.shape[-1]
        if self.predictor_proj_context is None:
            targets = x[:, kept:] if pairs is None else _take(x, pairs.target_rows)
            targets = last.cross(targets, x, target_packing, packing, target_rope)
            return self.predictor_proj(self.predictor_norm(targets))
        x = self.predictor_norm(last(x, packing, rope))
        if pairs is None:
            own, targets = x[:, :kept], x[:, kept:]
        else:
            own, targets = _take(x, pairs.context_rows), _take(x, pairs.target_rows)
        return self.predictor_proj(targets), self.predictor_proj_context(own)

    def _tokens(self, index: int | Sequence[int]) -> Tensor:
        """[groups, dim]: the mask token of each group of target sequences."""
        tokens = [self.mask_token] if hasattr(self, "mask_token") else list(self.mask_tokens)
        wanted = [index] if type(index) is int else index
        if not (isinstance(wanted, list | tuple) and wanted and all(type(i) is int for i in wanted)):
            fail("Predictor", "mask_index", "be an int or a list of ints", repr(index), "0 is the first", TypeError)
        if not all(0 <= i < len(tokens) for i in wanted):
            fail("Predictor", "mask_index", f"lie in [0, {len(tokens)})", index, "set num_mask_tokens for more")
        return torch.cat([tokens[i][0] for i in wanted])

    def _checked(
        self, grid: tuple[int, ...] | None, context: Tensor, *given: tuple[Tensor, Packing | None]
    ) -> tuple[int, ...]:
        """The grid of ids that are checked where no table of positions is: `assemble_tokens` reads those of a table."""
        if self.rope is None:
            if grid is not None:
                fail("Predictor", "grid", "be None without rope", grid, "the table of positions has one grid")
            return self.grid
        grid = self.grid if grid is None else tuple(grid)
        if len(grid) != 3:
            fail("Predictor", "grid", "be (Gt, Gh, Gw) with rope", grid, "pass the encoder's grid_of(pixels)")
        count = grid[0] * grid[1] * grid[2]
        for name, (ids, packing) in zip(("context_ids", "target_ids"), given, strict=True):
            check_tensor("Predictor", name, ids, "S K" if packing is None else "T", dtypes=INT64, device=context.device)
            shape = context.shape[:-1] if name == "context_ids" else ids.shape if packing is None else (packing.tokens,)
            if ids.shape != shape:
                fail("Predictor", name, f"have shape {tuple(shape)}", tuple(ids.shape), "pass the id of every token")
            if not ids.is_contiguous():
                fail("Predictor", name, "be contiguous", f"strides {ids.stride()}", "call .contiguous()")
            check_ids("Predictor", ids, count, None if packing is None else packing.cu_seqlens, name)
        return grid

    def _ropes(
        self, context_ids: Tensor, target_ids: Tensor, pairs: Pairs | None, grid: tuple[int, ...]
    ) -> tuple[Rope | None, Rope | None]:
        """Of the sequences, and of their target rows as queries to the whole sequences."""
        if self.rope is None:
            return None, None
        if pairs is None:
            context_ids = context_ids.repeat(target_ids.shape[0] // max(context_ids.shape[0], 1), 1)
            ids = torch.cat([context_ids, target_ids], 1)
        else:
            ids = torch.cat([context_ids, target_ids]).index_select(0, pairs.source)
        shape = cast(tuple[int, int, int], grid)
        positions, targets = (
            patch_positions(x, shape, pretrained_grid=self.pretrained_grid) for x in (ids, target_ids)
        )
        options = dict(pairing=self.rope, **rounding(self.rope_precision, self.head_dim, ids.device))
        return Rope(positions, **options), Rope(targets, positions, **options)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, E] at rising rows; the backward writes each row of its gradient once."""
    return jk.gather_tokens(x[None], rows[None])[0]
