#include "rope/rope.h"

#include <cmath>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace jepa {
namespace rope_bindings {

using Pair = std::tuple<Tensor, Tensor>;

// What memory depends on. The public function has checked all of it; the torch op can be called without.
static void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("rope: ") + what + "; call the public function");
}

static void check(const Tensor& x, const Tensor& turns) {
  const int last = x.dim() - 1;
  require(last == 2 || last == 3, "rows must be [T, H, D] or [B, N, H, D]");
  require(turns.dim() == x.dim() && turns.dtype == DType::f32,
          "turns must be fp32 [T, 2, R] or [B, N, 2, R]");
  for (int i = 0; i < last - 1; ++i)
    require(turns.size(i) == x.size(i), "turns must have a row for every token");
  require(turns.size(-2) == 2 && turns.size(-1) % 2 == 0 && turns.size(-1) <= x.size(-1) && x.size(-1) <= 256,
          "turns must hold an even number of channels, at most D, and D at most 256");
  require(turns.numel() == 0 || (turns.stride(-1) == 1 && turns.stride(-2) == turns.size(-1)),
          "turns must have contiguous rows");
}

// Where x [T, H, D] or [B, N, H, D] is read and y, contiguous, is written.
static RopeRows rows_of(const Tensor& x, const Tensor& turns, const Tensor& y) {
  const bool packed = x.dim() == 3;
  return {x.data(),
          packed ? 0 : x.stride(0),
          x.stride(-3),
          x.stride(-2),
          x.stride(-1),
          y.data(),
          turns.data<float>(),
          packed ? 0 : turns.stride(0),
          turns.stride(-3),
          x.size(-3),
          x.size(-2)};
}

static Tensor empty_rows(const Tensor& x) {
  if (x.dim() == 3) return x.new_empty({x.size(0), x.size(1), x.size(2)});
  return x.new_empty({x.size(0), x.size(1), x.size(2), x.size(3)});
}

using Options = std::optional<Tensor>;

template <bool back, class Launch>
static Pair run(const Tensor& q, const Options& k, const Tensor& turns, const Options& k_turns, bool half,
                Launch launch) {
  check(q, turns);
  Pair out{empty_rows(q), k ? empty_rows(*k) : q.new_empty({0})};
  RopeParams params{{rows_of(q, turns, std::get<0>(out)), {}},
                    q.dim() == 3 ? 1 : q.size(0),
                    q.size(-1),
                    turns.size(-1),
                    half,
                    back,
                    q.dtype,
                    torch_threads()};
  if (k) {
    require(k_turns.has_value() && k->dim() == q.dim() && k->size(-1) == q.size(-1) && k->dtype == q.dtype &&
                (k->dim() == 3 || k->size(0) == q.size(0)) && k_turns->size(-1) == turns.size(-1),
            "keys must have turns, and the queries' dtype, head dim and batch");
    check(*k, *k_turns);
    params.rows[1] = rows_of(*k, *k_turns, std::get<1>(out));
  }
  launch(params);
  return out;
}

template <bool back>
static Pair run_cpu(const Tensor& q, const Options& k, const Tensor& turns, const Options& k_turns,
                    bool half) {
  return run<back>(q, k, turns, k_turns, half, [](const RopeParams& params) {
    py::gil_scoped_release nogil;
    rope_cpu(params);
  });
}

#if JEPA_CUDA
template <bool back>
static Pair run_cuda(const Tensor& q, const Options& k, const Tensor& turns, const Options& k_turns,
                     bool half) {
  for (const Tensor* t : {&turns, k_turns ? &*k_turns : &turns})
    require(reinterpret_cast<uintptr_t>(t->address) % 8 == 0 && t->stride(0) % 2 == 0 &&
                t->stride(-3) % 2 == 0,
            "turns must begin at multiples of 8 bytes");
  return run<back>(q, k, turns, k_turns, half, [&](const RopeParams& params) {
    void* const stream = q.stream();
    py::gil_scoped_release nogil;
    rope_cuda(params, q.device, stream);
  });
}
#endif

static RopePairing pairing_of(const std::string& name) {
  if (name == "half") return RopePairing::half;
  return name == "tiled" ? RopePairing::tiled : RopePairing::interleaved;
}

// theta ** (-j / pairs) in fp64, rounded once.
static std::vector<float> frequencies_of(const Options& given, double theta, int64_t pairs) {
  std::vector<float> frequencies;
  for (int64_t j = 0; j < pairs; ++j)
    frequencies.push_back(given ? given->data<float>()[j * given->stride(0)]
                                : static_cast<float>(std::pow(theta, -static_cast<double>(j) / pairs)));
  return frequencies;
}

static Tensor turns_cpu(const Tensor& positions, const Options& frequencies, double theta,
                        const std::string& pairing, int64_t width) {
  const int64_t axes = positions.size(-1), tokens = positions.size(-2), pairs = width / axes / 2;
  const bool batched = positions.dim() == 3;
  require(positions.dtype == DType::f32 && (batched || positions.dim() == 2),
          "positions must be fp32 [T, a] or [B, N, a]");
  require(width <= 256, "D must be at most 256");
  require(!frequencies || (frequencies->dtype == DType::f32 && frequencies->size(0) == pairs),
          "frequencies must be fp32, one for each pair of an axis");
  const std::vector<float> used = frequencies_of(frequencies, theta, pairs);
  const int64_t turning = axes * 2 * pairs;
  const Tensor out = batched ? positions.new_empty({positions.size(0), tokens, 2, turning})
                             : positions.new_empty({tokens, 2, turning});
  const RopeTurnsParams params{positions.data<float>(),
                               batched ? positions.stride(0) : 0,
                               positions.stride(-2),
                               positions.stride(-1),
                               used.data(),
                               out.data<float>(),
                               batched ? positions.size(0) : 1,
                               tokens,
                               axes,
                               pairs,
                               pairing_of(pairing),
                               torch_threads()};
  py::gil_scoped_release nogil;
  rope_turns_cpu(params);
  return out;
}

} // namespace rope_bindings

void bind_rope(py::module_& m) {
  using namespace rope_bindings;
  m.def("rope_forward_cpu", &run_cpu<false>);
  m.def("rope_backward_cpu", &run_cpu<true>);
  m.def("rope_turns_cpu", &turns_cpu);
#if JEPA_CUDA
  m.def("rope_forward_cuda", &run_cuda<false>);
  m.def("rope_backward_cuda", &run_cuda<true>);
#endif
}

} // namespace jepa
