#include "common/blocks.h"

#include <algorithm>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace jepa {

constexpr int64_t LITTLE = int64_t{256} << 20;
constexpr int64_t PAGE = 4096,
                  LARGE_PAGE = int64_t{2} << 20; // the system clears a block fastest in large ones

// Where an output begins in its block. malloc's large blocks begin 64 bytes past a page, and so do most
// inputs: a copy between addresses that are alike in their last 12 bits, or nearly, takes up to three times
// as long.
constexpr int64_t OFFSET = 17 * 64;

// Never destroyed: tensors may outlive any static object. Everything here is read and written under its lock.
struct Blocks {
  std::mutex lock;
  std::vector<OutputBlock> waiting; // the longest waiting first
  int64_t waiting_bytes = 0, held = 0, most_held = 0, limit = LITTLE;
};
static Blocks& blocks() {
  static Blocks& all = *[] {
    auto* made = new Blocks;
#if defined(__linux__) // a forked process inherits the lock open
    pthread_atfork([] { blocks().lock.lock(); }, [] { blocks().lock.unlock(); },
                   [] { blocks().lock.unlock(); });
#endif
    return made;
  }();
  return all;
}

#if defined(__linux__)
static OutputBlock map(int64_t bytes) {
  const int64_t asked = bytes + LARGE_PAGE;
  void* mapped = mmap(nullptr, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {nullptr, 0};
  char* const begin = static_cast<char*>(mapped);
  const int64_t skipped = (LARGE_PAGE - reinterpret_cast<intptr_t>(begin) % LARGE_PAGE) % LARGE_PAGE;
  if (skipped) munmap(begin, skipped);
  munmap(begin + skipped + bytes, asked - skipped - bytes);
#if defined(MADV_HUGEPAGE)
  madvise(begin + skipped, bytes, MADV_HUGEPAGE); // a wish: refusals change nothing
#endif
  return {begin + skipped + OFFSET, bytes};
}

static void unmap(OutputBlock block) { munmap(static_cast<char*>(block.address) - OFFSET, block.bytes); }
#else
static OutputBlock map(int64_t) { return {nullptr, 0}; }
static void unmap(OutputBlock) {}
#endif

// The smallest that waits and is large enough, and not half too large.
static OutputBlock reuse(Blocks& all, int64_t bytes) {
  auto best = all.waiting.end();
  for (auto block = all.waiting.begin(); block != all.waiting.end(); ++block)
    if (block->bytes >= bytes && block->bytes <= bytes + bytes / 2 &&
        (best == all.waiting.end() || block->bytes < best->bytes))
      best = block;
  if (best == all.waiting.end()) return {nullptr, 0};
  const OutputBlock found = *best;
  all.waiting.erase(best);
  all.waiting_bytes -= found.bytes;
  return found;
}

// Gives the longest waiting back to the system until no more than `most` bytes wait.
static void keep(Blocks& all, int64_t most) {
  auto block = all.waiting.begin();
  for (; all.waiting_bytes > most; ++block) {
    all.waiting_bytes -= block->bytes;
    unmap(*block);
  }
  all.waiting.erase(all.waiting.begin(), block);
}

OutputBlock take_block(int64_t bytes) {
  bytes = (OFFSET + bytes + PAGE - 1) / PAGE * PAGE;
  Blocks& all = blocks();
  const std::lock_guard<std::mutex> own(all.lock);
  OutputBlock block = reuse(all, bytes);
  if (!block.address) block = map(bytes);
  if (!block.address) { // what waits may be what is missing
    keep(all, 0);
    block = map(bytes);
  }
  all.held += block.bytes;
  all.most_held = std::max(all.most_held, all.held);
  all.limit = std::max(all.limit, all.held);
  return block;
}

void leave_block(OutputBlock block) {
  Blocks& all = blocks();
  const std::lock_guard<std::mutex> own(all.lock);
  all.held -= block.bytes;
  all.waiting.push_back(block);
  all.waiting_bytes += block.bytes;
  keep(all, all.limit);
}

void release_blocks() {
  Blocks& all = blocks();
  const std::lock_guard<std::mutex> own(all.lock);
  keep(all, 0);
  all.limit = std::max(LITTLE, all.held);
}

BlockBytes block_bytes() {
  Blocks& all = blocks();
  const std::lock_guard<std::mutex> own(all.lock);
  return {all.held, all.most_held, all.waiting_bytes};
}

void reset_most_held() {
  Blocks& all = blocks();
  const std::lock_guard<std::mutex> own(all.lock);
  all.most_held = all.held;
}

} // namespace jepa
