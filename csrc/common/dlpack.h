// What is needed of DLPack 1.x, and of the table of C functions that torch.Tensor offers for it: the fields
// up to the last function called, in the standard's order.
#pragma once
#include <cstdint>
#include <pybind11/pybind11.h>

#include "common/dtype.h"

namespace jepa::dlpack {

enum Device : int32_t { CPU = 1, CUDA = 2 };
enum Code : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4 };

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides; // the tensor's own, in elements
  uint64_t byte_offset;
};

struct Managed {
  uint32_t major, minor;
  void* owner;
  void (*end)(Managed*);
  uint64_t flags;
  Tensor tensor;
};

struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  void *allocate, *export_owned;
  int (*import_owned)(Managed* given, void** object); // object: a new reference
  int (*read)(void* object, Tensor* out);             // borrows: no reference counts, no sync
};

// `kept`, which where it is empty becomes an attribute of a module, for the process's life: a static object's
// destructor would give it up when the interpreter is gone. Not made as a static local is: that one's lock
// would be held while an import may hand the GIL to a thread that then waits for the lock.
pybind11::handle look_up(pybind11::handle& kept, const char* module, const char* name);

// torch's; needs the GIL.
const Exchange& exchange();

// What a torch tensor is, in a tenth of the time that its attributes take; throws what torch raises.
Tensor read(pybind11::handle tensor);

// Of torch.Tensor or Parameter itself: another class may be more than what is read of it.
bool is_plain(pybind11::handle object);

inline void* address_of(const Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }
int64_t numel_of(const Tensor& t);
bool is_contiguous(const Tensor& t);
DType dtype_of(const Tensor& t);
void set_dtype(Tensor& t, DType type);

} // namespace jepa::dlpack
