// The Python module: one line per op.
#include <pybind11/pybind11.h>

#include "common/dispatch.h"

namespace py = pybind11;

namespace jepa {
void bind_common(py::module_&);
void bind_adamw_ema(py::module_&);
void bind_assemble_tokens(py::module_&);
void bind_collapse_stats(py::module_&);
void bind_distance_weights(py::module_&);
void bind_ema_update(py::module_&);
void bind_embed_patches(py::module_&);
void bind_gather_tokens(py::module_&);
void bind_grad_norm(py::module_&);
void bind_info_nce(py::module_&);
void bind_latent_loss(py::module_&);
void bind_linear(py::module_&);
void bind_masked_attention(py::module_&);
void bind_masks(py::module_&);
void bind_peaks(py::module_&);
void bind_rope(py::module_&);
void bind_sigreg(py::module_&);
} // namespace jepa

PYBIND11_MODULE(_C, m) {
  m.doc() = "jepa_kernels: CPU and CUDA kernels. Private: call the ops in jepa_kernels.";
  jepa::bind_common(m);
  jepa::bind_adamw_ema(m);
  jepa::bind_assemble_tokens(m);
  jepa::bind_collapse_stats(m);
  jepa::bind_distance_weights(m);
  jepa::bind_ema_update(m);
  jepa::bind_embed_patches(m);
  jepa::bind_gather_tokens(m);
  jepa::bind_grad_norm(m);
  jepa::bind_info_nce(m);
  jepa::bind_latent_loss(m);
  jepa::bind_linear(m);
  jepa::bind_masked_attention(m);
  jepa::bind_masks(m);
  jepa::bind_peaks(m);
  jepa::bind_rope(m);
  jepa::bind_sigreg(m);
}
