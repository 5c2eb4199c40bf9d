// The threads of one block as fibers of one host thread, which change over only where they must wait: so a
// run is the same every time, and a wait that nobody ends is seen.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

namespace jepa {

[[noreturn]] void fault(const std::string& what);

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim;

// Threads that do something together: the last to come does it.
struct Meeting {
  int arrived = 0;
  int64_t done = 0;
};

struct Block {
  static constexpr size_t STACK = 128 << 10;
  static constexpr uint32_t BASE = 1024; // of dynamic shared memory in the block's shared addresses

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool ended = false;
  };

  std::vector<Fiber> fibers;
  std::vector<uint8_t> shared;
  std::vector<int> unpublished; // of a byte: 1 + the thread whose store awaits its fence
  std::map<int, Meeting> meetings;
  ucontext_t main_context;
  std::function<void()> body;
  int64_t progress = 0;
  std::string failure;

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(int threads, int shared_bytes)
      : fibers(threads), shared(shared_bytes, 0xff), unpublished(shared_bytes) {}

  uint8_t* at(uint32_t address, int bytes) {
    if (address < BASE || address - BASE + bytes > shared.size()) fault("shared address out of bounds");
    if (address % bytes && bytes <= 16) fault("shared address not aligned");
    return shared.data() + address - BASE;
  }

  ~Block() { current() = nullptr; }

  void run(std::function<void()> kernel) {
    body = std::move(kernel);
    current() = this;
    for (Fiber& fiber : fibers) {
      fiber.stack = std::make_unique<char[]>(STACK);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = &main_context;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    blockDim.x = static_cast<unsigned>(fibers.size());
    for (size_t left = fibers.size(); left > 0;) {
      const int64_t before = progress;
      for (unsigned t = 0; t < fibers.size(); ++t)
        if (!fibers[t].ended) {
          threadIdx.x = t;
          swapcontext(&main_context, &fibers[t].context);
          if (!failure.empty()) throw std::runtime_error("emulation: " + failure);
          if (fibers[t].ended) --left;
        }
      if (progress == before) throw std::runtime_error("emulation: every thread waits");
    }
  }

  static void enter() {
    Block& block = *current();
    block.body();
    ++block.progress;
    block.fibers[threadIdx.x].ended = true;
  }

  template <class Ready> void wait_until(const Ready& ready) {
    const unsigned self = threadIdx.x;
    while (!ready()) swapcontext(&fibers[self].context, &main_context);
    ++progress;
  }

  template <class Together> void meet(int which, int count, const Together& together) {
    Meeting& meeting = meetings[which];
    const int64_t turn = meeting.done;
    ++progress;
    if (++meeting.arrived < count) return wait_until([&] { return meeting.done != turn; });
    together();
    meeting.arrived = 0;
    ++meeting.done;
  }
};

// Ends the run: the fiber is left where it stands, and the caller of run() gets an exception.
[[noreturn]] inline void fault(const std::string& what) {
  Block* block = Block::current();
  if (!block) throw std::runtime_error("emulation: " + what);
  block->failure = what;
  swapcontext(&block->fibers[threadIdx.x].context, &block->main_context);
  std::abort();
}

} // namespace jepa
