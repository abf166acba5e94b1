// Counted products of the tile GEMM, and what their operands are packed from.
#pragma once

#include "rows.h"
#include "tile_gemm.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kChain = 128; // products that are summed in one float32 chain; longer chains round more than a BLAS does

// FLOP of this thread's products since the last take_multiplied().
inline i64& multiplied_here() {
  static thread_local i64 flops = 0;
  return flops;
}
inline i64 take_multiplied() {
  const i64 flops = multiplied_here();
  multiplied_here() = 0;
  return flops;
}
// A counted gemm. b_row: floats from one row of b to the next.
template <bool kDot>
void product(Operand a, const float* b, i64 b_row, float* c, i64 c_row, i64 rows, i64 vectors, i64 depth, bool add) {
  multiplied_here() += 2 * rows * vectors * kLanes * depth * (kDot ? 2 : 1);
  gemm<kDot>(a, b, b_row * 4, c, c_row, rows, vectors, depth, add);
}

MMK_INLINE i64 vectors_of_lanes(i64 lanes) {
  return (lanes + kLanes - 1) / kLanes;
}

MMK_INLINE Source from_column(Source x, i64 column) {
  x.data += column * x.d * bytes_of(x.type);
  return x;
}

// Copies `cols` columns of `count` rows, at most a panel's, to the right operand of a product over rows: [rows (or
// pairs of rows), kPanel].
inline void group_columns(bool is_dot, Rows rows, i64 count, i64 cols, float* to) {
  if (is_dot && pad_lanes(cols) == kPanel) {
    interleave_rows(rows, count, cols, (char*)to);
    return;
  }
  if (is_dot) {
    for (i64 r = 0; r < count; r += 2, to += kPanel) {
      interleave_rows({rows.data + r * rows.stride, rows.stride}, least<i64>(2, count - r), cols, (char*)to);
    }
    return;
  }
  for (i64 r = 0; r < count; ++r, to += kPanel) {
    const char* from = rows.data + r * rows.stride;
    for (i64 c = 0; c < cols; c += kLanes) {
      store(to + c, load_part(from + c * 4, cols - c));
    }
  }
}

} // namespace mmkernels::MMK_ISA
