"""ema_update of a tensor of more elements than 32 bits count, in little memory: all but its ends lie in one place."""

import ctypes
import mmap
import os

import pytest
import torch

import jepa_kernels as jk

COUNT = (1 << 31) + 5
PIECE = 1 << 21  # bytes that the middle repeats, from the cache
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
FIXED, RESERVED = 0x10, 0x4000  # MAP_FIXED, MAP_NORESERVE of Linux


def mapped(address, size, flags, file=-1):
    found = LIBC.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


class Folded:
    """Address space for a tensor of COUNT elements: what lies between its first and last two pieces is one piece."""

    def __init__(self, dtype):
        pieces = -(-COUNT * dtype.itemsize // PIECE)
        self.size = pieces * PIECE
        self.begin = mapped(None, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | RESERVED)
        file = os.memfd_create("piece")
        try:
            os.truncate(file, PIECE)
            for i in range(1, pieces - 2):
                mapped(self.begin + i * PIECE, PIECE, mmap.MAP_SHARED | FIXED, file)
        finally:
            os.close(file)
        memory = (ctypes.c_char * self.size).from_address(self.begin)
        self.tensor = torch.frombuffer(memory, dtype=dtype, count=COUNT)

    def close(self):
        LIBC.munmap(self.begin, self.size)


@pytest.fixture
def folded():
    made = []

    def make(dtype):
        try:
            made.append(Folded(dtype))
        except (OSError, AttributeError) as error:
            pytest.skip(f"no address space for {COUNT} elements: {error}")
        return made[-1].tensor

    yield make
    for memory in made:
        memory.close()


def test_more_elements_than_int32_counts(folded):
    target, online = folded(torch.float32), folded(torch.bfloat16)
    ends = slice(0, 3), slice((1 << 31) - 3, None)
    online[ends[0]], online[ends[1]] = torch.arange(1.0, 4.0), torch.arange(4.0, 12.0)
    after = torch.zeros(3)
    jk.ema_update([target, after], [online, torch.ones(3)], 0.0, backend="cpu")
    assert [target[end].tolist() for end in ends] == [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert after.eq(1.0).all() and target[1 << 20] == 0.0
