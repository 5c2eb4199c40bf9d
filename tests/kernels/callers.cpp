// A program that calls attention from four threads of its own OpenMP region, one thread for each call: its
// numbers are those of a call from outside, and no kernel writes behind the memory that it asked for.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include <jepa_kernels/jepa_kernels.h>

static constexpr size_t HEAD = 64,
                        FENCE = 1 << 20; // the size that was asked for, and what must stay as it is
static std::atomic<int> asked{0}, crossed{0};

void* operator new(size_t size, std::align_val_t) {
  char* memory = static_cast<char*>(std::aligned_alloc(HEAD, (HEAD + size + FENCE + HEAD - 1) / HEAD * HEAD));
  std::memcpy(memory, &size, sizeof size);
  std::memset(memory + HEAD + size, 0x5a, FENCE);
  ++asked;
  return memory + HEAD;
}

void operator delete(void* given, std::align_val_t) noexcept {
  char* memory = static_cast<char*>(given) - HEAD;
  size_t size;
  std::memcpy(&size, memory, sizeof size);
  for (size_t i = 0; i < FENCE; ++i)
    if (memory[HEAD + size + i] != 0x5a) {
      ++crossed;
      break;
    }
  std::free(memory);
}

using Floats = std::vector<float>;

static Floats attention(int threads) {
  const int heads = 2, width = 40, rows = 110;
  const std::vector<int32_t> starts = {0, 50, 51, 110};
  Floats q(size_t(rows) * heads * width), out(q.size()), lse(size_t(heads) * rows);
  for (size_t i = 0; i < q.size(); ++i) q[i] = std::sin(0.37f * static_cast<float>(i));
  jepa::AttentionShape shape{};
  shape.cu_seqlens = shape.k_cu_seqlens = starts.data();
  shape.heads = shape.key_heads = heads;
  shape.width = width;
  shape.scale = 0.1f;
  shape.dtype = jepa::DType::f32;
  shape.threads = threads;
  std::vector<jepa::AttentionTask> tasks;
  jepa::schedule_attention_forward(shape, 3, tasks);
  const jepa::AttentionRows x{q.data(), 0, heads * width, width, 1};
  const jepa::AttentionRows y{out.data(), 0, heads * width, width, 1};
  jepa::masked_attention_forward_cpu({shape, x, x, x, y, {lse.data(), 0, 1, rows, 0}});
  return out;
}

int main() {
  int same = 0, calls = 0;
  for (const char* level : {"avx2", "avx512", "avx512_bf16"}) {
    if (!jepa::set_isa(level)) continue; // not of this processor
    const Floats expected = attention(1);
    for (int threads : {0, 2, 3}) calls += 1, same += attention(threads) == expected;
#pragma omp parallel num_threads(4) reduction(+ : same, calls)
    for (int threads : {1, 0, 2}) calls += 1, same += attention(threads) == expected;
  }
  std::printf("%d of %d calls alike, %d of %d allocations overrun\n", same, calls, crossed.load(),
              asked.load());
  return calls && same == calls && asked && !crossed ? 0 : 1;
}
