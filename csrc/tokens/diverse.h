// Rows of tokens read, multiplied and orthogonalised, for select_diverse.
#pragma once

#include "../common/rows.h"
#include "../common/vec.h"
#include "diverse_params.h"

namespace mmkernels::MMK_ISA {

// Rows that one row is multiplied with at once: each of its vectors is loaded once for them.
constexpr i64 kTogether = 4;
constexpr float kShortest = 1e-30f; // a token whose largest element is below this has no length

inline i64 diverse_scratch(i64 dim) {
  return kTogether * row_bytes(false, dim);
}

inline Source source_of(const StridedRows& rows, i64 first) {
  return {rows.data + first * rows.row * bytes_of(rows.type), rows.type, rows.row, rows.column, nullptr};
}

inline float read_token(const StridedRows& rows, i64 at, float* to, char* scratch) {
  const Rows row = fetch(source_of(rows, at), 1, rows.dim, false, scratch);
  Vec top = zero(), bad = zero();
  for (i64 c = 0; c < rows.dim; c += kLanes) {
    const Vec x = load_part(row.data + c * 4, rows.dim - c), size = x < zero() ? -x : x;
    top = size > top ? size : top;
    bad += zero() * x; // NaN exactly where x is not finite
    store_part(to + c, x, rows.dim - c);
  }
  const float most = largest(top);
  if (sum(bad) != 0.0f) {
    return __builtin_nanf("");
  }
  if (most < kShortest) {
    return 0.0f;
  }
  const Vec scale = set1(1.0f / most); // so that no square overflows
  Vec squares = zero();
  for (i64 c = 0; c < rows.dim; c += kLanes) {
    const Vec x = scale * load_part(to + c, rows.dim - c);
    squares = fma(x, x, squares);
  }
  return 1.0f / (most * __builtin_sqrtf(sum(squares)));
}

template <int kRows> MMK_INLINE void dots_with(const float* row, const char* const* others, i64 dim, float* to) {
  Vec acc[kRows][2] = {}; // two chains each, to hide the latency of an addition
  const auto add = [&](i64 c, i64 count, int chain) {
    const Vec x = load_part(row + c, count);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      acc[r][chain] = fma(x, load_part(others[r] + c * 4, count), acc[r][chain]);
    }
  };
  i64 c = 0;
  for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
    add(c, kLanes, 0);
    add(c + kLanes, kLanes, 1);
  }
  for (; c < dim; c += kLanes) {
    add(c, dim - c, 0);
  }
  for (int r = 0; r < kRows; ++r) {
    to[r] = sum(acc[r][0] + acc[r][1]);
  }
}

inline void token_dots(const float* row, const StridedRows& rows, i64 first, i64 count, float* to, char* scratch) {
  for (i64 n = 0; n < count; n += kTogether) {
    const i64 some = least(kTogether, count - n);
    const Rows found = fetch(source_of(rows, first + n), some, rows.dim, false, scratch);
    const char* others[kTogether];
    for (i64 r = 0; r < kTogether; ++r) {
      others[r] = found.data + least(r, some - 1) * found.stride;
    }
    if (some == kTogether) {
      dots_with<kTogether>(row, others, rows.dim, to + n);
      continue;
    }
    for (i64 r = 0; r < some; ++r) {
      dots_with<1>(row, others + r, rows.dim, to + n + r);
    }
  }
}

inline void subtract_rows(float* row, float scale, const float* others, const float* factors, i64 count, i64 dim) {
  for (i64 c = 0; c < dim; c += kLanes) {
    Vec x = set1(scale) * load_part(row + c, dim - c);
    for (i64 m = 0; m < count; ++m) {
      x = fma(set1(-factors[m]), load_part(others + m * dim + c, dim - c), x);
    }
    store_part(row + c, x, dim - c);
  }
}

} // namespace mmkernels::MMK_ISA
