"""masked_attention's Triton kernels for an H100 or H200, over head dims: the table in its README is what they use."""

import re
from pathlib import Path

import pytest
import torch

from jepa_kernels.ops.masked_attention import triton as launches
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


@pytest.mark.parametrize("stage", ["forward", "backward_q", "backward_kv"])
def test_fp32_products_are_summed_from_zero(target, stage):
    """Where a product goes on from what it is added to, sums run in one long chain, which loses more."""
    target.reset(90)
    attention(torch.float32, 80, (40, 20))()
    for kernel in getattr(launches, f"_masked_attention_{stage}_kernel").device_caches[90][0].values():
        code = kernel.asm["ttir"]
        zeros = re.findall(r"(%\w+) = arith.constant dense<0.0+e\+00>", code)
        starts = re.findall(r"tt.dot %\w+, %\w+, (%\w+) : tensor<\w+xf32>", code)
        assert set(starts) <= set(zeros), f"go on from {set(starts) - set(zeros)}"
