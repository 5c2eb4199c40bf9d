// Lists of many torch tensors, each read once: an attribute at a time, a thousand would cost a millisecond.
#pragma once
#include <cstdint>
#include <optional>
#include <pybind11/pybind11.h>
#include <vector>

#include "common/dtype.h"

namespace jepa {

namespace py = pybind11;

class TensorLists {
public:
  struct Entry {
    void* address;
    int64_t numel;
    DType dtype;
  };

  // lists: of lists or tuples. `plain`: nothing where an entry is another class than Tensor and Parameter, or
  // has no memory to read.
  static std::optional<TensorLists> read(const std::vector<py::object>& lists, bool plain);

  // Whether a plain read of these lists would tell the same; it makes nothing and stops at what differs.
  bool holds(const std::vector<py::object>& lists) const;

  const std::vector<Entry>& operator[](size_t list) const { return lists_[list]; }

  // Of everything read, shapes, strides' order and devices included.
  bool operator==(const TensorLists& other) const { return facts_ == other.facts_; }
  size_t hash() const;

private:
  bool add(py::handle tensor);

  std::vector<std::vector<Entry>> lists_;
  std::vector<int64_t> facts_;
};

} // namespace jepa
