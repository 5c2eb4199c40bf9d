"""What a training step computes, by formulas, from lengths that are on the host: no device is waited for.

A product of [m, k] and [k, n] counts 2 m k n. What is trained counts three times, once forward and twice backward;
twice where nobody asks for one gradient, of pixels, actions or SIGReg's directions; frozen networks and the target
encoder once. Attention counts 4 P D forward, P the pairs of a query and a key of one sequence (`Packing.pairs`), D the
width of all heads, and 8 P D backward: what kernels compute again there is no work of the model. Norms, activations,
losses and the optimiser are left out, which torch.utils.flop_counter does not count either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from jepa_kernels.masks import MaskBatch
from jepa_kernels.models.lejepa import LeJEPA
from jepa_kernels.models.lewm import LeWorldModel
from jepa_kernels.models.vl_jepa import VLJEPA, Texts

PREDICTOR_RATIO = 4.0  # of I-JEPA's and V-JEPA 2's: the MLP's width over the block's


@dataclass(frozen=True)
class Work:
    """tokens: that go into the trained encoder and the predictor, without padding. flops: of all networks."""

    tokens: int
    flops: float


def blocks(tokens: float, pairs: float, dim: int, depth: int, mlp_ratio: float) -> float:
    """Forward pass of `depth` blocks: qkv, projection and MLP per token, scores and weighted sums per pair."""
    return depth * (2 * tokens * dim * dim * (4 + 2 * mlp_ratio) + 4 * pairs * dim)


def jepa(model: Any, pixels: Tensor, masks: MaskBatch) -> Work:
    """I-JEPA's step, or V-JEPA 2's."""
    return jepa_step(model.config, model.predictor.grid, masks)


def jepa_step(config: Any, grid: tuple[int, ...], masks: MaskBatch) -> Work:
    """The target encoder of every patch; context encoder and predictor of those that the masks keep.

    The predictor's sequences are [context | target]. Its last block computes the targets alone, unless all places are
    predicted; with rotary positions the first product of all copies of a token is computed once.
    """
    c, p, width = config, config.predictor_embed_dim, config.embed_dim
    patches = int(np.prod(grid))
    context, target = masks.context_lengths, masks.target_lengths
    own = np.tile(context, len(target) // len(context))  # the context of each target
    both, levels = own + target, getattr(c, "levels", None) or 1
    embed = 2 * c.in_chans * getattr(c, "tubelet_size", 1) * c.patch_size**2 * width  # of one patch
    frozen = masks.batch * (patches * embed + blocks(patches, patches**2, width, c.depth, c.mlp_ratio))
    trained = blocks(context.sum(), (context**2).sum(), width, c.depth, c.mlp_ratio)
    everywhere = getattr(c, "predict_all", False)
    trained += blocks(both.sum(), (both**2).sum(), p, c.predictor_depth - 1 + everywhere, PREDICTOR_RATIO)
    if not everywhere:
        trained += 4 * both.sum() * p * p + 4 * (target * both).sum() * p  # keys, values; scores of targets
        trained += 2 * target.sum() * p * p * (2 + 2 * PREDICTOR_RATIO)
    if hasattr(c, "rope") and c.predictor_depth + everywhere > 1:
        trained -= 6 * p * p * (both.sum() - context.sum() - 1)
    trained += 2 * context.sum() * width * (p if levels == 1 else levels * width + p)
    out = getattr(c, "teacher_embed_dim", None) or levels * width
    trained += 2 * (both.sum() if everywhere else target.sum()) * p * out
    return Work(int(context.sum() + both.sum()), float(frozen + 2 * context.sum() * embed + 3 * trained))


def lewm(model: LeWorldModel, frames: Tensor, actions: Tensor) -> Work:
    """Every frame through the encoder, whose last block computes the class token alone; the predictor once for the
    history, and once for each step rolled out after it."""
    c, images, width = model.config, frames.shape[:2].numel(), model.config.embed_dim
    patches = (c.crop_size // c.patch_size) ** 2
    tokens = images * (1 + patches)
    embed = 2 * images * patches * c.in_chans * c.patch_size**2 * width
    trained = blocks(tokens, tokens * (1 + patches), width, c.depth - 1, c.mlp_ratio)
    trained += 4 * tokens * width * width + 4 * tokens * width + 2 * images * width * width * (2 + 2 * c.mlp_ratio)
    rolled = max(0, frames.shape[1] - 1 - c.history)
    seen = min(c.history, frames.shape[1] - 1)
    rows = len(frames) * (seen + rolled * c.history)  # of the predictor
    inner = c.predictor_num_heads * c.predictor_head_dim
    block = 2 * width * (4 * inner + 2 * c.predictor_hidden + 6 * width)  # of a row: attention, MLP, modulation
    trained += c.predictor_depth * rows * (block + 4 * seen * inner)
    projected = images + len(frames) * (seen + rolled)
    trained += projected * 4 * width * c.projector_hidden
    sigreg = 2 * images * width * model.sigreg.num_slices
    taken = actions.shape[:2].numel()
    trained += 2 * taken * 4 * width * (c.action_hidden + width)
    if model.inverse is not None:
        trained += 2 * taken * c.inverse_hidden * (2 * width + c.action_dim)
    first = 2 * taken * c.action_dim * c.action_hidden
    return Work(tokens + rows, float(2 * (embed + first + sigreg) + 3 * trained))


def lejepa(model: LeJEPA, views: Tensor, local: Tensor) -> Work:
    """Views of both sizes [B, V, C, H, W] through the encoder; the projector of each; SIGReg's projections."""
    return lejepa_step(model.config, [(v.shape[:2].numel(), v.shape[-1]) for v in (views, local) if v.numel()])


def lejepa_step(config: Any, views: Iterable[tuple[int, int]]) -> Work:
    """views: (how many, pixels per side)."""
    c, sizes = config, [(n, (side // config.patch_size) ** 2) for n, side in views]
    tokens, pairs, rows = (sum(n * p**power for n, p in sizes) for power in (1, 2, 0))
    embed = 2 * tokens * 3 * c.patch_size**2 * c.embed_dim
    projector = 2 * rows * (c.embed_dim * c.proj_hidden + c.proj_hidden**2 + c.proj_hidden * c.proj_dim)
    sigreg = 2 * rows * c.proj_dim * c.slices
    trained = blocks(tokens, pairs, c.embed_dim, c.depth, c.mlp_ratio) + projector
    return Work(tokens, float(2 * (embed + sigreg) + 3 * trained))


def vl_jepa(model: VLJEPA, pixels: Tensor, texts: Texts) -> Work:
    """The predictor of what is seen and asked; the text encoder of each answer once; frozen features of colors."""
    c, count = model.config, len(pixels)
    seen = model.vision.positions.shape[1]  # type: ignore[union-attr, index]
    lengths = np.array(texts.question_packing.lengths) + seen
    tokens, answers = int(lengths.sum()), texts.answer_packing
    keys = c.embed_dim // c.num_heads * c.num_kv_heads
    row = 4 * c.embed_dim * (c.embed_dim + keys) + 6 * c.embed_dim * c.hidden
    trained: float = c.depth * (tokens * row + 4 * int((lengths**2).sum()) * c.embed_dim)
    trained += 2 * count * (c.embed_dim * c.out_dim + count * c.out_dim)
    text: Any = model.text.model.config  # type: ignore[union-attr]
    ratio = text.intermediate_size / text.hidden_size
    said = blocks(answers.tokens, answers.pairs, text.hidden_size, text.num_hidden_layers, ratio)
    frozen = 2 * pixels.shape[0] * pixels.shape[2:].numel() * 3 * model.vision.positions.shape[2]  # type: ignore
    first = 2 * count * seen * c.vision_embed_dim * c.embed_dim
    answer = 2 * answers.sequences * c.text_embed_dim * c.out_dim  # their projection
    if c.text_scale:
        trained, said = trained + said + answer, 0.0
    else:
        first += answer
    return Work(tokens, float(frozen + said + 2 * first + 3 * trained))
