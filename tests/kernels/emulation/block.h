// The threads of one block as fibers of one host thread, which change over only where they must wait: so a
// run is the same every time, and a wait that nobody ends is seen.
#pragma once
#include <csetjmp>
#include <cstdint>
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
    ucontext_t start;
    jmp_buf place; // where it waits: unlike swapcontext, a jump asks nothing of the system
    bool started = false;
    bool ended = false;
  };

  std::vector<Fiber> fibers;
  std::vector<uint8_t> shared;
  std::vector<int> unpublished; // of a byte: 1 + the thread whose store awaits its fence
  std::vector<int> unordered;   // of a byte: 1 + the thread whose store awaits a barrier
  std::vector<uint32_t> stored; // bytes that are unordered
  std::map<int, Meeting> meetings;
  jmp_buf host;
  std::function<void()> body;
  int64_t progress = 0;
  std::string failure;

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(int threads, int shared_bytes)
      : fibers(threads), shared(shared_bytes, 0xff), unpublished(shared_bytes), unordered(shared_bytes) {}

  // A barrier of threads [first, last) lets others see their stores.
  void order(unsigned first, unsigned last) {
    std::vector<uint32_t> left;
    for (const uint32_t byte : stored) {
      const unsigned writer = static_cast<unsigned>(unordered[byte] - 1);
      if (writer >= first && writer < last)
        unordered[byte] = 0;
      else if (unordered[byte])
        left.push_back(byte);
    }
    stored = std::move(left);
  }

  uint8_t* at(uint32_t address, int bytes) {
    if (address < BASE || address - BASE + bytes > shared.size()) fault("shared address out of bounds");
    if (address % bytes && bytes <= 16) fault("shared address not aligned");
    return shared.data() + address - BASE;
  }

  ~Block() { current() = nullptr; }

  void run(std::function<void()> kernel) {
    body = std::move(kernel);
    current() = this;
    static std::vector<std::unique_ptr<char[]>> stacks; // kept for the next block
    for (size_t t = 0; t < fibers.size(); ++t) {
      if (t == stacks.size()) stacks.emplace_back(new char[STACK]);
      Fiber& fiber = fibers[t];
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = stacks[t].get();
      fiber.start.uc_stack.ss_size = STACK;
      makecontext(&fiber.start, &Block::enter, 0);
    }
    blockDim.x = static_cast<unsigned>(fibers.size());
    for (size_t left = fibers.size(); left > 0;) {
      const int64_t before = progress;
      for (unsigned t = 0; t < fibers.size(); ++t)
        if (!fibers[t].ended) {
          threadIdx.x = t;
          resume(fibers[t]);
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
    _longjmp(block.host, 1);
  }

  [[gnu::noinline]] void resume(Fiber& fiber) {
    if (_setjmp(host)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  [[gnu::noinline]] void pause(Fiber& fiber) {
    if (!_setjmp(fiber.place)) _longjmp(host, 1);
  }

  template <class Ready> void wait_until(const Ready& ready) {
    const unsigned self = threadIdx.x;
    while (!ready()) pause(fibers[self]);
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
  _longjmp(block->host, 1);
}

} // namespace jepa
