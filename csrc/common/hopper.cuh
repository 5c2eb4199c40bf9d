// Hopper's own instructions (sm_90a), one function each. PTX ISA: "mbarrier", "cp.async.bulk.tensor",
// "Asynchronous Warpgroup Level Matrix Instructions". Tests build the kernels for the host against functions
// of the same names.
#pragma once
#include <cstdint>
#include <cuda.h>
#include <type_traits>

#include "common/dtype.h"

namespace jepa {

using Address = uint32_t;      // of a byte in shared memory
using TensorMap = CUtensorMap; // a tensor in device memory, and the box of it that one load fetches

struct alignas(16) Words {
  uint32_t at[4];
};

// The block's dynamic shared memory. Swizzle patterns repeat every 1024 bytes.
__device__ inline Address shared_memory() {
  extern __shared__ __align__(1024) uint8_t bytes[];
  return static_cast<Address>(__cvta_generic_to_shared(bytes));
}

__device__ inline Words load_shared(Address from) {
  Words w;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
               : "r"(from)
               : "memory");
  return w;
}
__device__ inline void store_shared(Address to, const Words& w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(w.at[0]), "r"(w.at[1]), "r"(w.at[2]),
               "r"(w.at[3])
               : "memory");
}
__device__ inline void store_shared(Address to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}
__device__ inline void store_shared(Address to, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
__device__ inline float2 load_shared_pair(Address from) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
  return x;
}
__device__ inline float load_shared_float(Address from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}

// Shared memory written by this thread's stores becomes visible to matrix products and bulk copies: then a
// barrier.
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline Words load_global(const void* from) {
  const uint4 x = __ldg(static_cast<const uint4*>(from));
  return {{x.x, x.y, x.z, x.w}};
}
__device__ inline void store_global(void* to, const Words& w) {
  *static_cast<uint4*>(to) = make_uint4(w.at[0], w.at[1], w.at[2], w.at[3]);
}

// A barrier in shared memory (8 bytes) that one thread arms with the bytes it orders, and all threads wait
// for. It completes phase after phase; `parity` is that of the phase awaited.
__device__ inline void barrier_init(Address barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_expect(Address barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void barrier_wait(Address barrier, int parity) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again;\n"
               "}" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

// Fetches the box at these coordinates, the innermost first. Elements outside the tensor arrive as 0.
__device__ inline void load_box(Address to, const TensorMap& map, Address barrier, int x, int y, int z,
                                int w) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
               "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// Counts 0 to `last` and again from 0 in shared memory, and returns the count before. What threads did before
// they counted comes before what those do that see it counted.
__device__ inline int count_up(Address counter, int last) {
  int before;
  asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(counter), "r"(last)
               : "memory");
  return before;
}

__device__ inline void warpgroup_barrier(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// A value that is the same in all threads of a warp, known to the compiler to be.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

template <class T> __device__ inline T exchange(T x, int lanes) {
  return __shfl_xor_sync(0xffffffff, x, lanes);
}
__device__ inline bool any_lane(bool x) { return __any_sync(0xffffffff, x); }

__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to nearest, the first in the low half.
template <class T> __device__ inline uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class T> __device__ inline float2 unpack(uint32_t pair) {
  float2 x;
  if constexpr (std::is_same_v<T, bf16>) {
    x = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
  } else {
    asm("{\n.reg .f16 low, high;\n"
        "mov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(x.x), "=f"(x.y)
        : "r"(pair));
  }
  return x;
}

// Products run asynchronously: begin, products, commit, wait. Until the wait their registers are not to be
// touched.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accesses of these registers across this point.
template <int count> __device__ inline void pin(float (&x)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// The accumulators as operands: 8 columns are 4 registers of each thread.
#define JEPA_OUT4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JEPA_OUT8(d) JEPA_OUT4(d, 0)
#define JEPA_OUT16(d) JEPA_OUT8(d), JEPA_OUT4(d, 4)
#define JEPA_OUT24(d) JEPA_OUT16(d), JEPA_OUT4(d, 8)
#define JEPA_OUT32(d) JEPA_OUT24(d), JEPA_OUT4(d, 12)
#define JEPA_OUT40(d) JEPA_OUT32(d), JEPA_OUT4(d, 16)
#define JEPA_OUT48(d) JEPA_OUT40(d), JEPA_OUT4(d, 20)
#define JEPA_OUT56(d) JEPA_OUT48(d), JEPA_OUT4(d, 24)
#define JEPA_OUT64(d) JEPA_OUT56(d), JEPA_OUT4(d, 28)
#define JEPA_LIST8 "%0, %1, %2, %3"
#define JEPA_LIST16 JEPA_LIST8 ", %4, %5, %6, %7"
#define JEPA_LIST24 JEPA_LIST16 ", %8, %9, %10, %11"
#define JEPA_LIST32 JEPA_LIST24 ", %12, %13, %14, %15"
#define JEPA_LIST40 JEPA_LIST32 ", %16, %17, %18, %19"
#define JEPA_LIST48 JEPA_LIST40 ", %20, %21, %22, %23"
#define JEPA_LIST56 JEPA_LIST48 ", %24, %25, %26, %27"
#define JEPA_LIST64 JEPA_LIST56 ", %28, %29, %30, %31"

// d [64, columns] (+)= a b^T: a and b are descriptors of [64, 16] and [columns, 16], both K-major.
template <class T, int columns = 64>
__device__ inline void multiply_shared(float* d, uint64_t a, uint64_t b, int accumulate) {
#define JEPA_PRODUCT(type, n, a0, b0, add0)                                                                  \
  if constexpr (columns == n)                                                                                \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add0 ", 0;\n"                                       \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" JEPA_LIST##n             \
               "}, %" #a0 ", %" #b0 ", add, 1, 1, 0, 0;\n}"                                                  \
               : JEPA_OUT##n(d)                                                                              \
               : "l"(a), "l"(b), "r"(accumulate))
#define JEPA_PRODUCTS(type)                                                                                  \
  JEPA_PRODUCT(type, 16, 8, 9, 10);                                                                          \
  JEPA_PRODUCT(type, 48, 24, 25, 26);                                                                        \
  JEPA_PRODUCT(type, 64, 32, 33, 34)
  static_assert(columns == 16 || columns == 48 || columns == 64);
  if constexpr (std::is_same_v<T, bf16>) {
    JEPA_PRODUCTS("bf16");
  } else {
    JEPA_PRODUCTS("f16");
  }
#undef JEPA_PRODUCTS
#undef JEPA_PRODUCT
}

// d [64, columns] += a b: a [64, 16] in registers, b the descriptor of [16, columns], MN-major.
template <class T, int columns>
__device__ inline void multiply_registers(float* d, const uint32_t* a, uint64_t b) {
#define JEPA_PRODUCT(type, n, a0, a1, a2, a3, b0)                                                            \
  if constexpr (columns == n)                                                                                \
  asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                                \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" JEPA_LIST##n             \
               "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", add, 1, 1, 1;\n}"                     \
               : JEPA_OUT##n(d)                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define JEPA_PRODUCTS(type)                                                                                  \
  JEPA_PRODUCT(type, 8, 4, 5, 6, 7, 8);                                                                      \
  JEPA_PRODUCT(type, 16, 8, 9, 10, 11, 12);                                                                  \
  JEPA_PRODUCT(type, 24, 12, 13, 14, 15, 16);                                                                \
  JEPA_PRODUCT(type, 32, 16, 17, 18, 19, 20);                                                                \
  JEPA_PRODUCT(type, 40, 20, 21, 22, 23, 24);                                                                \
  JEPA_PRODUCT(type, 48, 24, 25, 26, 27, 28);                                                                \
  JEPA_PRODUCT(type, 56, 28, 29, 30, 31, 32);                                                                \
  JEPA_PRODUCT(type, 64, 32, 33, 34, 35, 36)
  static_assert(columns % 8 == 0 && columns <= 64);
  if constexpr (std::is_same_v<T, bf16>) {
    JEPA_PRODUCTS("bf16");
  } else {
    JEPA_PRODUCTS("f16");
  }
#undef JEPA_PRODUCTS
#undef JEPA_PRODUCT
}

// d [64, columns] += a b: descriptors of [64, 16] and [16, columns], both MN-major.
template <class T, int columns> __device__ inline void multiply_columns(float* d, uint64_t a, uint64_t b) {
#define JEPA_PRODUCT(type, n, a0, b0)                                                                        \
  if constexpr (columns == n)                                                                                \
  asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                                \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" JEPA_LIST##n             \
               "}, %" #a0 ", %" #b0 ", add, 1, 1, 1, 1;\n}"                                                  \
               : JEPA_OUT##n(d)                                                                              \
               : "l"(a), "l"(b))
#define JEPA_PRODUCTS(type)                                                                                  \
  JEPA_PRODUCT(type, 8, 4, 5);                                                                               \
  JEPA_PRODUCT(type, 16, 8, 9);                                                                              \
  JEPA_PRODUCT(type, 24, 12, 13);                                                                            \
  JEPA_PRODUCT(type, 32, 16, 17);                                                                            \
  JEPA_PRODUCT(type, 40, 20, 21);                                                                            \
  JEPA_PRODUCT(type, 48, 24, 25);                                                                            \
  JEPA_PRODUCT(type, 56, 28, 29);                                                                            \
  JEPA_PRODUCT(type, 64, 32, 33)
  static_assert(columns % 8 == 0 && columns <= 64);
  if constexpr (std::is_same_v<T, bf16>) {
    JEPA_PRODUCTS("bf16");
  } else {
    JEPA_PRODUCTS("f16");
  }
#undef JEPA_PRODUCTS
#undef JEPA_PRODUCT
}

} // namespace jepa
