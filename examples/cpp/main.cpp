// Two kernels without Python: a target network's average, and attention inside three images on one token
// axis. Each is held against the loop that says what it computes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include <jepa_kernels/jepa_kernels.h>

using Floats = std::vector<float>;

static Floats some(size_t n, float phase) {
  Floats x(n);
  for (size_t i = 0; i < n; ++i) x[i] = std::sin(0.37f * static_cast<float>(i) + phase);
  return x;
}

// The largest difference, and whether it is small enough.
static bool agree(const char* name, const Floats& found, const Floats& expected, double most) {
  double worst = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double error = std::fabs(double(found[i]) - double(expected[i]));
    if (!(error <= worst)) worst = error; // a NaN stays
  }
  const bool good = worst <= most;
  std::printf("%-17s %6zu numbers, largest difference %.2g, %s\n", name, found.size(), worst,
              good ? "as expected" : "WRONG");
  return good;
}

// target <- momentum * target + (1 - momentum) * online, of two tensors in one call.
static bool average(double momentum) {
  Floats target = some(1003, 0), online = some(1003, 1), expected(1003);
  for (size_t i = 0; i < target.size(); ++i)
    expected[i] = static_cast<float>(momentum * double(target[i]) + (1 - momentum) * double(online[i]));
  const int64_t first = 1000;
  const jepa::EmaTensor tensors[] = {
      {target.data(), online.data(), nullptr, first, jepa::DType::f32, jepa::DType::other},
      {target.data() + first, online.data() + first, nullptr, 3, jepa::DType::f32, jepa::DType::other}};
  jepa::ema_update_cpu({tensors, 2, momentum, jepa::EmaForm::lerp, 2});
  return agree("ema_update", target, expected, 1e-6);
}

// softmax(scale q k^T) v of the rows [begin, end), for one head.
static void attend(const Floats& q, const Floats& k, const Floats& v, Floats& out, int begin, int end,
                   int head, int heads, int width, double scale) {
  const auto at = [&](int row, int channel) { return (size_t(row) * heads + head) * width + channel; };
  for (int i = begin; i < end; ++i) {
    std::vector<double> weights, sums(width);
    double total = 0;
    for (int j = begin; j < end; ++j) {
      double dot = 0;
      for (int c = 0; c < width; ++c) dot += double(q[at(i, c)]) * double(k[at(j, c)]);
      weights.push_back(std::exp(scale * dot));
      total += weights.back();
    }
    for (int j = begin; j < end; ++j)
      for (int c = 0; c < width; ++c) sums[c] += weights[j - begin] / total * double(v[at(j, c)]);
    for (int c = 0; c < width; ++c) out[at(i, c)] = static_cast<float>(sums[c]);
  }
}

static bool attention() {
  const int heads = 2, width = 40, rows = 110;
  const std::vector<int32_t> starts = {0, 50, 51, 110}; // three images, of 50, 1 and 59 tokens
  const double scale = 1 / std::sqrt(double(width));
  const size_t n = size_t(rows) * heads * width;
  Floats q = some(n, 0), k = some(n, 1), v = some(n, 2), out(n), lse(size_t(heads) * rows), expected(n);
  for (size_t s = 0; s + 1 < starts.size(); ++s)
    for (int head = 0; head < heads; ++head)
      attend(q, k, v, expected, starts[s], starts[s + 1], head, heads, width, scale);

  jepa::AttentionShape shape{};
  shape.cu_seqlens = shape.k_cu_seqlens = starts.data();
  shape.heads = shape.key_heads = heads;
  shape.width = width;
  shape.scale = static_cast<float>(scale);
  shape.dtype = jepa::DType::f32;
  shape.threads = 2;
  std::vector<jepa::AttentionTask> tasks;
  jepa::schedule_attention_forward(shape, 3, tasks);
  const auto lie = [&](Floats& x) { // x [rows, heads, width]
    return jepa::AttentionRows{x.data(), 0, heads * width, width, 1};
  };
  jepa::masked_attention_forward_cpu({shape, lie(q), lie(k), lie(v), lie(out), {lse.data(), 0, 1, rows, 0}});
  return agree("masked_attention", out, expected, 1e-5);
}

int main() {
  bool good = true;
  for (const char* level : {"avx2", "avx512", "avx512_bf16"}) {
    if (!jepa::set_isa(level)) continue; // not of this processor
    std::printf("%s\n", jepa::isa_name(jepa::isa()));
    good = average(0.996) && good;
    good = attention() && good;
  }
  jepa::set_isa("best"); // what a program gets that asks for nothing
  return good && jepa::isa() != jepa::Isa::none ? 0 : 1;
}
