// torch tensors as bind.cpp sees them: read by attribute, so nothing of torch is needed to build or to link.
#pragma once
#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/dtype.h"
#include "common/rows.h"

namespace jepa {

namespace py = pybind11;

// A module attribute of torch, looked up once; the reference is kept for the process's life.
inline py::handle torch_attribute(const char* name) {
  return py::object(py::module_::import("torch").attr(name)).release();
}

inline PyObject* torch_dtype(DType dtype) {
  static const std::array<PyObject*, 7> table = {
      torch_attribute("float32").ptr(), torch_attribute("bfloat16").ptr(), torch_attribute("float16").ptr(),
      torch_attribute("float64").ptr(), torch_attribute("int64").ptr(),    torch_attribute("int32").ptr(),
      torch_attribute("uint8").ptr()};
  return table[static_cast<size_t>(dtype)];
}

// torch.get_num_threads(): a fresh Python thread's OpenMP default differs from it.
inline int torch_threads() {
  static const py::handle get = torch_attribute("get_num_threads");
  return get().cast<int>();
}

struct Tensor {
  static constexpr int MAX_DIM = 6;

  py::object obj;
  void* address = nullptr;
  DType dtype = DType::other;
  int dims = 0;
  std::array<int64_t, MAX_DIM> sizes{}, strides{}; // strides in elements

  template <class T = void> T* data() const { return static_cast<T*>(address); }
  int dim() const { return dims; }
  int64_t size(int i) const { return sizes[i < 0 ? i + dims : i]; }
  int64_t stride(int i) const { return strides[i < 0 ? i + dims : i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= sizes[i];
    return n;
  }

  // The index of a CUDA tensor's device; -1 on the CPU.
  int device_index() const {
    const py::object index = obj.attr("device").attr("index");
    return index.is_none() ? -1 : index.cast<int>();
  }

  static Tensor from(py::handle h) {
    static const py::str data_ptr("data_ptr"), shape("shape"), stride("stride"), dtype("dtype");
    Tensor t;
    t.obj = py::reinterpret_borrow<py::object>(h);
    t.address = reinterpret_cast<void*>(py::object(h.attr(data_ptr)()).cast<uintptr_t>());
    const py::tuple shapes = h.attr(shape), steps = h.attr(stride)();
    t.dims = static_cast<int>(shapes.size());
    if (t.dims > MAX_DIM) throw py::value_error("jepa_kernels: tensors must have at most 6 dimensions");
    for (int i = 0; i < t.dims; ++i) {
      t.sizes[i] = shapes[i].cast<int64_t>();
      t.strides[i] = steps[i].cast<int64_t>();
    }
    const py::object type = h.attr(dtype);
    for (int i = 0; i < 7; ++i)
      if (type.ptr() == torch_dtype(static_cast<DType>(i))) t.dtype = static_cast<DType>(i);
    return t;
  }

  // Allocated by torch, on this tensor's device, through the Python method (so poisoned memory reaches us
  // too).
  Tensor new_empty(std::initializer_list<int64_t> shape, std::optional<DType> type = {}) const {
    return allocate("new_empty", shape, type);
  }
  Tensor new_zeros(std::initializer_list<int64_t> shape, std::optional<DType> type = {}) const {
    return allocate("new_zeros", shape, type);
  }

private:
  Tensor allocate(const char* method, std::initializer_list<int64_t> shape, std::optional<DType> type) const {
    py::tuple dimensions(shape.size());
    size_t i = 0;
    for (int64_t n : shape) dimensions[i++] = n;
    const py::object dt =
        type ? py::reinterpret_borrow<py::object>(torch_dtype(*type)) : py::object(obj.attr("dtype"));
    return from(obj.attr(method)(dimensions, py::arg("dtype") = dt));
  }
};

// ids [M, K], [T] with cu_seqlens, or none: all `count` tokens of each of `batch` images.
inline KeptRows kept_rows(const std::optional<Tensor>& ids, const std::optional<Tensor>& cu, int64_t batch,
                          int64_t count) {
  if (!ids) return {nullptr, nullptr, batch, count, batch * count, batch, count};
  return {ids->data<int64_t>(),
          cu ? cu->data<int32_t>() : nullptr,
          cu ? cu->size(0) - 1 : ids->size(0),
          cu ? 0 : ids->size(1),
          ids->numel(),
          batch,
          count};
}

} // namespace jepa

namespace pybind11::detail {

template <> struct type_caster<jepa::Tensor> {
  PYBIND11_TYPE_CASTER(jepa::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (source.is_none() || !hasattr(source, "data_ptr")) return false;
    value = jepa::Tensor::from(source);
    return true;
  }
  static handle cast(const jepa::Tensor& t, return_value_policy, handle) { return object(t.obj).release(); }
};

} // namespace pybind11::detail
