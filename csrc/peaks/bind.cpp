// Times the loops of cpu.cpp: the best of several passes, since a peak is what the machine can do
// undisturbed.
#include "peaks/peaks.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace jepa {

namespace py = pybind11;

namespace peaks_bindings {

// Fresh pages: they read as zeros (denormals would be slow), and who writes first decides where they lie.
class Pages {
public:
  explicit Pages(int64_t floats) : bytes_(floats * sizeof(float)) {
    p_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Pages() { munmap(p_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  float* data() const { return static_cast<float*>(p_); }

private:
  size_t bytes_;
  void* p_;
};

static double seconds(const PeaksParams& p) {
  const auto start = std::chrono::steady_clock::now();
  peaks_cpu(p);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static double best(const PeaksParams& p, int passes) {
  double least = seconds(p);
  for (int i = 1; i < passes; ++i) least = std::min(least, seconds(p));
  return least;
}

// Floats per array: eight times the last-level cache, 128 MiB at least and 512 MiB at most.
static int64_t array_floats() {
  const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 0);
  return std::clamp<int64_t>(8 * cache, int64_t{128} << 20, int64_t{512} << 20) / sizeof(float);
}

static py::dict bandwidth(int threads, int passes) {
  const int64_t n = array_floats();
  const Pages a(n), b(n);
  std::vector<float> sink(threads);
  double flops = 0;
  PeaksParams p{Peak::copy_streamed, b.data(), a.data(), n, threads, sink.data(), &flops};
  for (int i = 0; i < 2; ++i) { // both arrays are first written by the threads that will use them
    peaks_cpu(p);
    std::swap(p.a, p.b);
  }
  const double gigabyte = n * sizeof(float) / 1e9;
  const auto rate = [&](Peak kind, double moved) {
    p.kind = kind;
    py::gil_scoped_release nogil;
    return moved * gigabyte / best(p, passes);
  };
  py::dict rates;
  rates["copy_plain_gbs"] = rate(Peak::copy, 2);
  rates["copy_streamed_gbs"] = rate(Peak::copy_streamed, 2);
  rates["read_gbs"] = rate(Peak::read, 1);
  rates["rmw_gbs"] = rate(Peak::rmw, 2);
  return rates;
}

static double multiply_add(bool low, int threads, int passes) {
  std::vector<float> sink(threads);
  double flops = 0;
  const PeaksParams p{
      low ? Peak::fma_bf16 : Peak::fma_f32, nullptr, nullptr, 200'000, threads, sink.data(), &flops};
  py::gil_scoped_release nogil;
  const double least = best(p, 16 * passes); // short ones, so that some lie between two time slices
  return flops / least / 1e9;
}

} // namespace peaks_bindings

void bind_peaks(py::module_& m) {
  using namespace peaks_bindings;
  m.def("peaks_bandwidth", &bandwidth, py::arg("threads"), py::arg("passes") = 8);
  m.def("peaks_fma_gflops", &multiply_add, py::arg("low"), py::arg("threads"), py::arg("passes") = 8);
}

} // namespace jepa
