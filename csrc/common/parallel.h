// OpenMP loops with the caller's thread count. A body may not throw.
#pragma once
#include <cstdint>
#include <omp.h>

namespace jepa::JEPA_ISA {

// body(begin, end) on contiguous ranges of [0, n), one a thread.
template <class Body> static void parallel_for(int64_t n, int threads, Body body) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    // The runtime may grant fewer threads than asked for: split by what is there.
    const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
    const int64_t begin = n * rank / team, end = n * (rank + 1) / team;
    if (begin < end) body(begin, end);
  }
}

// body(i) for each i in [0, n), handed out one by one in order: for work items of unequal size.
template <class Body> static void parallel_dynamic(int64_t n, int threads, Body body) {
  if (threads > n) threads = static_cast<int>(n);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads < 1 ? 1 : threads) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) body(i);
}

} // namespace jepa::JEPA_ISA
