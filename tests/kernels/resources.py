"""What masked_attention's Triton kernels use of an H100: `python -m tests.kernels.resources` writes the table."""

from pathlib import Path
from typing import NamedTuple

import torch

from tests.kernels.expected import attention
from tests.kernels.target import REGISTERS, SHARED_BYTES, Binary, Target

WIDTHS = (16, 24, 32, 64, 80, 88, 96, 104, 128)
MARKS = ("<!-- resources -->", "<!-- /resources -->")
THREADS = 2048  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each block costs beside its own


class Row(NamedTuple):
    """One kernel, compiled for heads of `width` channels in bf16."""

    width: int
    binary: Binary
    threads: int  # of a block

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        registers = -(-self.binary.registers // 8) * 8 * self.threads
        return min(REGISTERS // registers, SHARED_BYTES[90] // (self.binary.shared + RESERVED), THREADS // self.threads)

    @property
    def wanted(self) -> int:
        """Blocks that must fit: two where the sums are small enough."""
        short = "short" in self.binary.name
        return 2 if (short and "forward" in self.binary.name) or (not short and self.width <= 64) else 1


def measure(target: Target) -> list[Row]:
    """Every kernel at every head dim: sequences of 300 tokens stream, those of 20 stay on chip."""
    rows = []
    for width in WIDTHS:
        target.reset(90)
        attention(torch.bfloat16, width, (300, 20))()
        rows += [Row(width, binary, target.threads[binary.name]) for binary in target.binaries]
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| kernel | D | registers | warps | shared memory, KB | blocks at a time |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row.binary.name, row.width)):
        name = row.binary.name.removeprefix("_masked_attention_").removesuffix("_kernel")
        shared = f"{row.binary.shared / 1024:.0f}"
        lines.append(
            f"| {name} | {row.width} | {row.binary.registers} | {row.threads // 32} | {shared} | {row.blocks} |"
        )
    return "\n".join(lines)


def main() -> None:
    from triton.runtime import driver

    from jepa_kernels._core import select
    from tests.kernels.test_attention import README

    driver.set_active(Target())
    select._availability["triton", "cpu"] = None
    rows = table(measure(driver.active))
    before, rest = README.read_text().split(MARKS[0])
    Path(README).write_text(f"{before}{MARKS[0]}\n\n{rows}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
