#include "common/sizes_of.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <sstream>
#include <string_view>

namespace jepa {

constexpr std::array<std::string_view, 7> TYPES = {
    {"float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8"}}; // in the order of DType
constexpr unsigned FLOATING = 0b1111;
constexpr int LETTERS = 26;

static unsigned bit(DType type) { return 1U << static_cast<unsigned>(type); }

// What the tensors before told.
struct SizesOf::Found {
  std::array<int64_t, LETTERS> sizes; // -1: nothing
  std::array<DType, LETTERS> types;   // other: nothing
  int64_t none = 0;                   // the size beside a number
  int32_t device_type = 0, device_index = 0;

  Found() { sizes.fill(-1), types.fill(DType::other); }
};

SizesOf::SizesOf(const std::vector<std::string>& tensors) {
  for (const std::string& text : tensors) {
    std::istringstream words(text);
    tensors_.emplace_back();
    for (std::string word; words >> word;) add(tensors_.back(), word);
  }
}

// "..." and "contiguous"; an axis, as "B", "S+1" or "3"; or types, as "int64" or "f|uint8|None".
void SizesOf::add(Told& told, const std::string& word) {
  if (word == "...") {
    told.any_shape = true;
  } else if (word == "contiguous") {
    told.contiguous = true;
  } else if (std::isdigit(word[0])) {
    told.axes.push_back({-1, std::stoi(word)});
  } else if (std::isupper(word[0])) {
    if (letters_.find(word[0]) == std::string::npos) letters_ += word[0];
    told.axes.push_back(
        {static_cast<int>(letters_.find(word[0])), word.size() > 1 ? std::stoi(word.substr(1)) : 0});
  } else {
    told.any_type = false;
    std::istringstream types(word);
    for (std::string type; std::getline(types, type, '|');) {
      const size_t known = std::find(TYPES.begin(), TYPES.end(), type) - TYPES.begin();
      if (known < TYPES.size())
        told.types |= 1U << known;
      else if (type.size() == 1 && std::islower(type[0]))
        told.like = type[0] - 'a';
      else if (type == "None")
        told.optional = true;
      else
        throw py::value_error("sizes_of: no type is called " + type);
    }
  }
}

bool SizesOf::fits(const Told& told, const dlpack::Tensor& t, Found& found) {
  if (!found.device_type) found.device_type = t.device_type, found.device_index = t.device_index;
  if (t.device_type != found.device_type || t.device_index != found.device_index) return false;
  if (t.device_type != dlpack::CPU && t.device_type != dlpack::CUDA) return false;
  const DType type = dlpack::dtype_of(t);
  if (!told.any_type && !(told.types & bit(type))) {
    if (told.like < 0 || !(FLOATING & bit(type))) return false;
    DType& known = found.types[told.like];
    if (known == DType::other) known = type;
    if (known != type) return false;
  }
  if (told.contiguous && !dlpack::is_contiguous(t)) return false;
  if (told.any_shape) return true;
  if (t.dims != static_cast<int>(told.axes.size())) return false;
  for (int d = 0; d < t.dims; ++d) {
    const auto [letter, more] = told.axes[d];
    const int64_t size = t.shape[d] - more;
    int64_t& known = letter < 0 ? found.none : found.sizes[letter];
    if (known < 0) known = size;
    if (size < 0 || known != size) return false;
  }
  return true;
}

py::object SizesOf::sizes(const py::args& tensors) const {
  if (tensors.size() != tensors_.size())
    throw py::type_error("sizes_of: as many tensors must be given as were told of");
  Found found;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const py::handle tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
    if (tensor.is_none() && tensors_[i].optional) continue;
    dlpack::Tensor t;
    if (!dlpack::is_plain(tensor)) return py::none();
    if (dlpack::exchange().read(tensor.ptr(), &t)) { // no memory, or none of one stride an axis
      PyErr_Clear();
      return py::none();
    }
    if (!fits(tensors_[i], t, found)) return py::none();
  }
  py::tuple sizes(letters_.size());
  for (size_t i = 0; i < letters_.size(); ++i) {
    py::object size = found.sizes[i] < 0 ? py::object(py::none()) : py::int_(found.sizes[i]);
    PyTuple_SET_ITEM(sizes.ptr(), i, size.release().ptr());
  }
  return sizes;
}

} // namespace jepa
