// Chooses the build of each CPU kernel that this processor can run.
#include "common/dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "adamw_ema/adamw_ema.h"
#include "assemble_tokens/assemble_tokens.h"
#include "collapse_stats/collapse_stats.h"
#include "common/dtype.h"
#include "distance_weights/distance_weights.h"
#include "ema_update/ema_update.h"
#include "embed_patches/embed_patches.h"
#include "gather_tokens/gather_tokens.h"
#include "grad_norm/grad_norm.h"
#include "info_nce/info_nce.h"
#include "latent_loss/latent_loss.h"
#include "linear/linear.h"
#include "masked_attention/masked_attention.h"
#include "peaks/peaks.h"
#include "rope/rope.h"
#include "sigreg/sigreg.h"

namespace jepa {

static Isa best_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::none;
  if (!JEPA_AVX512 || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
}

static std::atomic<Isa>& current() {
  static std::atomic<Isa> level{best_isa()};
  return level;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa level) {
  switch (level) {
  case Isa::avx2:
    return "avx2";
  case Isa::avx512:
    return "avx512";
  case Isa::avx512_bf16:
    return "avx512_bf16";
  default:
    return "none";
  }
}

bool is_amd() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
}

void refuse(DType type) {
  static const char* const names[] = {"float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8"};
  const std::string name = type == DType::other ? "another type" : names[static_cast<int>(type)];
  throw std::invalid_argument("jepa_kernels: a kernel's tensors must be float32, bfloat16 or float16, got " +
                              name + "; call the public function, which converts or says why not");
}

bool set_isa(const char* name) {
  const Isa best = best_isa();
  Isa level = best;
  if (std::strcmp(name, "best") != 0) {
    level = Isa::none;
    for (Isa candidate : {Isa::avx2, Isa::avx512, Isa::avx512_bf16})
      if (std::strcmp(name, isa_name(candidate)) == 0) level = candidate;
    if (level == Isa::none || level > best) return false;
  }
  current().store(level, std::memory_order_relaxed);
  return true;
}

} // namespace jepa

// A sanitizer's build holds one level alone.
#if JEPA_AVX512
#define JEPA_AVX512_CASES(kernel, params)                                                                    \
  case Isa::avx512_bf16:                                                                                     \
    return avx512_bf16::kernel(params);                                                                      \
  case Isa::avx512:                                                                                          \
    return avx512::kernel(params);
#else
#define JEPA_AVX512_CASES(kernel, params)
#endif

#define JEPA_DISPATCH(kernel, Params)                                                                        \
  void jepa::kernel(const Params& params) {                                                                  \
    switch (isa()) {                                                                                         \
      JEPA_AVX512_CASES(kernel, params)                                                                      \
    case Isa::avx2:                                                                                          \
      return avx2::kernel(params);                                                                           \
    default:                                                                                                 \
      throw std::runtime_error(#kernel " must run on a processor with AVX2 and FMA");                        \
    }                                                                                                        \
  }

JEPA_DISPATCH(adamw_ema_cpu, AdamwEmaParams)
JEPA_DISPATCH(assemble_tokens_forward_cpu, AssembleTokensForwardParams)
JEPA_DISPATCH(assemble_tokens_backward_cpu, AssembleTokensBackwardParams)
JEPA_DISPATCH(collapse_stats_cpu, CollapseStatsParams)
JEPA_DISPATCH(distance_weights_forward_cpu, DistanceWeightsForwardParams)
JEPA_DISPATCH(ema_update_cpu, EmaUpdateParams)
JEPA_DISPATCH(embed_patches_forward_cpu, EmbedPatchesForwardParams)
JEPA_DISPATCH(embed_patches_backward_cpu, EmbedPatchesBackwardParams)
JEPA_DISPATCH(gather_tokens_forward_cpu, GatherTokensForwardParams)
JEPA_DISPATCH(gather_tokens_backward_cpu, GatherTokensBackwardParams)
JEPA_DISPATCH(grad_norm_cpu, GradNormParams)
JEPA_DISPATCH(info_nce_forward_cpu, InfoNceForwardParams)
JEPA_DISPATCH(info_nce_backward_cpu, InfoNceBackwardParams)
JEPA_DISPATCH(latent_loss_forward_cpu, LatentLossForwardParams)
JEPA_DISPATCH(latent_loss_backward_cpu, LatentLossBackwardParams)
JEPA_DISPATCH(linear_multiply_cpu, LinearMultiplyParams)
JEPA_DISPATCH(linear_sum_cpu, LinearSumParams)
JEPA_DISPATCH(masked_attention_forward_cpu, MaskedAttentionForwardParams)
JEPA_DISPATCH(masked_attention_backward_cpu, MaskedAttentionBackwardParams)
JEPA_DISPATCH(peaks_cpu, PeaksParams)
JEPA_DISPATCH(rope_cpu, RopeParams)
JEPA_DISPATCH(rope_turns_cpu, RopeTurnsParams)
JEPA_DISPATCH(sigreg_directions_cpu, SigregDirectionsParams)
JEPA_DISPATCH(sigreg_moments_cpu, SigregMomentsParams)
JEPA_DISPATCH(sigreg_forward_cpu, SigregForwardParams)
JEPA_DISPATCH(sigreg_backward_cpu, SigregBackwardParams)
