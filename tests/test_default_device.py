"""torch's default device, as `torch.set_default_device` chooses it, is no business of kernels and of their tables.

"meta" stands in for a GPU: what is made there by mistake has no memory that a kernel could read.
"""

import pytest
import torch

from jepa_kernels import Packing, chunks
from jepa_kernels.ops import OPS
from jepa_kernels.testing import cast, op_module, public, run


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_runs_where_its_tensors_are(op):
    case = op_module(op, "cases").CASES[0]
    first, second = (cast(case.make(torch.Generator().manual_seed(0)), torch.float32, "cpu") for _ in range(2))
    expected = run(public(op, "cpu"), first, case)
    with torch.device("meta"):
        found = run(public(op, "cpu"), second, case)
    assert found and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_table_of_chunks_is_made_on_the_host():
    target = [torch.zeros(5), torch.zeros(chunks.CHUNK + 1)]
    ((expected, _),) = chunks.build([target])
    with torch.device("meta"):
        ((table, _),) = chunks.build([target])
    assert torch.equal(table, expected)


def test_a_packing_is_made_on_the_host_and_lies_where_it_is_asked_for():
    expected = Packing.from_lengths([70, 0, 200, 5])
    with torch.device("meta"):
        packing, elsewhere = (Packing.from_lengths([70, 0, 200, 5], device=device) for device in ("cpu", None))
    assert torch.equal(packing.cu_seqlens, expected.cu_seqlens) and torch.equal(packing.tiles, expected.tiles)
    assert elsewhere.cu_seqlens.is_meta and elsewhere.tiles.shape == expected.tiles.shape
