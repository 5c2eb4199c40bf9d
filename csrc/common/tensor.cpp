#include "common/tensor.h"

#include <algorithm>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jepa {

// What is looked up once keeps its reference for the process's life: a static object's destructor would give
// it up when the interpreter is gone.
static py::handle torch_attribute(const char* name) {
  return py::object(py::module_::import("torch").attr(name)).release();
}

static py::handle interned(const char* name) {
  PyObject* found = PyUnicode_InternFromString(name);
  if (!found) throw py::error_already_set();
  return found;
}

static PyObject* torch_dtype(DType dtype) {
  static const std::array<PyObject*, 7> table = {
      torch_attribute("float32").ptr(), torch_attribute("bfloat16").ptr(), torch_attribute("float16").ptr(),
      torch_attribute("float64").ptr(), torch_attribute("int64").ptr(),    torch_attribute("int32").ptr(),
      torch_attribute("uint8").ptr()};
  return table[static_cast<size_t>(dtype)];
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
  static const py::handle get = torch_attribute("get_num_threads");
  return get().cast<int>();
}

int Tensor::device_index() const {
  const py::object index = obj.attr("device").attr("index");
  return index.is_none() ? -1 : index.cast<int>();
}

void* Tensor::stream() const {
  static const py::handle current =
      py::object(py::module_::import("torch.cuda").attr("current_stream")).release();
  return reinterpret_cast<void*>(current(obj.attr("device")).attr("cuda_stream").cast<uintptr_t>());
}

Tensor Tensor::from(py::handle h) {
  static const py::handle shape = interned("shape"), stride = interned("stride"), dtype = interned("dtype");
  Tensor t;
  t.obj = py::reinterpret_borrow<py::object>(h);
  t.address = address_of(h);
  const py::tuple shapes = h.attr(shape), steps = call(h, stride);
  t.dims = static_cast<int>(shapes.size());
  if (t.dims > MAX_DIM) throw py::value_error("jepa_kernels: tensors must have at most 6 dimensions");
  for (int i = 0; i < t.dims; ++i) {
    t.sizes[i] = shapes[i].cast<int64_t>();
    t.strides[i] = steps[i].cast<int64_t>();
  }
  t.dtype = dtype_of(h.attr(dtype));
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
  starts_.push_back(0);
  for (int64_t s = 1; s < cu_seqlens->size(0); ++s) {
    const int64_t end = cu_seqlens->data<const int32_t>()[s * cu_seqlens->stride(0)];
    starts_.push_back(static_cast<int32_t>(std::clamp<int64_t>(end, starts_.back(), rows)));
  }
}

// malloc maps memory of this size anew at each call: clearing it in pages of 4 KiB takes longer than the copy
// that fills it. Larger pages, where the system grants them on request, take a quarter of the time.
static void ask_for_large_pages(const Tensor& fresh, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t MAPPED = int64_t{32} << 20;
  constexpr uintptr_t PAGE = 4096;
  if (bytes < MAPPED || !fresh.obj.attr("is_cpu").cast<bool>()) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(fresh.address) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(fresh.address) + bytes) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // a wish: refusals change nothing
#else
  (void)fresh, (void)bytes;
#endif
}

Tensor Tensor::allocate(const char* method, const std::vector<int64_t>& shape,
                        std::optional<DType> type) const {
  py::tuple dimensions(shape.size());
  size_t i = 0;
  for (int64_t n : shape) dimensions[i++] = n;
  const py::object dt =
      type ? py::reinterpret_borrow<py::object>(torch_dtype(*type)) : py::object(obj.attr("dtype"));
  const Tensor fresh = from(obj.attr(method)(dimensions, py::arg("dtype") = dt));
  ask_for_large_pages(fresh, fresh.numel() * size_of(fresh.dtype));
  return fresh;
}

} // namespace jepa
