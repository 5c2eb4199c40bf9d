"""Triton `rope`: one launch reads queries and keys once and writes them turned.

A program takes some tokens through all heads, or a share of them where tokens are few: a token's cosines and sines are
read once. Numbers of tokens and heads are run-time values.
"""

import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of

THREADS = 128
TILE = 1024  # elements of a head's rows at a time: 16 bytes a thread in 16 bits
PROGRAMS = 2048  # in all, at least, where there are heads to share out
NUMBERS = [
    *(f"{x}_{what}" for x in "qk" for what in ("skip", "token", "head", "channel", "tokens", "heads")),
    *("turns_skip", "k_turns_skip", "batch", "blocks", "shares"),
]


@triton.jit
def _partner(x, c, TURNING: tl.constexpr, HALF: tl.constexpr):
    """x[partner of c]: the neighbour c ^ 1, or half of the TURNING channels further."""
    if HALF:
        there = tl.where(c < TURNING, (c + TURNING // 2) % TURNING, c)
        partner = tl.gather(x, tl.broadcast_to(there[None, :], x.shape), 1)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        partner = tl.reshape(tl.join(odd, even), x.shape)
    return partner


@triton.jit
def _turns_of(
    turns, skip, b, t, there, c, HALF: tl.constexpr, BACK: tl.constexpr, TURNING: tl.constexpr
):  # fmt: skip
    """Cosines and signed sines of tokens t of batch entries b, 0 past the TURNING channels."""
    at = turns + (b * skip + t * (2 * TURNING))[:, None] + c[None, :]
    mask = there[:, None] & (c < TURNING)[None, :]
    cos = tl.load(at, mask=mask, other=0.0)
    sin = tl.load(at + TURNING, mask=mask, other=0.0)
    if BACK:  # the transpose takes the sine of the partner
        sin = _partner(sin, c, TURNING, HALF)
    return cos, sin


@triton.jit
def _turn_heads(
    x, y, skip, token, head_stride, channel, heads, row, b, t, there, c, cos, sin, share, shares,
    HALF: tl.constexpr, TURNING: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The share-th part of the heads of some rows. Strides count UNIT elements."""
    mask = there[:, None] & (c < D)[None, :]
    if UNIT == 1:
        x += (b * skip + t * token)[:, None] + (c * channel.to(tl.int64))[None, :]
    else:  # 16 bytes a thread: the compiler sees that rows start at multiples of UNIT
        x += ((b * skip + t * token) * UNIT)[:, None] + c[None, :]
    y += (row * heads * D)[:, None] + c[None, :]
    for head in range(heads * share // shares, heads * (share + 1) // shares):
        value = tl.load(x + head_stride.to(tl.int64) * (UNIT * head), mask=mask, other=0.0)
        wide = value.to(tl.float32)
        turned = tl.fma(wide, cos, _partner(wide, c, TURNING, HALF) * sin)
        tl.store(y + head * D, tl.where((c < TURNING)[None, :], turned.to(value.dtype), value), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def _rope_kernel(
    q, k, q_out, k_out, turns, k_turns, q_skip, q_token, q_head, q_channel, q_tokens, q_heads, turns_skip,
    k_skip, k_token, k_head, k_channel, k_tokens, k_heads, k_turns_skip, batch, blocks, shares,
    TOGETHER: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, TURNING: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program: of queries, and of keys if TOGETHER; else the programs from `blocks` on take keys."""
    block = tl.program_id(0)
    share = tl.program_id(1)
    c = tl.arange(0, COLUMNS)
    if block < blocks:
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        b = row // q_tokens
        t = row % q_tokens
        there = b < batch
        cos, sin = _turns_of(turns, turns_skip, b, t, there, c, HALF, BACK, TURNING)
        _turn_heads(
            q, q_out, q_skip, q_token, q_head, q_channel, q_heads, row, b, t, there, c, cos, sin, share, shares,
            HALF, TURNING, D, UNIT,
        )  # fmt: skip
        if TOGETHER:
            _turn_heads(
                k, k_out, k_skip, k_token, k_head, k_channel, k_heads, row, b, t, there, c, cos, sin, share, shares,
                HALF, TURNING, D, UNIT,
            )  # fmt: skip
    elif k is not None and not TOGETHER:
        row = (block - blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        b = row // k_tokens
        t = row % k_tokens
        there = b < batch
        cos, sin = _turns_of(k_turns, k_turns_skip, b, t, there, c, HALF, BACK, TURNING)
        _turn_heads(
            k, k_out, k_skip, k_token, k_head, k_channel, k_heads, row, b, t, there, c, cos, sin, share, shares,
            HALF, TURNING, D, UNIT,
        )  # fmt: skip


def forward(q: Tensor, k: Tensor | None, turns: Tensor, k_turns: Tensor | None, half: bool) -> tuple[Tensor, Tensor]:
    """Turned q and k, contiguous."""
    return _run(q, k, turns, k_turns, half, False)


def backward(
    grad: Tensor, k_grad: Tensor | None, turns: Tensor, k_turns: Tensor | None, half: bool
) -> tuple[Tensor, Tensor]:
    """Gradients turned by the transpose."""
    return _run(grad, k_grad, turns, k_turns, half, True)


def _run(
    q: Tensor, k: Tensor | None, turns: Tensor, k_turns: Tensor | None, half: bool, back: bool
) -> tuple[Tensor, Tensor]:
    out, k_out = q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)
    width = q.shape[-1]
    columns = triton.next_power_of_2(width)
    rows = max(TILE // columns, 1)
    together = k is not None and k_turns is not None and _same(turns, k_turns)
    blocks, k_blocks = (0 if x is None else triton.cdiv(x.shape[:-2].numel(), rows) for x in (q, k))
    programs = blocks if together else blocks + k_blocks
    heads = max(q.shape[-2], 0 if k is None else k.shape[-2])
    if programs == 0 or heads == 0:
        return out, k_out
    unit = min(_unit(q), _unit(q if k is None else k))
    shares = min(heads, triton.cdiv(PROGRAMS, programs))
    with device_of(q):
        _rope_kernel[(programs, shares)](
            q, k, out, k_out, turns, k_turns, *_numbers(q, turns, unit), *_numbers(k, k_turns, unit),
            q.shape[0] if q.dim() == 4 else 1, blocks, shares,
            TOGETHER=together, HALF=half, BACK=back, TURNING=turns.shape[-1], D=width, UNIT=unit, ROWS=rows,
            COLUMNS=columns, num_warps=THREADS // 32,
        )  # fmt: skip
    return out, k_out


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether queries and keys turn by one table."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _unit(x: Tensor) -> int:
    """Elements in 16 bytes, where every head of x begins at a multiple of them; else 1."""
    unit = 16 // x.element_size()
    whole = x.stride(-1) == 1 and not any(s % unit for s in x.stride()[:-1]) and x.shape[-1] % unit == 0
    return unit if whole and x.data_ptr() % 16 == 0 else 1


def _numbers(x: Tensor | None, turns: Tensor | None, unit: int) -> tuple[int, ...]:
    """Strides of batch, token, head and channel, tokens, heads, and the table's stride of the batch."""
    if x is None or turns is None:
        return (0,) * 7
    batch, turns_batch = (x.stride(0), turns.stride(0)) if x.dim() == 4 else (0, 0)
    strides = (s // unit for s in (batch, x.stride(-3), x.stride(-2)))
    return (*strides, x.stride(-1), x.shape[-3], x.shape[-2], turns_batch)
