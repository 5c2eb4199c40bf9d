"""Device functions of Triton kernels that go through tables of chunks: addresses that come out of memory.

To the compiler such an address is generic, with unknown alignment. Elements of a chunk are taken four a thread, so that
fp32 moves 16 bytes an instruction, where every address allows that; then one by one.
"""

import torch
import triton
import triton.language as tl

THREADS = 256
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, None: None}


@triton.jit
def aligned_count(addresses, count):
    """How many elements are covered by words of 16 bytes, given the addresses of all tensors or-ed together."""
    return tl.where(addresses % 16 == 0, count // 16 * 16, 0)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer, where there is a tensor. ALIGNED: used where the address is a multiple of 16 alone."""
    if ALIGNED:  # rounding it down changes nothing, and tells the compiler
        address = address // 16 * 16
    found = address.to(tl.pointer_type(tl.float32 if DTYPE is None else DTYPE))
    return tl.multiple_of(found, 16) if ALIGNED else found
