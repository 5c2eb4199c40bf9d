"""The table of chunks that the GPU kernels of lists read: covers every element once, is built once."""

import pytest
import torch

from jepa_kernels import chunks


@pytest.fixture(autouse=True)
def _no_tables():
    chunks._kept.clear()
    chunks._passing.clear()


def groups(*lists):
    return chunks.groups("op", lists)


def covered(table, size):
    """{address in the first list: count} of all elements of `size` bytes."""
    return {row[0] + size * i for row in table.tolist() for i in range(row[-1])}


def test_chunks_cover_every_element_once():
    target = [torch.zeros(n) for n in (0, 1, chunks.CHUNK - 1, chunks.CHUNK, 2 * chunks.CHUNK + 7)]
    online = [t.bfloat16() for t in target]
    ((table, dtypes),) = groups(target, online, ())
    assert dtypes == (torch.float32, torch.bfloat16, None)
    assert covered(table, 4) == {t.data_ptr() + 4 * i for t in target for i in range(t.numel())}
    assert table[:, 3].sum() == sum(t.numel() for t in target) and table[:, 3].max() <= chunks.CHUNK
    steps = (table[:, 1] - online[-1].data_ptr())[-3:].tolist()
    assert steps == [0, 2 * chunks.CHUNK, 4 * chunks.CHUNK] and not table[:, 2].any()


def test_chunks_of_more_elements_than_int32_counts():
    n = (1 << 31) + 5
    target, online = (torch.empty(n, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))  # no page is touched
    ((table, _),) = groups([target], [online], ())
    first, last = table[:, 0] - target.data_ptr(), table[-1].tolist()
    assert torch.equal(first, torch.arange(0, 4 * n, 4 * chunks.CHUNK)) and table[:, 3].sum() == n
    assert torch.equal(table[:, 1] - online.data_ptr(), first // 2)
    assert last == [target.data_ptr() + 4 * (1 << 31), online.data_ptr() + 2 * (1 << 31), 0, 5]


def test_each_set_of_dtypes_is_one_launch():
    target = [torch.zeros(5) for _ in range(4)]
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
    online = [t.to(d) for t, d in zip(target, dtypes, strict=True)]
    found = groups(target, online, [t.half() for t in target])
    assert [(g.dtypes, len(g.table)) for g in found] == [
        ((torch.float32, torch.float32, torch.float16), 2),
        ((torch.float32, torch.bfloat16, torch.float16), 2),
    ]


def test_a_tensor_may_be_missing_in_any_list_but_the_first():
    params, none = [torch.zeros(3), torch.zeros(0), torch.zeros(4)], torch.zeros(0)
    shadow = [none.half(), none.half(), torch.zeros(4).half()]
    without, with_shadow = groups(params, shadow)
    assert without.dtypes == (torch.float32, None) and without.table.tolist() == [[params[0].data_ptr(), 0, 3]]
    assert with_shadow.dtypes == (torch.float32, torch.float16)
    assert with_shadow.table.tolist() == [[params[2].data_ptr(), shadow[2].data_ptr(), 4]]


def test_all_chunks_of_a_tensor_share_its_one_element():
    params, steps = [torch.zeros(2 * chunks.CHUNK), torch.zeros(1)], [torch.tensor(3.0), torch.tensor(5.0)]
    ((table, _),) = groups(params, steps)
    assert table[:, 1].tolist() == [steps[0].data_ptr()] * 2 + [steps[1].data_ptr()]


def test_tables_have_a_column_for_each_of_any_number_of_lists():
    lists = [[torch.full((5,), float(i))] for i in range(8)]
    ((table, dtypes),) = groups(*lists)
    assert table.tolist() == [[*(t.data_ptr() for (t,) in lists), 5]] and dtypes == (torch.float32,) * 8


def test_a_table_is_built_once_and_the_oldest_goes_first():
    lists = [[torch.zeros(3)] for _ in range(chunks.KEPT + 1)]
    first = groups(lists[0], lists[0])
    assert groups(lists[0], lists[0]) is first
    for tensors in lists[1 : chunks.KEPT]:
        groups(tensors, tensors)
    assert groups(lists[0], lists[0]) is first and len(chunks._kept) == chunks.KEPT
    groups(lists[-1], lists[-1])
    assert groups(lists[0], lists[0]) is first, "just used: not the oldest"
    assert len(chunks._kept) == chunks.KEPT


def test_equal_addresses_of_another_size_are_another_table():
    whole = torch.zeros(100)
    first = groups([whole], [whole])
    assert groups([whole[:50]], [whole[:50]]) is not first


def test_equal_addresses_of_other_lists_are_another_table():
    a, b = torch.zeros(5), torch.zeros(5)
    assert groups([a, b])[0].table.shape == (2, 2) and groups([a], [b])[0].table.shape == (1, 3)


class Own(torch.Tensor):
    """A class of somebody else's."""


CHANGES = {
    "nothing": lambda lists: lists,
    "other lists of the same tensors": lambda lists: [tuple(tensors) for tensors in lists],
    "a tensor more": lambda lists: [[*lists[0], torch.zeros(1)], lists[1]],
    "a tensor less": lambda lists: [lists[0], lists[1][:-1]],
    "a list more": lambda lists: [*lists, []],
    "a list less": lambda lists: lists[:1],
    "two in each other's places": lambda lists: [lists[0][::-1], lists[1]],
    "other memory": lambda lists: [lists[0], [lists[1][0], lists[1][1].clone()]],
    "another shape": lambda lists: [[lists[0][0].view(3, 2), lists[0][1]], lists[1]],
    "other strides": lambda lists: [[lists[0][0].view(3, 2).t(), lists[0][1]], lists[1]],
    "another dtype": lambda lists: [[lists[0][0].view(torch.int32), lists[0][1]], lists[1]],
    "no memory": lambda lists: [lists[0], [lists[1][0], lists[1][1].to("meta")]],
    "another class": lambda lists: [lists[0], [lists[1][0], lists[1][1].as_subclass(Own)]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_read_is_what_a_read_would_tell(change):
    lists = [[torch.zeros(2, 3), torch.zeros(4)], [torch.zeros(2, 3).t(), torch.zeros(4)]]
    known, now = chunks.read(lists, plain=True), CHANGES[change](lists)
    same = chunks.unchanged(known, now)
    assert same == (chunks.read(now, plain=True) == known) and same == (CHANGES[change] in [*CHANGES.values()][:2])


def test_lists_that_change_do_not_push_out_those_that_stay():
    stay, lists = [torch.zeros(3)], [[torch.zeros(3)] for _ in range(chunks.KEPT + 1)]
    first = groups(stay)
    passing = [chunks.groups("op", [tensors], changing=True) for tensors in lists]
    assert groups(stay) is first and len(chunks._passing) == chunks.KEPT
    assert chunks.groups("op", [lists[-1]], changing=True) is passing[-1]


@pytest.mark.parametrize("changing", [False, True])
def test_a_capture_takes_the_tables_of_the_step_before_whatever_its_stream(changing):
    seen, new = [torch.zeros(3)], [torch.zeros(3)]
    table = chunks.groups("op", [seen], changing=changing)
    kept = chunks._passing if changing else chunks._kept
    ((_, known),) = kept
    kept[17, known] = kept.pop((0, known))
    found = chunks._captured_groups("op", chunks.read([seen], plain=False), kept)
    assert found is table and chunks._captured.pop() is table
    with pytest.raises(RuntimeError, match=r"^op: the first update .+ must run before graph capture"):
        chunks._captured_groups("op", chunks.read([new], plain=False), kept)
