"""Triton `assemble_tokens`: a program writes a few rows, each found in the packing by bisection.

Backward: one launch sums contexts and blocks of target rows, side by side; a second adds the blocks in order, so that
no bit depends on which program runs first. Lengths are run-time values: other masks run the same code.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels._core.triton_rows import run_of

MAX_BLOCK = 1024  # channels of a program
TILE_BYTES = 8192  # of a program's rows, at least one row
PART = 128  # rows of an axis whose targets are summed by themselves
SUM_ROWS, SUM_BLOCK = 32, 64  # parts added at once, and channels
# Arguments that kernels aren't compiled for.
NUMBERS = ["rows", "sequences", "steps", "contexts", "context_steps", "context_programs", "context_rows", "length",
           "kept", "targets", "groups", "per_token", "count"]  # fmt: skip
LISTS = ["context_ids", "target_ids", "context_cu", "target_cu", "cu_seqlens"]  # nor for where these begin


@triton.jit
def _place_of(row, cu_seqlens, sequences, steps, length):
    """Each row's sequence, place in it, and whether it is in one. length: of each, where there is no packing."""
    s = run_of(row, cu_seqlens, sequences, length, steps)
    inside = s < sequences
    if cu_seqlens is None:
        start = s * length
    else:
        start = tl.load(cu_seqlens + s, mask=inside, other=0)
    return s, row - start, inside


@triton.jit
def _span_of(s, cu_seqlens, length, there):
    """The first row of sequence s, and how many it has."""
    if cu_seqlens is None:
        start = s * length
        count = s * 0 + length
    else:
        start = tl.load(cu_seqlens + s, mask=there, other=0)
        count = tl.load(cu_seqlens + s + 1, mask=there, other=0) - start
    return start, count


@triton.jit
def _at(x, s, place, row, sequence_stride, row_stride, cu_seqlens):
    """The address of each row: (s, place) of a rectangle, or a row of the packed axis."""
    if cu_seqlens is None:
        address = x + s.to(tl.int64) * sequence_stride + place.to(tl.int64) * row_stride
    else:
        address = x + row.to(tl.int64) * row_stride
    return address


@triton.jit
def _read(address, c, stride, there, channels):
    """[rows, channels] in fp32; 0 where a row is not there."""
    mask = there[:, None] & (c < channels)[None, :]
    return tl.load(address[:, None] + (c.to(tl.int64) * stride)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _assemble_tokens_forward_kernel(
    context, mask_token, context_ids, target_ids, pos_embed, context_cu, target_cu, cu_seqlens, out,
    rows, sequences, steps, contexts, length, kept, context_rows, targets, per_token, count, channels,
    context_sequence, context_row, context_channel, token_row, token_channel, pos_row, pos_channel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s, place, inside = _place_of(row, cu_seqlens, sequences, steps, length)
    own = s % tl.maximum(contexts, 1)
    source, own_length = _span_of(own, context_cu, kept, inside)
    source += place
    behind = place - own_length
    from_context = inside & (behind < 0) & (source < context_rows)
    from_token = inside & (behind >= 0)
    x = _read(_at(context, own, place, source, context_sequence, context_row, context_cu), c, context_channel,
              from_context, channels)  # fmt: skip
    token = mask_token + (s // per_token).to(tl.int64) * token_row
    x += _read(token, c, token_channel, from_token, channels)
    if pos_embed is not None:
        target = _span_of(s, target_cu, length - kept, inside)[0] + behind
        there = from_token & (target < targets)
        id = tl.load(context_ids + source, mask=from_context, other=-1)
        id = tl.where(from_context, id, tl.load(target_ids + target, mask=there, other=-1))
        known = (id >= 0) & (id < count)
        x += _read(pos_embed + id * pos_row, c, pos_channel, known, channels)
    place_out = out + row.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(place_out, x.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (c < channels)[None, :])


@triton.jit
def _sum_contexts(
    program, grad, context_cu, cu_seqlens, dcontext, sequences, contexts, context_steps, length, kept, context_rows,
    channels, grad_sequence, grad_row, grad_channel, c, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the context's gradient: the sums over the sequences that hold them, in order."""
    row = program * ROWS + tl.arange(0, ROWS)
    own, place, inside = _place_of(row, context_cu, contexts, context_steps, kept)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for mask in range(sequences // tl.maximum(contexts, 1)):
        s = own + mask * contexts
        start, count = _span_of(s, cu_seqlens, length, inside)
        address = _at(grad, s, place, start + place, grad_sequence, grad_row, cu_seqlens)
        total += _read(address, c, grad_channel, inside & (place < count), channels)
    place_out = dcontext + row.to(tl.int64)[:, None] * channels + c[None, :]
    mask = (row < context_rows)[:, None] & (c < channels)[None, :]
    tl.store(place_out, total.to(dcontext.dtype.element_ty), mask=mask)


@triton.jit
def _group_rows(group, cu_seqlens, per_token, length):
    """The rows of the sequences that share a mask token, as a range."""
    begin = group * per_token
    behind = begin + per_token
    if cu_seqlens is None:
        begin *= length
        behind *= length
    else:
        begin = tl.load(cu_seqlens + begin)
        behind = tl.load(cu_seqlens + behind)
    return begin, behind


@triton.jit
def _sum_part(
    part, grad, context_cu, cu_seqlens, parts, sequences, steps, contexts, length, kept, groups, per_token, channels,
    grad_sequence, grad_row, grad_channel, c, ROWS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The sum of the targets among PART rows of one mask token's sequences."""
    first, end, begun = 0, 0, 0
    for group in range(groups):
        begin, behind = _group_rows(group, cu_seqlens, per_token, length)
        here = (part >= begun) & (part < begun + tl.cdiv(behind - begin, PART))
        first = tl.where(here, begin + (part - begun) * PART, first)
        end = tl.where(here, tl.minimum(begin + (part - begun + 1) * PART, behind), end)
        begun += tl.cdiv(behind - begin, PART)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    first_sequence = _place_of(first, cu_seqlens, sequences, steps, length)[0]
    last_sequence = _place_of(tl.maximum(end, 1) - 1, cu_seqlens, sequences, steps, length)[0]
    for s in range(first_sequence, tl.minimum(last_sequence + 1, sequences)):
        begin, count = _span_of(s, cu_seqlens, length, True)
        behind = tl.minimum(begin + count, end)
        targets = tl.maximum(begin + _span_of(s % contexts, context_cu, kept, True)[1], first)
        for start in range(targets, behind, ROWS):
            row = start + tl.arange(0, ROWS)
            address = _at(grad, row * 0 + s, row - begin, row, grad_sequence, grad_row, cu_seqlens)
            total += _read(address, c, grad_channel, row < behind, channels)
    tl.store(parts + part.to(tl.int64) * channels + c, tl.sum(total, 0), mask=c < channels)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _assemble_tokens_backward_kernel(
    grad, context_cu, cu_seqlens, dcontext, parts,
    context_programs, sequences, steps, contexts, context_steps, length, kept, context_rows, groups, per_token,
    channels, grad_sequence, grad_row, grad_channel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if program < context_programs:
        _sum_contexts(program, grad, context_cu, cu_seqlens, dcontext, sequences, contexts, context_steps, length, kept,
                      context_rows, channels, grad_sequence, grad_row, grad_channel, c, ROWS, BLOCK)  # fmt: skip
    else:
        _sum_part(program - context_programs, grad, context_cu, cu_seqlens, parts, sequences, steps, contexts, length,
                  kept, groups, per_token, channels, grad_sequence, grad_row, grad_channel, c, ROWS, BLOCK,
                  PART)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _assemble_tokens_sum_kernel(
    parts, cu_seqlens, dmask_token, per_token, length, channels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = 0
    for before in range(group):
        begin, behind = _group_rows(before, cu_seqlens, per_token, length)
        first += tl.cdiv(behind - begin, PART)
    begin, behind = _group_rows(group, cu_seqlens, per_token, length)
    end = first + tl.cdiv(behind - begin, PART)
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for start in range(first, end, ROWS):
        part = start + tl.arange(0, ROWS)
        mask = (part < end)[:, None] & (c < channels)[None, :]
        total += tl.load(parts + part.to(tl.int64)[:, None] * channels + c[None, :], mask=mask, other=0.0).to(
            tl.float64
        )
    tl.store(dmask_token + group * channels + c, tl.sum(total, 0).to(tl.float32), mask=c < channels)


def _tile(channels: int, size: int) -> dict[str, Any]:
    """Rows and channels of a program."""
    block = min(triton.next_power_of_2(max(channels, 1)), MAX_BLOCK)
    rows = max(TILE_BYTES // (block * size), 1)
    return dict(ROWS=rows, BLOCK=block, num_warps=4)


def _sequences(cu_seqlens: Tensor | None, x: int) -> int:
    return x if cu_seqlens is None else cu_seqlens.shape[0] - 1


def forward(
    context: Tensor,
    mask_token: Tensor,
    context_ids: Tensor | None,
    target_ids: Tensor | None,
    pos_embed: Tensor | None,
    context_cu: Tensor | None,
    target_cu: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: list[int],
) -> Tensor:
    """The sequences, each row written once."""
    channels = context.shape[-1]
    out = context.new_empty(*rows, channels)
    if out.numel() == 0:
        return out
    sequences, contexts = _sequences(cu_seqlens, rows[0]), _sequences(context_cu, context.shape[0])
    total, tile = out.shape[:-1].numel(), _tile(channels, out.element_size())
    grid = (triton.cdiv(total, tile["ROWS"]), triton.cdiv(channels, tile["BLOCK"]))
    with device_of(context):
        _assemble_tokens_forward_kernel[grid](
            context, mask_token, context_ids, target_ids, pos_embed, context_cu, target_cu, cu_seqlens, out,
            total, sequences, sequences.bit_length(), contexts, rows[-1], context.shape[-2],
            context.shape[:-1].numel(), 0 if target_ids is None else target_ids.numel(),
            max(sequences // mask_token.shape[0], 1), 0 if pos_embed is None else pos_embed.shape[0], channels,
            context.stride(0), context.stride(-2), context.stride(-1), *mask_token.stride(),
            *((0, 0) if pos_embed is None else pos_embed.stride()), **tile,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    context_rows: list[int],
    context_cu: Tensor | None,
    cu_seqlens: Tensor | None,
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of the context and, in fp32, of the mask tokens; empty where they are not wanted."""
    channels = grad.shape[-1]
    dcontext = grad.new_empty((*context_rows, channels) if wanted[0] else 0)
    dmask_token = grad.new_empty((groups, channels) if wanted[1] else 0, dtype=torch.float32)
    sequences, contexts = _sequences(cu_seqlens, grad.shape[0]), _sequences(context_cu, context_rows[0])
    tile, per_token, length = _tile(channels, grad.element_size()), sequences // groups, grad.shape[-2]
    rows = dcontext.shape[:-1].numel()
    programs = triton.cdiv(rows, tile["ROWS"]) if wanted[0] else 0
    parts = triton.cdiv(grad.shape[:-1].numel(), PART) + groups if wanted[1] else 0
    sums = grad.new_empty((parts, channels), dtype=torch.float32)
    if channels == 0:
        return dcontext, dmask_token
    with device_of(grad):
        if programs + parts:
            _assemble_tokens_backward_kernel[(programs + parts, triton.cdiv(channels, tile["BLOCK"]))](
                grad, context_cu, cu_seqlens, dcontext, sums, programs, sequences, sequences.bit_length(), contexts,
                contexts.bit_length(), length, context_rows[-1], rows, groups, per_token, channels,
                grad.stride(0), grad.stride(-2), grad.stride(-1), PART=PART, **tile,
            )  # fmt: skip
        if wanted[1]:
            _assemble_tokens_sum_kernel[(groups, triton.cdiv(channels, SUM_BLOCK))](
                sums, cu_seqlens, dmask_token, per_token, length, channels,
                ROWS=SUM_ROWS, BLOCK=SUM_BLOCK, PART=PART, num_warps=4,
            )  # fmt: skip
    return dcontext, dmask_token
