// The tile GEMM of all kernels: C[m, n] (+)= sum_k A[m, k] B[k, n], where an element of A and B is 32 bits: a float32,
// or (kDot) two bfloat16 that are neighbours along k. A is read in place through any byte strides, one element
// broadcast at a time; B's rows are vectors; C is float32. Only B is packed.
#pragma once

#include <type_traits>

#include "vec.h"

namespace mmkernels::MMK_ISA {

struct Operand {
  const char* data;
  i64 row;  // bytes from one m (of A) to the next
  i64 step; // bytes from one k to the next
};

template <bool kDot> MMK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  if constexpr (kDot) {
    return dot(a, b, c);
  } else {
    return fma(a, b, c);
  }
}

// Calls f with std::true_type for bfloat16 pairs, std::false_type for float32: `[&](auto pairs) { gemm<pairs()>(...);
// }`.
template <typename F> MMK_INLINE void with_pairs(bool is_dot, const F& f) {
  if (kHasDot && is_dot) {
    f(std::bool_constant<kHasDot>());
  } else {
    f(std::false_type());
  }
}

// kRows x kCols vectors of C, all in registers.
template <int kRows, int kCols, bool kDot, bool kUnitStep>
MMK_INLINE void tile(const char* __restrict a, i64 a_row, i64 a_step, const char* __restrict b, i64 b_step,
                     float* __restrict c, i64 c_row, i64 depth, bool add) {
  Vec acc[kRows][kCols];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kCols; ++n) {
      acc[m][n] = zero();
      if (add) { // C is added at the end; it is in cache by then
        __builtin_prefetch(c + m * c_row + n * kLanes, 1);
      }
    }
  }
  // Constant offsets along k for a unit step, else along m, whose elements are then contiguous.
  const i64 row = kUnitStep ? a_row : 4, step = kUnitStep ? 4 : a_step;
  for (i64 k = 0; k < depth; ++k) {
    Vec x[kCols];
#pragma GCC unroll 8
    for (int n = 0; n < kCols; ++n) {
      x[n] = load(b + n * sizeof(Vec));
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec y = broadcast(a + m * row);
#pragma GCC unroll 8
      for (int n = 0; n < kCols; ++n) {
        acc[m][n] = multiply_add<kDot>(y, x[n], acc[m][n]);
      }
    }
    a += step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kCols; ++n) {
      float* to = c + m * c_row + n * kLanes;
      store(to, add ? load(to) + acc[m][n] : acc[m][n]);
    }
  }
}

// All rows of kCols vectors of C.
template <int kCols, bool kDot, bool kUnitStep>
void gemm_columns(Operand a, const char* b, i64 b_step, float* c, i64 c_row, i64 rows, i64 depth, bool add) {
  constexpr int kTall = kCols == 4 || (kLanes < 16 && kCols == 2) ? 6 : 8;
  i64 m = 0;
  const auto run = [&](auto height) {
    constexpr int kRows = decltype(height)::value;
    for (; m + kRows <= rows; m += kRows) {
      tile<kRows, kCols, kDot, kUnitStep>(a.data + m * a.row, a.row, a.step, b, b_step, c + m * c_row, c_row, depth,
                                          add);
    }
  };
  run(std::integral_constant<int, kTall>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

template <bool kDot, bool kUnitStep>
MMK_INLINE void gemm_by_columns(Operand a, const char* b, i64 b_step, float* c, i64 c_row, i64 rows, i64 vectors,
                                i64 depth, bool add) {
  for (i64 n = 0; n < vectors;) {
    const char* at = b + n * sizeof(Vec);
    float* to = c + n * kLanes;
    const i64 left = vectors - n;
    if (kVectors == 4 && left >= 4) {
      gemm_columns<kVectors, kDot, kUnitStep>(a, at, b_step, to, c_row, rows, depth, add);
      n += 4;
    } else if (kVectors == 4 && left == 3) {
      gemm_columns<kVectors == 4 ? 3 : 1, kDot, kUnitStep>(a, at, b_step, to, c_row, rows, depth, add);
      n += 3;
    } else if (left >= 2) {
      gemm_columns<2, kDot, kUnitStep>(a, at, b_step, to, c_row, rows, depth, add);
      n += 2;
    } else {
      gemm_columns<1, kDot, kUnitStep>(a, at, b_step, to, c_row, rows, depth, add);
      n += 1;
    }
  }
}

// C [rows, vectors * kLanes] (+)= A [rows, depth] B [depth, vectors * kLanes].
// b_step: bytes from one k to the next; c_row: floats from one row to the next; add: add to C instead of overwriting
// it.
template <bool kDot>
void gemm(Operand a, const void* b, i64 b_step, float* c, i64 c_row, i64 rows, i64 vectors, i64 depth, bool add) {
  if (a.step == 4) {
    gemm_by_columns<kDot, true>(a, (const char*)b, b_step, c, c_row, rows, vectors, depth, add);
  } else { // a.row == 4
    gemm_by_columns<kDot, false>(a, (const char*)b, b_step, c, c_row, rows, vectors, depth, add);
  }
}

} // namespace mmkernels::MMK_ISA
