"""torch's default device, as `torch.set_default_device` chooses it, is no business of kernels and of their tables.

"meta" stands in for a GPU: what is made there by mistake has no memory that a kernel could read.
"""

import copy

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels import Packing, chunks
from jepa_kernels.nn import EMA
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


def test_steps_updates_and_losses_are_the_same():
    found = []
    for place in (torch.device("cpu"), torch.device("meta")):
        torch.manual_seed(0)
        net, z = nn.Linear(4, 4), torch.randn(8, 4)
        ema = EMA(net, 0.5)
        moved = copy.deepcopy(net)
        optimizer = jk.AdamWEMA(net.parameters(), moved.parameters(), lr=0.1, momentum=0.5)
        net(z).square().sum().backward()
        with place:
            optimizer.step()
            ema.update()
            ema.load_state_dict(ema.state_dict())
            loss = jk.sigreg(z, slices=8)
        tensors = [*net.parameters(), *moved.parameters(), *ema.module.parameters(), loss]
        found.append([*(x.detach() for x in tensors), ema.step])
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b == 1 for a, b in zip(*found, strict=True))
