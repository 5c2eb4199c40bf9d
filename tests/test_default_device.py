"""torch.set_default_device: what is made on the host stays there, whatever it names."""

import copy

import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels.chunks import build
from jepa_kernels.nn import EMA

ELSEWHERE = torch.device("meta")  # where every value is lost


def test_packings_lie_where_they_are_asked_to():
    lengths = [3, 0, 700]
    expected = jk.Packing.from_lengths(lengths)
    with ELSEWHERE:
        found, default = jk.Packing.from_lengths(lengths, device="cpu"), jk.Packing.from_lengths(lengths)
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens) and torch.equal(found.tiles, expected.tiles)
    assert default.cu_seqlens.is_meta and default.lengths == expected.lengths


def test_tables_of_chunks_are_those_of_the_tensors():
    lists = [[torch.zeros(40_000), torch.zeros(3)], [torch.zeros(40_000), torch.zeros(3)]]
    (expected,) = build(lists)
    with ELSEWHERE:
        (found,) = build(lists)
    assert torch.equal(found.table, expected.table)


def test_steps_updates_and_losses_are_the_same():
    found = []
    for place in (torch.device("cpu"), ELSEWHERE):
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
