#include "common/dlpack.h"

#include <array>
#include <functional>
#include <numeric>

namespace jepa::dlpack {

namespace py = pybind11;

py::handle look_up(py::handle& kept, const char* module, const char* name) {
  if (!kept) kept = py::object(py::module_::import(module).attr(name)).release();
  return kept;
}

static const Exchange* find_exchange() {
  const py::object table = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<Exchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major != 1) api = api->older;
  if (!api || !api->read || !api->import_owned)
    throw py::import_error("torch.Tensor must offer DLPack 1's table of functions; use a torch from 2.11 on");
  return api;
}

const Exchange& exchange() {
  static const Exchange* found = nullptr; // as `look_up` keeps it
  if (!found) found = find_exchange();
  return *found;
}

Tensor read(py::handle tensor) {
  Tensor found;
  if (exchange().read(tensor.ptr(), &found)) throw py::error_already_set();
  return found;
}

bool is_plain(py::handle object) {
  static py::handle tensor, parameter;
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == look_up(tensor, "torch", "Tensor").ptr() ||
         type == look_up(parameter, "torch.nn", "Parameter").ptr();
}

int64_t numel_of(const Tensor& t) {
  return std::accumulate(t.shape, t.shape + t.dims, int64_t{1}, std::multiplies<>());
}

bool is_contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int d = t.dims - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

struct Kind {
  uint8_t code, bits;
};

// In the order of DType.
constexpr std::array<Kind, 7> KINDS = {
    {{FLOAT, 32}, {BFLOAT, 16}, {FLOAT, 16}, {FLOAT, 64}, {INT, 64}, {INT, 32}, {UINT, 8}}};

DType dtype_of(const Tensor& t) {
  for (size_t i = 0; t.lanes == 1 && i < KINDS.size(); ++i)
    if (t.code == KINDS[i].code && t.bits == KINDS[i].bits) return static_cast<DType>(i);
  return DType::other;
}

void set_dtype(Tensor& t, DType type) {
  const Kind kind = KINDS[static_cast<size_t>(type)];
  t.code = kind.code, t.bits = kind.bits, t.lanes = 1;
}

} // namespace jepa::dlpack
