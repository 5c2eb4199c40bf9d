#include "common/tensor_lists.h"

#include <algorithm>

#include "common/dlpack.h"

namespace jepa {

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
  entries_.push_back({dlpack::address_of(t), dlpack::numel_of(t), dlpack::dtype_of(t)});
  const bool dense = dlpack::is_contiguous(t);
  const size_t begin = facts_.size();
  facts_.resize(begin + count_of_facts(t, dense)); // one growth for a tensor
  write_facts(t, dense, facts_.data() + begin);
  return true;
}

// What a list or a tuple holds; it must stay.
struct Items {
  explicit Items(py::handle list)
      : list(
            py::reinterpret_steal<py::object>(PySequence_Fast(list.ptr(), "lists must be lists or tuples"))) {
    if (!this->list) throw py::error_already_set();
  }
  PyObject** begin() const { return PySequence_Fast_ITEMS(list.ptr()); }
  PyObject** end() const { return begin() + count(); }
  int64_t count() const { return PySequence_Fast_GET_SIZE(list.ptr()); }

  py::object list;
};

std::optional<TensorLists> TensorLists::read(const py::object& lists, bool plain) {
  TensorLists found;
  const Items all(lists);
  found.ends_.reserve(all.count());
  found.entries_.reserve(all.count());
  found.facts_.reserve(all.count() * 8); // of a tensor each; more double it
  for (const py::handle list : all) {
    const Items items(list);
    found.facts_.push_back(items.count());
    for (const py::handle tensor : items) {
      if (plain && !dlpack::is_plain(tensor)) return {};
      if (found.add(tensor)) continue;
      if (!plain) throw py::error_already_set();
      PyErr_Clear();
      return {};
    }
    found.ends_.push_back(found.entries_.size());
  }
  return found;
}

bool TensorLists::holds(const py::object& lists) const {
  std::vector<int64_t> now;
  size_t at = 0;
  const auto same = [&](const int64_t* facts, size_t count) {
    const bool found = at + count <= facts_.size() && std::equal(facts, facts + count, facts_.data() + at);
    at += count;
    return found;
  };
  for (const py::handle list : Items(lists)) {
    const Items items(list);
    const int64_t count = items.count();
    if (!same(&count, 1)) return false;
    for (const py::handle tensor : items) {
      dlpack::Tensor t;
      if (!dlpack::is_plain(tensor)) return false;
      if (dlpack::exchange().read(tensor.ptr(), &t)) {
        PyErr_Clear();
        return false;
      }
      const bool dense = dlpack::is_contiguous(t);
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
  const size_t n = std::min<size_t>(facts_.size(), 16);
  for (size_t i = 0; i < n; ++i) mixed = (mixed ^ static_cast<size_t>(facts_[i])) * 0x9E3779B97F4A7C15u;
  return mixed ^ mixed >> 29;
}

} // namespace jepa
