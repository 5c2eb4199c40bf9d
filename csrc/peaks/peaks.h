// What this machine can do at best: memory bandwidth and multiply-add rate. The ceilings of every benchmark
// row.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"

namespace jepa {

enum class Peak { copy, copy_streamed, read, rmw, fma_f32, fma_bf16 };

// One pass of `kind`: over n floats of memory, or n rounds of independent multiply-adds per thread.
struct PeaksParams {
  Peak kind;
  float* a; // read, or read and written (rmw)
  float* b; // written by the copies
  int64_t n;
  int threads;
  float* sink;   // one value a thread, so that no result is unused
  double* flops; // out: operations done, all threads together
};

JEPA_DECLARE_CPU(peaks_cpu, PeaksParams)

} // namespace jepa
