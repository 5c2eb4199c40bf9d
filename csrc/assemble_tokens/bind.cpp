#include "assemble_tokens/assemble_tokens.h"

#include <algorithm>
#include <array>
#include <vector>

#include "common/tensor.h"

namespace jepa {
namespace assemble_tokens_bindings {

using Starts = std::vector<int64_t>;

// Where `sequences` sequences start and the last one ends: as packed on `rows` rows, or of one length.
static Starts starts(const std::optional<Tensor>& cu, int64_t rows, int64_t sequences, int64_t length) {
  if (cu) {
    const Runs runs(cu, rows);
    return Starts(runs.starts(), runs.starts() + runs.count() + 1);
  }
  Starts found(sequences + 1);
  for (int64_t s = 0; s <= sequences; ++s) found[s] = s * length;
  return found;
}

// Of x [T, E] or [S, K, E].
static Starts starts(const std::optional<Tensor>& cu, const Tensor& x) {
  return starts(cu, x.size(0), x.size(0), x.size(1));
}

// The element at which each sequence of x [T, E] or [S, K, E] begins.
static Starts offsets(const Tensor& x, const Starts& start) {
  Starts found(start.size());
  for (size_t s = 0; s < start.size(); ++s)
    found[s] = (x.dim() == 2 ? start[s] : static_cast<int64_t>(s)) * x.stride(0);
  return found;
}

static AssembledRows assembled(const Starts& start, const Starts& context_start, int64_t rows,
                               int64_t context_rows, int64_t tokens) {
  const int64_t sequences = static_cast<int64_t>(start.size()) - 1;
  return {start.data(), context_start.data(), sequences, static_cast<int64_t>(context_start.size()) - 1, rows,
          context_rows, sequences / tokens};
}

static Table table(const Tensor& x) { return {x.data(), x.stride(0), x.stride(1), x.dtype}; }

static const int64_t* data_of(const std::optional<Tensor>& ids) {
  return ids ? ids->data<const int64_t>() : nullptr;
}

static Tensor new_rows(const Tensor& like, const std::vector<int64_t>& rows, int64_t channels) {
  return rows.size() == 1 ? like.new_empty({rows[0], channels})
                          : like.new_empty({rows[0], rows[1], channels});
}

static int64_t count(const Tensor& x) { return x.dim() == 2 ? x.size(0) : x.size(0) * x.size(1); }

static Tensor forward_cpu(const Tensor& context, const Tensor& mask_token,
                          const std::optional<Tensor>& context_ids, const std::optional<Tensor>& target_ids,
                          const std::optional<Tensor>& pos_embed, const std::optional<Tensor>& context_cu,
                          const std::optional<Tensor>& target_cu, const std::optional<Tensor>& cu,
                          const std::vector<int64_t>& rows) {
  const int64_t channels = context.size(-1), tokens = mask_token.size(0);
  Tensor out = new_rows(context, rows, channels);
  const int64_t targets = target_ids ? target_ids->numel() : 0;
  const Starts start = starts(cu, rows[0], rows[0], rows.back()), context_start = starts(context_cu, context);
  const Starts target_start = starts(target_cu, targets, rows[0], rows.back() - context.size(-2));
  const Starts context_offset = offsets(context, context_start);
  std::vector<float> token_rows(tokens * channels);
  const AssembleTokensForwardParams params{
      assembled(start, context_start, count(out), count(context), tokens),
      {context.data(), context_offset.data(), context.stride(-2), context.stride(-1)},
      data_of(context_ids),
      data_of(target_ids),
      target_start.data(),
      targets,
      table(mask_token),
      pos_embed ? table(*pos_embed) : Table{},
      tokens,
      pos_embed ? pos_embed->size(0) : 0,
      token_rows.data(),
      out.data(),
      channels,
      context.dtype,
      torch_threads()};
  py::gil_scoped_release nogil;
  assemble_tokens_forward_cpu(params);
  return out;
}

// The parts of each sequence's targets.
static Starts parts_of(const Starts& start, const Starts& context_start) {
  const size_t contexts = context_start.size() - 1;
  Starts first{0};
  for (size_t s = 0; s + 1 < start.size(); ++s) {
    const size_t c = s % contexts;
    const int64_t targets = start[s + 1] - start[s] - (context_start[c + 1] - context_start[c]);
    first.push_back(first.back() + (std::max<int64_t>(targets, 0) + TARGET_PART - 1) / TARGET_PART);
  }
  return first;
}

static std::pair<Tensor, Tensor> backward_cpu(const Tensor& grad, const std::vector<int64_t>& context_rows,
                                              const std::optional<Tensor>& context_cu,
                                              const std::optional<Tensor>& cu, int64_t tokens,
                                              const std::array<bool, 2>& wanted) {
  const int64_t channels = grad.size(-1);
  const Starts start = starts(cu, grad);
  const Starts context_start = starts(context_cu, context_rows[0], context_rows[0], context_rows.back());
  const Starts grad_offset = offsets(grad, start), first_part = parts_of(start, context_start);
  Tensor dcontext = wanted[0] ? new_rows(grad, context_rows, channels) : grad.new_empty({0});
  Tensor dmask_token =
      wanted[1] ? grad.new_empty({tokens, channels}, DType::f32) : grad.new_empty({0}, DType::f32);
  std::vector<float> parts(wanted[1] ? first_part.back() * channels : 0);
  const int64_t rows = context_rows.size() == 1 ? context_rows[0] : context_rows[0] * context_rows[1];
  const AssembleTokensBackwardParams params{
      assembled(start, context_start, count(grad), rows, tokens),
      {grad.data(), grad_offset.data(), grad.stride(-2), grad.stride(-1)},
      wanted[0] ? dcontext.data() : nullptr,
      wanted[1] ? dmask_token.data<float>() : nullptr,
      first_part.data(),
      parts.data(),
      tokens,
      channels,
      grad.dtype,
      torch_threads()};
  {
    py::gil_scoped_release nogil;
    assemble_tokens_backward_cpu(params);
  }
  return {dcontext, dmask_token};
}

} // namespace assemble_tokens_bindings

void bind_assemble_tokens(py::module_& m) {
  using namespace assemble_tokens_bindings;
  m.def("assemble_tokens_forward_cpu", &forward_cpu);
  m.def("assemble_tokens_backward_cpu", &backward_cpu);
}

} // namespace jepa
