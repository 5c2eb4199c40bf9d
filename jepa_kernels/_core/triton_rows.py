"""Device functions of Triton kernels that walk kept rows: the run that holds a row, the row that stands for a token.

Rows lie in `runs` runs, one after another: run s ends at cu_seqlens[s + 1], or is `run_length` long where cu_seqlens is
None, and reads image s % batch. Both searches take tensors of any shape, or scalars.
"""

import triton
import triton.language as tl


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
def run_bounds(run, cu_seqlens, run_length, there):
    """First row of a run and the one past its last; an empty run where not `there`."""
    if cu_seqlens is None:
        begin = run * run_length
        end = tl.where(there, begin + run_length, begin)
    else:
        begin = tl.load(cu_seqlens + run, mask=there, other=0)
        end = tl.load(cu_seqlens + run + 1, mask=there, other=0)
    return begin, end


@triton.jit
def row_of(id, ids, begin, end, steps):
    """(row, found): the row in [begin, end) whose id is `id`; ids increase there. steps: bits of the longest run."""
    low = begin
    high = end
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(ids + middle, mask=low < high, other=0) < id
        low = tl.where((low < high) & before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low, (low < end) & (tl.load(ids + low, mask=low < end, other=0) == id)
