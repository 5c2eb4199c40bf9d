// Distance of predictions to layer-normalised, gathered targets, with its gradient in the same pass.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

enum class LossKind { smooth_l1, l1, l2, power };

// Rows of pred lie in `sequences` runs; run s compares with image s % batch and belongs to mask s / batch.
// Runs end at cu_seqlens[1], cu_seqlens[2], ..., or are `run_length` long where cu_seqlens is null. Without
// ids, row k of a run compares with token k. Rows past the last run, and rows whose id is out of range, count
// as distance 0.
struct LatentLossForwardParams {
  const void *pred, *target;
  const int64_t* ids;
  const int32_t* cu_seqlens;
  int64_t sequences, run_length, rows, batch, count, channels;
  int64_t pred_run, pred_row, pred_channel; // strides in elements; pred_run only where runs have one length
  int64_t target_image, target_token, target_channel;
  DType pred_dtype, target_dtype;
  LossKind kind;
  double scale, power; // scale: of the whole loss
  float beta, eps;
  bool normalize;
  int64_t levels;           // equal parts of the channels, each normalised by itself
  const void *gain, *shift; // [channels] of the encoder's own norm, or null
  int64_t gain_stride, shift_stride;
  DType gain_dtype, shift_dtype;
  float norm_eps;
  float* affine;       // workspace [2 * channels] where gain is given
  const float* weight; // of each row's distance, or null; strides as of pred's rows
  int64_t weight_run, weight_row;
  bool per_mask;    // mean of the masks' means, else mean over all tokens
  double* row_loss; // workspace [rows]
  float* loss;      // [1]
  void* unit; // gradient of loss by pred [rows, channels], or null; fp32 where pred is fp16, else pred's type
  int threads;
};

JEPA_DECLARE_CPU(latent_loss_forward_cpu, LatentLossForwardParams)

// dpred = unit * grad
struct LatentLossBackwardParams {
  const void* unit;
  const float* grad; // [1]
  void* dpred;
  int64_t numel;
  DType dtype; // of dpred; unit is fp32 where this is fp16, else of the same type
  int threads;
};

JEPA_DECLARE_CPU(latent_loss_backward_cpu, LatentLossBackwardParams)

} // namespace jepa
