#include "common/tensor_lists.h"

#include <algorithm>

namespace jepa {

// What is needed of DLPack 1.x, and of the table of C functions that torch.Tensor offers for it: the fields
// up to the one function called, in the standard's order.
namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides; // the tensor's own, in elements
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  void *allocate, *export_owned, *import_owned;
  int (*read)(void* object, Tensor* out); // borrows: no reference counts, no sync
};

enum Code : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4 };

static const Exchange& exchange() {
  static const Exchange* const found = [] {
    const py::object table = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<Exchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    while (api && api->major != 1) api = api->older;
    if (!api || !api->read)
      throw py::import_error(
          "torch.Tensor must offer DLPack 1's table of functions; use a torch from 2.11 on");
    return api;
  }();
  return *found;
}

static DType dtype_of(const Tensor& t) {
  if (t.lanes != 1) return DType::other;
  switch (t.code << 8 | t.bits) {
  case FLOAT << 8 | 32:
    return DType::f32;
  case BFLOAT << 8 | 16:
    return DType::bf16;
  case FLOAT << 8 | 16:
    return DType::f16;
  case FLOAT << 8 | 64:
    return DType::f64;
  case INT << 8 | 64:
    return DType::i64;
  case INT << 8 | 32:
    return DType::i32;
  case UINT << 8 | 8:
    return DType::u8;
  default:
    return DType::other;
  }
}

static bool contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int d = t.dims - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

} // namespace dlpack

static bool is_plain(py::handle object) {
  static const py::handle tensor = py::object(py::module_::import("torch").attr("Tensor")).release();
  static const py::handle parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release();
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == tensor.ptr() || type == parameter.ptr();
}

bool TensorLists::add(py::handle object) {
  dlpack::Tensor t;
  if (dlpack::exchange().read(object.ptr(), &t)) return false;
  int64_t numel = 1;
  for (int d = 0; d < t.dims; ++d) numel *= t.shape[d];
  void* address = static_cast<char*>(t.data) + t.byte_offset;
  lists_.back().push_back({address, numel, dlpack::dtype_of(t)});
  const bool contiguous = dlpack::contiguous(t);
  const size_t begin = facts_.size();
  facts_.resize(begin + 4 + static_cast<size_t>(t.dims) * (contiguous ? 1 : 2)); // one growth for a tensor
  int64_t* fact = facts_.data() + begin;
  *fact++ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
  *fact++ = int64_t{t.device_type} << 32 | t.device_index;
  *fact++ = int64_t{t.code} << 32 | int64_t{t.bits} << 16 | t.lanes;
  *fact++ = int64_t{t.dims} << 1 | contiguous;
  fact = std::copy_n(t.shape, t.dims, fact);
  if (!contiguous) std::copy_n(t.strides, t.dims, fact);
  return true;
}

std::optional<TensorLists> TensorLists::read(const std::vector<py::object>& lists, bool plain) {
  TensorLists found;
  for (const py::object& list : lists) {
    const auto items =
        py::reinterpret_steal<py::object>(PySequence_Fast(list.ptr(), "lists must be lists or tuples"));
    if (!items) throw py::error_already_set();
    const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
    found.facts_.push_back(static_cast<int64_t>(count));
    found.facts_.reserve(found.facts_.size() + count * 6);
    found.lists_.emplace_back().reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const py::handle tensor = PySequence_Fast_GET_ITEM(items.ptr(), i);
      if (plain && !is_plain(tensor)) return {};
      if (found.add(tensor)) continue;
      if (!plain) throw py::error_already_set();
      PyErr_Clear();
      return {};
    }
  }
  return found;
}

// Of the first tensors alone: equality reads the rest.
size_t TensorLists::hash() const {
  size_t mixed = facts_.size();
  const size_t n = std::min<size_t>(facts_.size(), 64);
  for (size_t i = 0; i < n; ++i) mixed = (mixed ^ static_cast<size_t>(facts_[i])) * 0x9E3779B97F4A7C15u;
  return mixed ^ mixed >> 29;
}

} // namespace jepa
