// torch tensors as bind.cpp sees them: read by DLPack's table, so that torch is needed neither to build nor
// to link.
#pragma once
#include <array>
#include <optional>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "common/rows.h"

namespace jepa {

namespace py = pybind11;

// The element type of a torch.dtype; `other` for None.
DType dtype_of(py::handle type);

// Bytes of an element; 0 for `other`.
int64_t size_of(DType type);

// torch.get_num_threads(): a fresh Python thread's OpenMP default differs from it.
int torch_threads();

// One attribute of a tensor, for lists of many.
void* address_of(py::handle tensor);
int64_t numel_of(py::handle tensor);

// `other`: of no number, as of void, char and structs.
template <class T> constexpr DType dtype_of_number = DType::other;
template <> constexpr DType dtype_of_number<float> = DType::f32;
template <> constexpr DType dtype_of_number<double> = DType::f64;
template <> constexpr DType dtype_of_number<int64_t> = DType::i64;
template <> constexpr DType dtype_of_number<int32_t> = DType::i32;

struct Tensor {
  static constexpr int MAX_DIM = 6;

  py::object obj;
  void* address = nullptr;
  DType dtype = DType::other;
  int device = -1; // the index of a CUDA device; -1: the CPU
  int dims = 0;
  std::array<int64_t, MAX_DIM> sizes{}, strides{}; // strides in elements

  // Of numbers: throws where a tensor that is not empty has others.
  template <class T = void> T* data() const {
    constexpr DType told = dtype_of_number<std::remove_const_t<T>>;
    if (told != DType::other && told != dtype) refuse_unless_empty(told);
    return static_cast<T*>(address);
  }
  int dim() const { return dims; }
  int64_t size(int i) const { return sizes[i < 0 ? i + dims : i]; }
  int64_t stride(int i) const { return strides[i < 0 ? i + dims : i]; }
  std::vector<int64_t> shape() const { return {sizes.begin(), sizes.begin() + dims}; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= sizes[i];
    return n;
  }

  // The stream that torch works on at present, on this CUDA tensor's device.
  void* stream() const;

  static bool is(py::handle h);
  static Tensor from(py::handle h);

  // Allocated by torch, on this tensor's device, through the Python method (so poisoned memory reaches us
  // too); large ones on a CPU in a block of ours.
  Tensor new_empty(const std::vector<int64_t>& shape, std::optional<DType> type = {}) const;
  Tensor new_zeros(const std::vector<int64_t>& shape, std::optional<DType> type = {}) const {
    return allocate("new_zeros", shape, type);
  }

private:
  void refuse_unless_empty(DType told) const;
  Tensor allocate(const char* method, const std::vector<int64_t>& shape, std::optional<DType> type) const;
};

// Where runs start on a packed axis of `rows` rows, copied from cu_seqlens: from 0, never falling, never past
// `rows`. Wrong values in the caller's tensor give wrong results, and no access outside any tensor.
class Runs {
public:
  Runs(const std::optional<Tensor>& cu_seqlens, int64_t rows);
  const int32_t* starts() const { return starts_.empty() ? nullptr : starts_.data(); } // null: no cu_seqlens
  int64_t count() const { return static_cast<int64_t>(starts_.size()) - 1; }
  int64_t length(int64_t run) const { return starts_[run + 1] - starts_[run]; }

private:
  std::vector<int32_t> starts_;
};

// ids [M, K], [T] with packed runs, or none: all `count` tokens of each of `batch` images.
inline KeptRows kept_rows(const std::optional<Tensor>& ids, const Runs& runs, int64_t batch, int64_t count) {
  const bool packed = runs.starts();
  if (!ids) return {nullptr, nullptr, batch, count, batch * count, batch, count};
  return {ids->data<int64_t>(),
          runs.starts(),
          packed ? runs.count() : ids->size(0),
          packed ? 0 : ids->size(1),
          ids->numel(),
          batch,
          count};
}

} // namespace jepa

namespace pybind11::detail {

template <> struct type_caster<jepa::Tensor> {
  PYBIND11_TYPE_CASTER(jepa::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (!jepa::Tensor::is(source)) return false;
    value = jepa::Tensor::from(source);
    return true;
  }
  static handle cast(const jepa::Tensor& t, return_value_policy, handle) { return object(t.obj).release(); }
};

} // namespace pybind11::detail
