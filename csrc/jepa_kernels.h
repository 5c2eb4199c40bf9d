// Every kernel of the library, for programs without Python. A kernel is a function of one struct: pointers,
// sizes and strides in elements, which nothing checks. What is written lies where the struct says, none of it
// is allocated or kept, and any thread may call any kernel. The build for the processor at hand is chosen at
// the first call (isa, set_isa); one without AVX2 and FMA gets std::runtime_error. `threads`: as many OpenMP
// threads at most; no result depends on it. A DType that a kernel is not built for is std::invalid_argument.
// Kernels that end in _cuda are there where the library was built with JEPA_CUDA=ON.
#pragma once
#include "adamw_ema/adamw_ema.h"
#include "assemble_tokens/assemble_tokens.h"
#include "collapse_stats/collapse_stats.h"
#include "common/dispatch.h"
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
#include "masked_attention/schedule.h"
#include "masks/masks.h"
#include "peaks/peaks.h"
#include "rope/rope.h"
#include "sigreg/sigreg.h"
