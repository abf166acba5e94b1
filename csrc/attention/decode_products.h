// The products of few query rows with rows of keys and values, in place.
#pragma once

#include "forward.h"

namespace mmkernels::MMK_ISA {

// Whether rows are lanes of vectors, which costs the multiplications of full vectors. Else each row and key has a dot
// product, whose lanes have to be added up: as long as the multiplications where these are few.
MMK_INLINE bool rows_are_lanes(i64 rows, i64 depth, bool is_dot) {
  const bool is_full = rows > kLanes * 3 / 4 && !is_dot && depth >= 256; // of pairs, dot products measured faster
  return rows > 16 || (rows > 8 && (depth < 4 * kLanes || is_full));
}

// scores[r, j] = sum_k a[r, k] b[j, k] for kRows rows and kLanes / kRows keys; a is padded with zeros, b need not be.
// Keys one after the other, so that memory is read in one stream, which the hardware prefetches: twice as fast as
// several.
template <int kRows, bool kDot>
MMK_INLINE void dot_block(const char* a, i64 a_row, const char* b, i64 b_row, i64 keys, i64 depth, float* scores,
                          i64 scores_row) {
  constexpr int kKeys = kLanes / kRows;
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = kRows * kKeys; i < kLanes; ++i) {
    acc[i] = zero();
  }
  constexpr int kStep = kDot && kKeys % 2 == 0 ? 2 : 1; // rows have half as many bytes: two are still one stream
#pragma GCC unroll 8
  for (int j = 0; j < kKeys; j += kStep) { // past the last key, the last one again
    const char* key[kStep];
    Vec sums[kStep][kRows];
    for (int i = 0; i < kStep; ++i) {
      key[i] = b + least<i64>(j + i, keys - 1) * b_row;
      for (auto& x : sums[i]) {
        x = zero();
      }
    }
    for (i64 k = 0; k < depth; k += kLanes) {
      Vec y[kStep];
#pragma GCC unroll 2
      for (int i = 0; i < kStep; ++i) {
        y[i] = load_part(key[i] + k * 4, depth - k);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec x = load(a + r * a_row + k * 4);
#pragma GCC unroll 2
        for (int i = 0; i < kStep; ++i) {
          sums[i][r] = multiply_add<kDot>(x, y[i], sums[i][r]);
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kStep; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        acc[r * kKeys + j + i] = sums[i][r];
      }
    }
  }
  float sums[kLanes];
  store(sums, sum_each(acc));
  for (int r = 0; r < kRows; ++r) {
    std::memcpy(scores + r * scores_row, sums + r * kKeys, least<i64>(kKeys, keys) * 4);
  }
}

// Scores of all keys, of 5 rows at once where so many are left, else of 4, 3, 2 or 1: more take too many registers.
template <bool kDot>
MMK_INLINE void dot_rows(const char* a, i64 a_row, i64 rows, Rows b, i64 keys, i64 depth, float* scores, i64 scores_row,
                         Ahead values, Ahead next_keys) {
  i64 r = 0;
  const auto run = [&](auto height) {
    constexpr int kRows = decltype(height)::value, kKeys = kLanes / kRows;
    for (i64 j = 0; j < keys; j += kKeys) {
      values.ask(kKeys); // in the first round alone, as nothing is left then
      next_keys.ask(kKeys);
      dot_block<kRows, kDot>(a + r * a_row, a_row, b.data + j * b.stride, b.stride, keys - j, depth,
                             scores + r * scores_row + j, scores_row);
    }
    r += kRows;
  };
  while (r < rows) {
    const i64 left = rows - r;
    if (kLanes >= 8 && left == 5) {
      run(std::integral_constant<int, kLanes >= 8 ? 5 : 1>());
    } else if (left >= 4) {
      run(std::integral_constant<int, 4>());
    } else if (left == 3) {
      run(std::integral_constant<int, 3>());
    } else if (left == 2) {
      run(std::integral_constant<int, 2>());
    } else {
      run(std::integral_constant<int, 1>());
    }
  }
}

// The same for more rows, which are lanes: a is [depth, lanes]. `block` has room for kLanes x lanes.
template <bool kDot>
void lane_rows(const float* a, i64 lanes, i64 rows, Rows b, i64 keys, i64 depth, float* block, float* scores,
               i64 scores_row, Ahead values, Ahead next_keys) {
  constexpr i64 kPart = 64; // of the depth: shorter sums round less, and a's part stays in the first-level cache
  for (i64 j = 0; j < keys; j += kLanes) {
    values.ask(kLanes);
    next_keys.ask(kLanes);
    const i64 n = least<i64>(kLanes, keys - j);
    for (i64 k = 0; k < depth; k += kPart) {
      gemm<kDot>({b.data + j * b.stride + k * 4, b.stride, 4}, a + k * lanes, lanes * 4, block, lanes, n,
                 lanes / kLanes, least(kPart, depth - k), k > 0);
    }
    for (i64 q = 0; q < rows; q += kLanes) {
      Vec part[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        part[i] = i < n ? load(block + i * lanes + q) : zero();
      }
      transpose(part);
      for (i64 i = 0; i < least<i64>(kLanes, rows - q); ++i) {
        store(scores + (q + i) * scores_row + j, part[i]);
      }
    }
  }
}

// out[r, :] += sum_k a[r, k] b[k, :]: whole rows of b at once where registers allow, for the same reason.
template <bool kDot>
void add_rows(const char* a, i64 a_row, i64 rows, const char* b, i64 b_step, i64 depth, float* out, i64 vectors) {
  constexpr int kWide = 8;
  const i64 out_row = vectors * kLanes;
  i64 n = 0;
  for (; n + kWide <= vectors; n += kWide) {
    constexpr int kTall = kLanes == 16 ? 2 : 1;
    i64 r = 0;
    for (; r + kTall <= rows; r += kTall) {
      tile<kTall, kWide, kDot, true>(a + r * a_row, a_row, 4, b + n * sizeof(Vec), b_step,
                                     out + r * out_row + n * kLanes, out_row, depth, true);
    }
    for (; r < rows; ++r) {
      tile<1, kWide, kDot, true>(a + r * a_row, a_row, 4, b + n * sizeof(Vec), b_step, out + r * out_row + n * kLanes,
                                 out_row, depth, true);
    }
  }
  if (n < vectors) {
    gemm<kDot>({a, a_row, 4}, b + n * sizeof(Vec), b_step, out + n * kLanes, out_row, rows, vectors - n, depth, true);
  }
}

} // namespace mmkernels::MMK_ISA
