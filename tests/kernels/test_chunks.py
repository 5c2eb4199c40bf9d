"""The table of chunks that ema_update's GPU kernels read: covers every element once, is built once."""

import pytest
import torch

from jepa_kernels.ops.ema_update import chunks


@pytest.fixture(autouse=True)
def _no_tables():
    chunks._kept.clear()


def covered(group, size):
    """{address of target: count} of all elements of `size` bytes."""
    return {a + size * i for a, _, _, n in group.table.tolist() for i in range(n)}


def test_chunks_cover_every_element_once():
    target = [torch.zeros(n) for n in (0, 1, chunks.CHUNK - 1, chunks.CHUNK, 2 * chunks.CHUNK + 7)]
    online = [t.bfloat16() for t in target]
    (group,) = chunks.groups(target, online, ())
    assert group.online == torch.bfloat16 and group.shadow is None
    assert covered(group, 4) == {t.data_ptr() + 4 * i for t in target for i in range(t.numel())}
    assert group.table[:, 3].sum() == sum(t.numel() for t in target) and group.table[:, 3].max() <= chunks.CHUNK
    steps = (group.table[:, 1] - online[-1].data_ptr())[-3:].tolist()
    assert steps == [0, 2 * chunks.CHUNK, 4 * chunks.CHUNK] and not group.table[:, 2].any()


def test_each_pair_of_dtypes_is_one_launch():
    target = [torch.zeros(5) for _ in range(4)]
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
    online = [t.to(d) for t, d in zip(target, dtypes, strict=True)]
    groups = chunks.groups(target, online, [t.half() for t in target])
    assert [(g.online, g.shadow, len(g.table)) for g in groups] == [
        (torch.float32, torch.float16, 2),
        (torch.bfloat16, torch.float16, 2),
    ]


def test_a_table_is_built_once_and_the_oldest_goes_first():
    lists = [[torch.zeros(3)] for _ in range(chunks.KEPT + 1)]
    first = chunks.groups(lists[0], lists[0], ())
    assert chunks.groups(lists[0], lists[0], ()) is first
    for tensors in lists[1 : chunks.KEPT]:
        chunks.groups(tensors, tensors, ())
    assert chunks.groups(lists[0], lists[0], ()) is first and len(chunks._kept) == chunks.KEPT
    chunks.groups(lists[-1], lists[-1], ())
    assert chunks.groups(lists[0], lists[0], ()) is first, "just used: not the oldest"
    assert len(chunks._kept) == chunks.KEPT


def test_equal_addresses_of_another_size_are_another_table():
    whole = torch.zeros(100)
    first = chunks.groups([whole], [whole], ())
    assert chunks.groups([whole[:50]], [whole[:50]], ()) is not first
