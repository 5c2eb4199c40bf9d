"""The table of tiles of Triton's `masked_attention`, by head dim and dtype: lengths choose a kernel, never a tile."""

from typing import Any, NamedTuple, TypeVar

import torch
import triton

from jepa_kernels._core.triton import capability

Entry = TypeVar("Entry")


class Tile(NamedTuple):
    """Rows that a program holds, columns that pass it at a time, warps, loads under way."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None  # a thread may use no more, so that a second program fits beside

    @property
    def options(self) -> dict[str, int | None]:
        """For the compiler."""
        return dict(num_warps=self.warps, num_stages=self.stages, maxnreg=self.registers)


# Sequences of more than SHORT queries or keys, by the largest D that an entry serves.
FORWARD = {
    32: Tile(64, 64, 4, 3),
    64: Tile(128, 64, 8, 3, 128),
    96: Tile(128, 128, 8, 2),
    120: Tile(128, 64, 8, 2),
    128: Tile(128, 128, 8, 2),
}
BACKWARD_Q = {32: Tile(64, 64, 4, 2, 168), 64: Tile(64, 64, 4, 3, 168), 128: Tile(128, 64, 8, 2)}
BACKWARD_KV = {
    32: Tile(64, 64, 4, 2, 168),
    64: Tile(64, 64, 4, 2),
    80: Tile(128, 32, 8, 2),
    96: Tile(128, 64, 8, 2),
    128: Tile(128, 32, 8, 3),
}
ELSEWHERE = {128: Tile(64, 32, 4, 2)}  # GPUs other than Hopper: less shared or tensor memory
# fp32 multiplies on the plain units, from registers.
FP32 = {32: Tile(64, 32, 8, 1), 64: Tile(64, 16, 8, 1), 128: Tile(64, 16, 8, 1)}

SHORT = {80: 256, 128: -1}  # on Hopper, in 16 bits: what fits beside the sums of a tile of queries
SHORT_FORWARD = Tile(64, 256, 4, 2)
SHORT_BACKWARD = {32: Tile(64, 128, 4, 2), 128: Tile(64, 128, 8, 2)}
# Beyond its columns the kernels that stream take turns in one program, of its warps.
SHORT_BACKWARD_Q = {32: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2)}
SHORT_BACKWARD_KV = {32: Tile(64, 64, 4, 2), 128: Tile(128, 32, 8, 2)}
# Blocks of keys of SHORT_FORWARD: the first entry that holds them.
KEYS = ((64,), (64, 32), (128,), (128, 32), (128, 64), (256,))


def by_width(table: dict[int, Entry], width: int) -> Entry:
    """The entry that serves heads of `width` channels."""
    return next(entry for largest, entry in table.items() if width <= largest)


def on_hopper() -> bool:
    """Whether launches go to a GPU with wgmma and 227 KB of shared memory a block."""
    return capability() // 10 == 9


def tile_for(table: dict[int, Tile], x: torch.Tensor) -> Tile:
    """The tile of a kernel that streams."""
    if x.dtype == torch.float32:
        table = FP32
    elif not on_hopper():
        table = ELSEWHERE
    return by_width(table, x.shape[-1])


def longest_short(x: torch.Tensor) -> int:
    """Queries and keys up to which a sequence stays on chip; -1: none does."""
    return -1 if x.dtype == torch.float32 or not on_hopper() else by_width(SHORT, x.shape[-1])


def blocks_up_to(longest: int) -> dict[str, Any]:
    """Blocks of keys that sequences of up to `longest` keys may need: leaving out the others changes no bits."""
    needed = KEYS[: sum(sum(row) < longest for row in KEYS) + 1]
    return dict(CLASSES=needed, LIMITS=tuple(sum(row) for row in needed))


def parts(x: torch.Tensor, half: bool) -> tuple[int, ...]:
    """Powers of two, 16 or more, that hold the channels of x: two where they hold fewer in vain than one."""
    width = x.shape[-1]
    whole = max(triton.next_power_of_2(width), 16)
    if half:  # a half turn pairs channels far apart
        return (whole,)
    if x.dtype == torch.float32 and width > 32:  # the chains in which products are summed
        return (32,) * ((width - 1) // 32) + (max(triton.next_power_of_2((width - 1) % 32 + 1), 16),)
    rest = max(triton.next_power_of_2(width - whole // 2), 16)
    return (whole,) if rest >= whole // 2 else (whole // 2, rest)
