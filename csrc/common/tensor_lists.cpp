#include "common/tensor_lists.h"

#include <algorithm>

#include "common/dlpack.h"

namespace jepa {

static bool contiguous(const dlpack::Tensor& t) {
  int64_t expected = 1;
  for (int d = t.dims - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

static bool is_plain(py::handle object) {
  static const py::handle tensor = py::object(py::module_::import("torch").attr("Tensor")).release();
  static const py::handle parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release();
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == tensor.ptr() || type == parameter.ptr();
}

static size_t count_of_facts(const dlpack::Tensor& t, bool dense) {
  return 4 + static_cast<size_t>(t.dims) * (dense ? 1 : 2);
}

// Where and what the tensor is: that many numbers.
static void write_facts(const dlpack::Tensor& t, bool dense, int64_t* fact) {
  *fact++ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dlpack::address_of(t)));
  *fact++ = int64_t{t.device_type} << 32 | t.device_index;
  *fact++ = int64_t{t.code} << 32 | int64_t{t.bits} << 16 | t.lanes;
  *fact++ = int64_t{t.dims} << 1 | dense;
  fact = std::copy_n(t.shape, t.dims, fact);
  if (!dense) std::copy_n(t.strides, t.dims, fact);
}

bool TensorLists::add(py::handle object) {
  dlpack::Tensor t;
  if (dlpack::exchange().read(object.ptr(), &t)) return false;
  lists_.back().push_back({dlpack::address_of(t), dlpack::numel_of(t), dlpack::dtype_of(t)});
  const bool dense = contiguous(t);
  const size_t begin = facts_.size();
  facts_.resize(begin + count_of_facts(t, dense)); // one growth for a tensor
  write_facts(t, dense, facts_.data() + begin);
  return true;
}

static py::object items_of(const py::object& list) {
  const auto items =
      py::reinterpret_steal<py::object>(PySequence_Fast(list.ptr(), "lists must be lists or tuples"));
  if (!items) throw py::error_already_set();
  return items;
}

std::optional<TensorLists> TensorLists::read(const std::vector<py::object>& lists, bool plain) {
  TensorLists found;
  for (const py::object& list : lists) {
    const py::object items = items_of(list);
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

bool TensorLists::holds(const std::vector<py::object>& lists) const {
  std::vector<int64_t> now;
  size_t at = 0;
  const auto same = [&](const int64_t* facts, size_t count) {
    const bool found = at + count <= facts_.size() && std::equal(facts, facts + count, facts_.data() + at);
    at += count;
    return found;
  };
  for (const py::object& list : lists) {
    const py::object items = items_of(list);
    const int64_t count = PySequence_Fast_GET_SIZE(items.ptr());
    if (!same(&count, 1)) return false;
    for (int64_t i = 0; i < count; ++i) {
      const py::handle tensor = PySequence_Fast_GET_ITEM(items.ptr(), i);
      dlpack::Tensor t;
      if (!is_plain(tensor)) return false;
      if (dlpack::exchange().read(tensor.ptr(), &t)) {
        PyErr_Clear();
        return false;
      }
      const bool dense = contiguous(t);
      const size_t facts = count_of_facts(t, dense);
      if (now.size() < facts) now.resize(facts);
      write_facts(t, dense, now.data());
      if (!same(now.data(), facts)) return false;
    }
  }
  return at == facts_.size();
}

// Of the first tensors alone: equality reads the rest.
size_t TensorLists::hash() const {
  size_t mixed = facts_.size();
  const size_t n = std::min<size_t>(facts_.size(), 64);
  for (size_t i = 0; i < n; ++i) mixed = (mixed ^ static_cast<size_t>(facts_[i])) * 0x9E3779B97F4A7C15u;
  return mixed ^ mixed >> 29;
}

} // namespace jepa
