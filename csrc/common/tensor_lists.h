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
  static std::optional<TensorLists> read(const py::object& lists, bool plain);

  // Whether a plain read of these lists would tell the same; it makes nothing and stops at what differs.
  bool holds(const py::object& lists) const;

  struct List {
    const Entry *first, *last;

    const Entry* begin() const { return first; }
    const Entry* end() const { return last; }
    size_t size() const { return static_cast<size_t>(last - first); }
    bool empty() const { return first == last; }
    const Entry& at(size_t i) const {
      if (i >= size()) throw py::index_error("jepa_kernels: lists must be as long as the first");
      return first[i];
    }
  };

  List operator[](size_t list) const {
    return {entries_.data() + (list ? ends_[list - 1] : 0), entries_.data() + ends_[list]};
  }

  // Of everything read, shapes, strides' order and devices included.
  bool operator==(const TensorLists& other) const { return facts_ == other.facts_; }
  size_t hash() const;

private:
  bool add(py::handle tensor);

  std::vector<Entry> entries_; // of all lists, and where each list's end: few allocations
  std::vector<size_t> ends_;
  std::vector<int64_t> facts_;
};

} // namespace jepa
