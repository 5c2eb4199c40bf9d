// What the tensors of most calls of an op are, told in letters: `sizes_of` of jepa_kernels/_core/check.py.
#pragma once
#include <pybind11/pybind11.h>
#include <string>
#include <vector>

#include "common/dlpack.h"

namespace jepa {

namespace py = pybind11;

class SizesOf {
public:
  explicit SizesOf(const std::vector<std::string>& tensors);

  // The sizes that the letters stand for, a tuple; None where a tensor is another than told.
  py::object sizes(const py::args& tensors) const;

private:
  struct Axis {
    int letter; // its place in the tuple; -1: a number alone
    int64_t more;
  };
  struct Told {
    std::vector<Axis> axes;
    unsigned types = 0; // a bit for each DType
    int like = -1;      // the letter of a floating type
    bool any_type = true, any_shape = false, contiguous = false, optional = false;
  };
  struct Found;

  void add(Told& told, const std::string& word);
  static bool fits(const Told& told, const dlpack::Tensor& t, Found& found);

  std::vector<Told> tensors_;
  std::string letters_;
};

} // namespace jepa
