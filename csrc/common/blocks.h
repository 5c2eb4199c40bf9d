// Memory of large outputs. The system clears the pages that it maps, and malloc maps a large block anew at
// each call: that takes longer than most kernels need to fill it. Here a block that nobody holds any more
// waits for the next output of about its size.
#pragma once
#include <cstdint>

namespace jepa {

struct OutputBlock {
  void* address; // null: the system gave none
  int64_t bytes; // of memory, some of it before the address
};

// From 4 MiB on; below, malloc takes back and hands out the same pages itself.
constexpr int64_t LARGE_BLOCK = int64_t{4} << 20, LARGEST_BLOCK = int64_t{1} << 46;

// Of at least so many bytes, at most half as many again, at an address that 64 divides; what it holds is
// undefined. Any thread may call any of these; a process that forks hands on its blocks as all of its memory.
OutputBlock take_block(int64_t bytes);
void leave_block(OutputBlock block);

// No more waits than was ever held at once since the last call of this, or 256 MiB: a program's memory at
// most doubles, whatever sizes it asks for. Gives all that waits back to the system.
void release_blocks();

struct BlockBytes {
  int64_t held, most_held,
      waiting; // in outputs that live now; the most since reset_most_held; in blocks that wait
};
BlockBytes block_bytes();
void reset_most_held();

} // namespace jepa
