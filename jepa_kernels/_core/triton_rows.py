"""Device functions of Triton kernels that walk kept rows: the run that holds a row, the row that stands for a token.

Rows lie in `runs` runs, one after another: run s ends at cu_seqlens[s + 1], or is `run_length` long where cu_seqlens is
None, and reads image s % batch. Row i of a run stands for token ids[row], or for token i where ids is None. Functions
take tensors of any shape, or scalars.
"""

import triton
import triton.language as tl

# Arguments that kernels aren't compiled for: lengths change with every call.
LENGTHS = ["rows", "runs", "run_length", "steps", "masks", "batch", "count", "tokens", "length"]
LISTS = ["ids", "cu_seqlens"]  # nor for where these begin


@triton.jit
def run_of(row, cu_seqlens, runs, run_length, steps):
    """The run that holds `row`, the first that ends behind it; at least `runs` where none does. steps: bits of runs."""
    if cu_seqlens is None:
        low = row // run_length
    else:
        low = row * 0
        high = low + runs
        for _ in range(steps):
            middle = (low + high) // 2
            behind = tl.load(cu_seqlens + middle + 1, mask=low < high, other=0) <= row
            low = tl.where((low < high) & behind, middle + 1, low)
            high = tl.where(behind, high, middle)
    return low


@triton.jit
def end_of(cu_seqlens, rows, runs):
    """Behind the last run."""
    return rows if cu_seqlens is None else tl.minimum(tl.load(cu_seqlens + runs), rows)


@triton.jit
def id_of(row, end, ids, count):
    """(id, inside): what a row stands for; not `inside` from `end` on and where the id is no token."""
    inside = row < end
    if ids is None:
        id = (row % count).to(tl.int64)
    else:
        id = tl.load(ids + row, mask=inside, other=-1)
    return id, inside & (id >= 0) & (id < count)


@triton.jit
def token_of(row, ids, cu_seqlens, rows, runs, run_length, steps, count):
    """(run, id, inside): what a row stands for; not `inside` past the last run and where the id is no token."""
    id, inside = id_of(row, end_of(cu_seqlens, rows, runs), ids, count)
    return run_of(row, cu_seqlens, runs, run_length, steps), id, inside


@triton.jit
def row_of(run, id, there, ids, cu_seqlens, rows, run_length, steps):
    """(row, found): the row of a run that stands for token `id`, searched in its increasing ids where `there`.

    A run that would end past `rows` ends there. steps: bits of the longest run.
    """
    if cu_seqlens is None:
        begin = run * run_length
        end = begin + run_length
    else:
        begin = tl.maximum(tl.load(cu_seqlens + run, mask=there, other=0), 0)
        end = tl.minimum(tl.load(cu_seqlens + run + 1, mask=there, other=0), rows)
    if ids is None:
        low = begin + id
        found = there & (low < end)
    else:
        low = begin
        high = tl.where(there, end, begin)
        for _ in range(steps):
            middle = (low + high) // 2
            before = tl.load(ids + middle, mask=low < high, other=0) < id
            low = tl.where((low < high) & before, middle + 1, low)
            high = tl.where(before, high, middle)
        found = there & (low < end)
        found &= tl.load(ids + low, mask=found, other=-1) == id
    return low, found


@triton.jit
def offset_of(row, length, skip, stride):
    """Offset of a row: rows lie `stride` apart, and `skip` after `length` of them, unless that is None."""
    if length is None:
        return row.to(tl.int64) * stride
    else:
        return (row // length).to(tl.int64) * skip + (row % length).to(tl.int64) * stride
