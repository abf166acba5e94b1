// The machine instructions that the CUDA kernels use, one small function each; needs sm_80. Of CUDA, kernels use only
// these, thread and block indices and __syncthreads, so that a test can replace this file by functions for the host,
// which define the same include guard.
#ifndef MMKERNELS_CUDA_PTX
#define MMKERNELS_CUDA_PTX

#include <cstdint>

#define MMK_DEVICE __device__ __forceinline__

namespace mmkernels {

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// The block's dynamic shared memory, and the 32-bit address of shared memory that the instructions below need.
MMK_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(128) char mmkernels_shared[];
  return mmkernels_shared;
}
MMK_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// Global memory, read through the read-only path.
template <class T> MMK_DEVICE T load_global(const T* p) {
  return __ldg(p);
}
template <class T> MMK_DEVICE void store_global(T* p, T value) {
  *p = value;
}
template <> MMK_DEVICE Bf16 load_global(const Bf16* p) {
  return {__ldg(&p->bits)};
}
template <> MMK_DEVICE F16 load_global(const F16* p) {
  return {__ldg(&p->bits)};
}

MMK_DEVICE std::uint32_t load_shared(std::uint32_t address) {
  std::uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(x) : "r"(address) : "memory");
  return x;
}
MMK_DEVICE void load_shared(std::uint32_t address, std::uint32_t (&x)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
MMK_DEVICE void store_shared(std::uint32_t address, std::uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(address), "r"(x) : "memory");
}

// Starts a copy of 16 bytes from global to shared memory; where `exists` is false it writes zeros and reads nothing.
MMK_DEVICE void copy_async(std::uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
MMK_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until at most `kPending` of this thread's latest groups are in flight.
template <int kPending> MMK_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. Of each matrix a lane
// gets row l / 4, columns 2 (l % 4) and the next; transposed, of column l / 4 those rows.
MMK_DEVICE void load_matrices(std::uint32_t (&x)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
MMK_DEVICE void load_matrices_transposed(std::uint32_t (&x)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8].
MMK_DEVICE void multiply(Bf16, float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MMK_DEVICE void multiply(F16, float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to 16 bits each, `low` in the lower half; and back.
MMK_DEVICE std::uint32_t pack(Bf16, float low, float high) {
  std::uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
MMK_DEVICE std::uint32_t pack(F16, float low, float high) {
  std::uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
MMK_DEVICE float widen(Bf16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
MMK_DEVICE float widen(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}

// 2^x: 0 for -inf, inf for inf.
MMK_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Exchanges between the lanes of a warp, all of which take part.
template <class T> MMK_DEVICE T from_lane(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <class T> MMK_DEVICE T from_neighbour(T x, int bits) { // lane ^ bits
  return __shfl_xor_sync(0xffffffffu, x, bits);
}
MMK_DEVICE std::uint32_t vote(bool x) { // bit l: lane l's
  return __ballot_sync(0xffffffffu, x);
}
MMK_DEVICE void sync_warp() {
  __syncwarp();
}

} // namespace mmkernels

#endif
