#include "common/blocks.h"

#include <atomic>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jepa {

constexpr int64_t LITTLE = int64_t{256} << 20;
constexpr int64_t PAGE = int64_t{2} << 20; // a large one, of which the system clears a block fastest

// Where an output begins in its block. malloc's large blocks begin 64 bytes past a page, and so do most
// inputs: a copy between addresses that are alike in their last 12 bits, or nearly, takes up to three times
// as long.
constexpr int64_t OFFSET = 17 * 64;

// No more waits than was held at once, or LITTLE: a program's memory at most doubles, whatever sizes it asks
// for. Never destroyed, since tensors may outlive any static object; never waited for, since a forked process
// may inherit the lock closed: a block then goes straight from and to the system.
static std::mutex& lock = *new std::mutex;
static std::vector<Block>& waiting = *new std::vector<Block>; // the longest waiting first
static std::atomic<int64_t> waiting_bytes{0}, held{0}, most_held{0}, limit{LITTLE};

static void raise(std::atomic<int64_t>& most, int64_t value) {
  int64_t seen = most.load();
  while (seen < value && !most.compare_exchange_weak(seen, value)) {
  }
}

#if defined(__linux__)
static Block map(int64_t bytes) {
  const int64_t asked = bytes + PAGE;
  void* mapped = mmap(nullptr, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {nullptr, 0};
  char* const begin = static_cast<char*>(mapped);
  const int64_t skipped = (PAGE - reinterpret_cast<intptr_t>(begin) % PAGE) % PAGE;
  if (skipped) munmap(begin, skipped);
  munmap(begin + skipped + bytes, asked - skipped - bytes);
  madvise(begin + skipped, bytes, MADV_HUGEPAGE); // a wish: refusals change nothing
  return {begin + skipped + OFFSET, bytes};
}

static void unmap(Block block) { munmap(static_cast<char*>(block.address) - OFFSET, block.bytes); }
#else
static Block map(int64_t) { return {nullptr, 0}; }
static void unmap(Block) {}
#endif

// The smallest that waits and is large enough, and not half too large.
static Block reuse(int64_t bytes) {
  const std::unique_lock<std::mutex> own(lock, std::try_to_lock);
  if (!own) return {nullptr, 0};
  auto best = waiting.end();
  for (auto block = waiting.begin(); block != waiting.end(); ++block)
    if (block->bytes >= bytes && block->bytes <= bytes + bytes / 2 &&
        (best == waiting.end() || block->bytes < best->bytes))
      best = block;
  if (best == waiting.end()) return {nullptr, 0};
  const Block found = *best;
  waiting.erase(best);
  waiting_bytes -= found.bytes;
  return found;
}

Block take_block(int64_t bytes) {
  bytes = (OFFSET + bytes + PAGE - 1) / PAGE * PAGE;
  Block block = reuse(bytes);
  if (!block.address) block = map(bytes);
  if (!block.address) { // what waits may be what is missing
    release_blocks();
    block = map(bytes);
  }
  if (block.address) {
    const int64_t now = held += block.bytes;
    raise(most_held, now);
    raise(limit, now);
  }
  return block;
}

void leave_block(Block block) {
  held -= block.bytes;
  const std::unique_lock<std::mutex> own(lock, std::try_to_lock);
  if (!own) return unmap(block);
  waiting.push_back(block);
  waiting_bytes += block.bytes;
  while (waiting_bytes > limit) {
    waiting_bytes -= waiting.front().bytes;
    unmap(waiting.front());
    waiting.erase(waiting.begin());
  }
}

void release_blocks() {
  const std::unique_lock<std::mutex> own(lock, std::try_to_lock);
  if (!own) return;
  for (const Block block : waiting) unmap(block);
  waiting.clear();
  waiting_bytes = 0;
}

BlockBytes block_bytes() { return {held, most_held, waiting_bytes}; }
void reset_most_held() { most_held = held.load(); }

} // namespace jepa
