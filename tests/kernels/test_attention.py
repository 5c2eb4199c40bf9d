"""masked_attention's Triton kernels for an H100 or H200, over head dims: the table in its README is what they use."""

from pathlib import Path

import pytest
import torch

from tests.kernels.expected import attention, long_attention, short_attention
from tests.kernels.resources import MARKS, WIDTHS, measure, table
from tests.kernels.target import REGISTERS, SHARED_BYTES

pytestmark = pytest.mark.compile
README = Path(__file__).parents[2] / "jepa_kernels" / "ops" / "masked_attention" / "README.md"


@pytest.fixture(scope="module")
def rows(target):
    return measure(target)


def test_lengths_of_both_kinds_take_the_launches_of_both(target):
    target.reset(90)
    make = attention(torch.bfloat16, 40, (300, 20))
    make()
    (f_short, b_short), (f, *b) = short_attention(), long_attention()
    assert target.launches == [f_short, f, b_short, *b]
    target.reset(90)
    attention(torch.bfloat16, 40, (256, 20))()
    assert target.launches == [f_short, b_short], "at most two launches where nothing is longer than 256"


@pytest.mark.parametrize("width", WIDTHS)
def test_no_spills_wide_loads_and_tensor_cores(rows, width):
    of_width = [row for row in rows if row.width == width]
    assert {row.binary.name for row in of_width} == set(long_attention() + (short_attention() if width <= 80 else ()))
    for row in of_width:
        binary = row.binary
        assert binary.stack == 0 and not binary.count(r"(LDL|STL).*"), f"spills: {binary}"
        assert binary.shared <= SHARED_BYTES[90]
        assert binary.count(r"HGMMA.*") and not binary.count(r"HMMA.*"), binary.instructions
        assert binary.count(r"LDG(STS)?\.E.*\.128"), binary.instructions
        assert row.blocks >= row.wanted and row.wanted * row.threads * binary.registers <= REGISTERS


def test_the_table_in_the_readme_is_up_to_date(rows):
    written = README.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert written.strip() == table(rows).strip(), "write it again: python -m tests.kernels.resources"


def test_lengths_that_change_compile_nothing_new(target):
    target.reset(90)
    for lengths in ((33, 17), (16, 48), (1, 1), (64, 64, 0), (50,) * 3):
        attention(torch.bfloat16, 48, lengths)()
    names = [binary.name for binary in target.binaries]
    assert sorted(names) == sorted(short_attention()), f"compiled again: {names}"
