#include "common/tensor.h"

#include <algorithm>

#include "common/blocks.h"
#include "common/dlpack.h"

namespace jepa {

static py::handle interned(const char* name) {
  PyObject* found = PyUnicode_InternFromString(name);
  if (!found) throw py::error_already_set();
  return found;
}

static PyObject* torch_dtype(DType dtype) {
  static constexpr std::array<const char*, 7> names = {"float32", "bfloat16", "float16", "float64",
                                                       "int64",   "int32",    "uint8"};
  static std::array<py::handle, 7> table;
  const auto i = static_cast<size_t>(dtype);
  return dlpack::look_up(table[i], "torch", names[i]).ptr();
}

DType dtype_of(py::handle type) {
  for (int i = 0; i < static_cast<int>(DType::other); ++i)
    if (type.ptr() == torch_dtype(static_cast<DType>(i))) return static_cast<DType>(i);
  return DType::other;
}

int64_t size_of(DType type) {
  constexpr std::array<int64_t, 8> sizes = {4, 2, 2, 8, 8, 4, 1, 0};
  return sizes[static_cast<size_t>(type)];
}

static py::object call(py::handle object, py::handle method) {
  PyObject* found = PyObject_CallMethodNoArgs(object.ptr(), method.ptr());
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

void* address_of(py::handle tensor) {
  static const py::handle data_ptr = interned("data_ptr");
  return reinterpret_cast<void*>(call(tensor, data_ptr).cast<uintptr_t>());
}

int64_t numel_of(py::handle tensor) {
  static const py::handle numel = interned("numel");
  return call(tensor, numel).cast<int64_t>();
}

int torch_threads() {
  static py::handle get;
  return dlpack::look_up(get, "torch", "get_num_threads")().cast<int>();
}

void Tensor::refuse_unless_empty(DType told) const {
  if (numel() == 0) return;
  throw py::type_error("jepa_kernels: a kernel's tensor must be " +
                       py::repr(torch_dtype(told)).cast<std::string>() + ", got " +
                       py::repr(obj.attr("dtype")).cast<std::string>() + "; call the public function");
}

void* Tensor::stream() const {
  static py::handle current;
  const py::object found = dlpack::look_up(current, "torch.cuda", "current_stream")(obj.attr("device"));
  return reinterpret_cast<void*>(found.attr("cuda_stream").cast<uintptr_t>());
}

Tensor Tensor::from(py::handle h) {
  const dlpack::Tensor seen = dlpack::read(h);
  if (seen.dims > MAX_DIM) throw py::value_error("jepa_kernels: tensors must have at most 6 dimensions");
  Tensor t;
  t.obj = py::reinterpret_borrow<py::object>(h);
  t.address = dlpack::address_of(seen);
  if (seen.device_type == dlpack::CUDA) t.device = seen.device_index;
  t.dims = seen.dims;
  std::copy_n(seen.shape, seen.dims, t.sizes.begin());
  std::copy_n(seen.strides, seen.dims, t.strides.begin());
  t.dtype = dlpack::dtype_of(seen);
  return t;
}

bool Tensor::is(py::handle h) {
  static const py::handle data_ptr = interned("data_ptr");
  return !h.is_none() && hasattr(h, data_ptr);
}

Runs::Runs(const std::optional<Tensor>& cu_seqlens, int64_t rows) {
  if (!cu_seqlens) return;
  if (cu_seqlens->dtype != DType::i32 || cu_seqlens->dim() != 1)
    throw py::type_error("jepa_kernels: cu_seqlens must be int32 [S + 1], got " +
                         py::repr(cu_seqlens->obj.attr("dtype")).cast<std::string>() + " with " +
                         std::to_string(cu_seqlens->dim()) + " dimensions; build a Packing");
  starts_.reserve(cu_seqlens->size(0));
  starts_.push_back(0);
  for (int64_t s = 1; s < cu_seqlens->size(0); ++s) {
    const int64_t end = cu_seqlens->data<const int32_t>()[s * cu_seqlens->stride(0)];
    starts_.push_back(static_cast<int32_t>(std::clamp<int64_t>(end, starts_.back(), rows)));
  }
}

// Whether torch is asked to fill what nobody has written: its own method does.
static bool filled() {
  static py::handle asked;
  return dlpack::look_up(asked, "torch", "are_deterministic_algorithms_enabled")().cast<bool>();
}

// An output in a block: torch's reference to it, and what is told of it, which end together.
struct LargeOutput {
  dlpack::Managed managed{};
  OutputBlock block;
  std::array<int64_t, Tensor::MAX_DIM> shape{}, strides{};

  static void end(dlpack::Managed* managed) {
    auto* own = static_cast<LargeOutput*>(managed->owner);
    leave_block(own->block);
    delete own;
  }
};

// None: the system has no memory, which torch's own method says best.
static py::object large_output(const std::vector<int64_t>& shape, DType type, int64_t bytes) {
  const OutputBlock block = take_block(bytes);
  if (!block.address) return py::none();
  auto* own = new LargeOutput;
  own->block = block;
  const int dims = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int d = dims - 1; d >= 0; --d) {
    own->shape[d] = shape[d], own->strides[d] = stride;
    stride *= shape[d];
  }
  dlpack::Managed& m = own->managed;
  m.major = 1, m.owner = own, m.end = &LargeOutput::end;
  m.tensor = {block.address, dlpack::CPU, 0, dims, 0, 0, 1, own->shape.data(), own->strides.data(), 0};
  dlpack::set_dtype(m.tensor, type);
  void* object = nullptr;
  if (dlpack::exchange().import_owned(&m, &object))
    throw py::error_already_set(); // it may have torch's by then
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

Tensor Tensor::new_empty(const std::vector<int64_t>& shape, std::optional<DType> type) const {
  const DType element = type.value_or(dtype);
  int64_t bytes = size_of(element);
  bool counted = true; // else torch says what is wrong
  for (int64_t n : shape) counted = counted && !__builtin_mul_overflow(bytes, n, &bytes);
  if (counted && bytes >= LARGE_BLOCK && bytes < LARGEST_BLOCK && obj.attr("is_cpu").cast<bool>() &&
      !filled()) {
    const py::object found = large_output(shape, element, bytes);
    if (!found.is_none()) return from(found);
  }
  return allocate("new_empty", shape, type);
}

Tensor Tensor::allocate(const char* method, const std::vector<int64_t>& shape,
                        std::optional<DType> type) const {
  py::tuple dimensions(shape.size());
  size_t i = 0;
  for (int64_t n : shape) dimensions[i++] = n;
  const py::object dt =
      type ? py::reinterpret_borrow<py::object>(torch_dtype(*type)) : py::object(obj.attr("dtype"));
  return from(obj.attr(method)(dimensions, py::arg("dtype") = dt));
}

} // namespace jepa
