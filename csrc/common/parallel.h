// Loops over threads, as many as the caller says. A body may not throw.
#pragma once
#include <atomic>
#include <cstdint>
#include <omp.h>
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace jepa::JEPA_ISA {

// Of the threads that run a body: 0, 1, ..., smaller than their number; 0 outside. Not OpenMP's, which counts
// those of the caller's own team where a body runs without one of ours.
static thread_local int rank_here = 0;
static inline int thread_rank() { return rank_here; }

template <class Body> static void run_as(int rank, int team, const Body& body) {
  rank_here = rank;
  body(rank, team);
  rank_here = 0; // the runtime's threads go on to teams of others
}

// body(rank, team) on each thread of a team; the runtime may grant fewer threads than asked for.
#ifdef __SANITIZE_THREAD__
// The sanitizer knows nothing of OpenMP's barriers, and would call every hand-over a race.
template <class Body> static void parallel_team(int threads, Body body) {
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) others.emplace_back([=] { run_as(rank, threads, body); });
  run_as(0, threads, body);
  for (std::thread& other : others) other.join();
}
#else
template <class Body> static void parallel_team(int threads, Body body) {
#pragma omp parallel num_threads(threads)
  run_as(omp_get_thread_num(), omp_get_num_threads(), body);
}
#endif

// body(begin, end) on contiguous ranges of [0, n), one a thread.
template <class Body> static void parallel_for(int64_t n, int threads, Body body) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  parallel_team(threads, [&](int64_t rank, int64_t team) {
    const int64_t begin = n * rank / team, end = n * (rank + 1) / team;
    if (begin < end) body(begin, end);
  });
}

// body(i) for each i in [0, n), handed out one by one in order: for work items of unequal size.
template <class Body> static void parallel_dynamic(int64_t n, int threads, Body body) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_team(threads, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
  });
}

} // namespace jepa::JEPA_ISA
