// The kernels' own sources, and a face for ctypes.
#include "masked_attention/cuda_backward_sm90a.cu"
#include "masked_attention/cuda_forward_sm90a.cu"

namespace jepa {

void refuse(DType) { fault("a type that no kernel is built for"); }

} // namespace jepa

// tensors: q, k, v, out, lse, then grad, dq, dk, dv. numbers: sequences, queries and keys of each (dense), bounds of
// both, heads, key heads, channels.
extern "C" void masked_attention(const jepa::AttentionInput* tensors, const int32_t* cu_seqlens,
                                 const int32_t* k_cu_seqlens, const int64_t* numbers, float scale, bool half,
                                 bool backward) {
  jepa::MaskedAttentionCudaParams p{};
  p.shape.cu_seqlens = cu_seqlens;
  p.shape.k_cu_seqlens = k_cu_seqlens;
  p.sequences = numbers[0];
  p.shape.queries = numbers[1];
  p.shape.keys = numbers[2];
  p.shape.most_queries = numbers[3];
  p.shape.most_keys = numbers[4];
  p.shape.heads = numbers[5];
  p.shape.key_heads = numbers[6];
  p.shape.width = numbers[7];
  p.shape.scale = scale;
  p.shape.dtype = half ? jepa::DType::f16 : jepa::DType::bf16;
  p.q = tensors[0];
  p.k = tensors[1];
  p.v = tensors[2];
  p.out = tensors[3].at;
  p.lse = tensors[4].at;
  if (!backward) return jepa::masked_attention_forward_cuda(p);
  p.grad = tensors[5];
  p.dq = tensors[6].at;
  p.dk = tensors[7].at;
  p.dv = tensors[8].at;
  jepa::masked_attention_backward_cuda(p);
}
