// One warp of the decode kernels: copies a slice of keys and values from global to shared memory, and multiplies 16
// rows (queries of all heads of a key head) with it under a running softmax. decode_cuda.cuh combines warps and blocks.
#pragma once

#include "../common/cuda_ptx.cuh"
#include "decode_plan.h"

namespace mmkernels {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLn2 = 0.693147180559945309f;
constexpr int kMaxInt = std::numeric_limits<int>::max();

// Keys start <= j < end. For a query that sees nothing: a span that holds no key and changes no minimum or maximum.
struct KeySpan {
  int start, end;
};
MMK_DEVICE KeySpan span_of(const DecodeProblem& p, int b, int i) {
  if (p.start == nullptr) {
    return {0, p.k_len};
  }
  const int start = load_global(p.start + b * p.start_b + i * p.start_i);
  const int end = load_global(p.end + b * p.end_b + i * p.end_i);
  const KeySpan span{start > 0 ? start : 0, end < p.k_len ? end : p.k_len};
  return span.start < span.end ? span : KeySpan{kMaxInt, 0};
}

// The spans of a batch entry's queries: some query sees keys in [first, last); every query that sees any key sees all
// of [shared_first, shared_last).
struct BlockSpan {
  int first = kMaxInt, last = 0;
  int shared_first = 0, shared_last = kMaxInt;
};
MMK_DEVICE BlockSpan block_span(const DecodeProblem& p, int b) {
  BlockSpan all;
  for (int i = 0; i < p.q_len; ++i) {
    const KeySpan span = span_of(p, b, i);
    if (span.start >= span.end) {
      continue;
    }
    all.first = span.start < all.first ? span.start : all.first;
    all.last = span.end > all.last ? span.end : all.last;
    all.shared_first = span.start > all.shared_first ? span.start : all.shared_first;
    all.shared_last = span.end < all.shared_last ? span.end : all.shared_last;
  }
  all.first = all.first < all.last ? all.first : 0;
  return all;
}

// Which of the 16 keys from `first` on lie in a span, as bits.
MMK_DEVICE std::uint32_t keys_of(const KeySpan& span, int first) {
  const auto below = [first](int j) { // keys before j
    const int count = j - first < 0 ? 0 : j - first < kSliceKeys ? j - first : kSliceKeys;
    return (1u << count) - 1;
  };
  return below(span.end) & ~below(span.start);
}

// Where 16-byte piece `c` of row `row` lies in a [rows, D] tile of 16-bit elements. Eight rows that follow each other
// have their pieces c in eight different groups of four banks, for any D that is a multiple of 16: within each
// `kSwizzle` pieces, a piece's position is XORed with the row.
template <int D> constexpr int kSwizzle = D % 64 == 0 ? 8 : D % 32 == 0 ? 4 : 2;
template <int D> MMK_DEVICE int piece_offset(int row, int c) {
  return (row * (D / 8) + (c ^ (row / (8 / kSwizzle<D>) % kSwizzle<D>))) * 16;
}

// Starts the copy of a warp's slice of 16 keys and their values to shared memory; keys that are not in `existing`
// become zeros and are not read. kSwizzle lanes copy a row, so that a lane computes few positions and swizzles.
template <int D, class T>
MMK_DEVICE void load_slice(std::uint32_t keys, std::uint32_t values, const T* key, const T* value,
                           const DecodeProblem& p, int first, std::uint32_t existing, int lane) {
  constexpr int rows = 32 / kSwizzle<D>; // at a time
  const int lane_row = lane / kSwizzle<D>, lane_c = lane % kSwizzle<D>;
#pragma unroll
  for (int n = 0; n < kSliceKeys / rows; ++n) {
    const int row = n * rows + lane_row, at = piece_offset<D>(row, lane_c);
    const bool read = existing >> row & 1;
    const T* k = key + (first + row) * p.key_j + lane_c * 8;
    const T* v = value + (first + row) * p.value_j + lane_c * 8;
#pragma unroll
    for (int c = 0; c < D / 8; c += kSwizzle<D>) {
      copy_async(keys + at + c * 16, k + c * 8, read);
      copy_async(values + at + c * 16, v + c * 8, read);
    }
  }
}

template <class T> constexpr std::uint32_t kExponent = 0;
template <> constexpr std::uint32_t kExponent<Bf16> = 0x7f80;
template <> constexpr std::uint32_t kExponent<F16> = 0x7c00;

// Whether the values of a slice of 16 keys hold NaN or inf.
template <int D, class T> MMK_DEVICE bool has_non_finite(std::uint32_t values, int lane) {
  constexpr std::uint32_t low = kExponent<T>, high = low << 16;
  bool non_finite = false;
#pragma unroll
  for (int n = 0; n < kSliceKeys * D / 8 / 32; ++n) {
    std::uint32_t x[4];
    load_shared(values + (n * 32 + lane) * 16, x);
#pragma unroll
    for (std::uint32_t pair : x) {
      non_finite |= (pair & low) == low || (pair & high) == high;
    }
  }
  return vote(non_finite) != 0;
}

// The stride in floats of the sums' rows in shared memory: eight more than D, so that rows do not share banks.
template <int D> constexpr int kSumRow = D + 8;

// One warp's 16 rows: queries as the left operand of matrix instructions, and the running softmax. A lane has rows
// lane / 4 and 8 more, and of each 8 columns of a product 2 (lane % 4) and the next.
template <class T, int D> struct RowTile {
  std::uint32_t query[D / 16][4];
  float sums[D / 8][4] = {};
  float largest[2] = {-kInfinity, -kInfinity}, total[2] = {0.0f, 0.0f}; // total: of this lane's columns
  bool sees[2] = {false, false};
  KeySpan span[2];

  MMK_DEVICE void load(const DecodeProblem& p, int b, int kv, int first_row, int lane) {
    const int group = p.heads / p.key_heads, rows = group * p.q_len;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane / 4 + 8 * half;
      const bool exists = row < rows;
      const int h = kv * group + (exists ? row / p.q_len : 0), i = exists ? row % p.q_len : 0;
      const T* q = static_cast<const T*>(p.query) + b * p.query_b + h * p.query_h + i * p.query_i + 2 * (lane % 4);
      span[half] = span_of(p, b, i);
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const auto* pair = reinterpret_cast<const std::uint32_t*>(q + 16 * k + 8 * n);
          query[k][half + 2 * n] = exists ? load_global(pair) : 0;
        }
      }
    }
  }

  // scores [16, 16 keys], before scaling.
  MMK_DEVICE void multiply_keys(float (&s)[2][4], std::uint32_t keys, int lane) const {
    const int row = lane % 8 + lane / 16 * 8, c = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      std::uint32_t x[4];
      load_matrices(x, keys + piece_offset<D>(row, 2 * k + c));
      multiply(T{}, s[0], query[k], x[0], x[1]);
      multiply(T{}, s[1], query[k], x[2], x[3]);
    }
  }

  // Scores to probabilities relative to the largest score so far; earlier sums are made relative to it too. Where the
  // largest is infinite nothing is subtracted: exp2 gives 0 or inf, which is right for the sums.
  MMK_DEVICE void update_softmax(float (&s)[2][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
      most = fmaxf(most, from_neighbour(most, 1));
      most = fmaxf(most, from_neighbour(most, 2));
      most = fmaxf(most, largest[half]);
      const bool finite = fabsf(most) < kInfinity;
      const float base = finite ? most : 0.0f, shrink = finite ? exp2_fast(largest[half] - most) : 1.0f;
      largest[half] = most;
      total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[n][e] = exp2_fast(s[n][e] - base);
          total[half] += s[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sums[n][2 * half] *= shrink;
        sums[n][2 * half + 1] *= shrink;
      }
    }
  }

  MMK_DEVICE void multiply_values(const float (&s)[2][4], std::uint32_t values, int lane) {
    const std::uint32_t weights[4] = {pack(T{}, s[0][0], s[0][1]), pack(T{}, s[0][2], s[0][3]),
                                      pack(T{}, s[1][0], s[1][1]), pack(T{}, s[1][2], s[1][3])};
    const int row = lane % 8 + lane / 8 % 2 * 8, c = lane / 16;
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      std::uint32_t x[4];
      load_matrices_transposed(x, values + piece_offset<D>(row, 2 * n + c));
      multiply(T{}, sums[2 * n], weights, x[0], x[1]);
      multiply(T{}, sums[2 * n + 1], weights, x[2], x[3]);
    }
  }

  // The non-finite path: a value that is not finite is hidden from some row, and a matrix instruction would compute
  // 0 * NaN.
  MMK_DEVICE void multiply_visible_values(const float (&s)[2][4], std::uint32_t values,
                                          const std::uint32_t (&visible)[2], int lane) {
#pragma unroll 1
    for (int place = 0; place < kSliceKeys; ++place) {
      const int holder = lane / 4 * 4 + place % 8 / 2;
      float weight[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float even = place < 8 ? s[0][2 * half] : s[1][2 * half];
        const float odd = place < 8 ? s[0][2 * half + 1] : s[1][2 * half + 1];
        weight[half] = from_lane(place % 2 == 0 ? even : odd, holder);
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const std::uint32_t pair = load_shared(values + piece_offset<D>(place, n) + lane % 4 * 4);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = widen(T{static_cast<std::uint16_t>(pair >> 16 * e)});
          sums[n][e] += visible[0] >> place & 1 ? weight[0] * x : 0.0f;
          sums[n][2 + e] += visible[1] >> place & 1 ? weight[1] * x : 0.0f;
        }
      }
    }
  }

  // Processes a slice of 16 keys from `first` on. Rows see the keys of their span that are in `existing`.
  MMK_DEVICE void attend_slice(std::uint32_t keys, std::uint32_t values, int first, std::uint32_t existing,
                               const BlockSpan& all, float scale, int lane) {
    float s[2][4] = {};
    multiply_keys(s, keys, lane);
    const std::uint32_t visible[2] = {keys_of(span[0], first) & existing, keys_of(span[1], first) & existing};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sees[half] |= visible[half] != 0;
      const std::uint32_t visible_to_lane = visible[half] >> 2 * (lane % 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        s[0][2 * half + e] = visible_to_lane >> e & 1 ? s[0][2 * half + e] * scale : -kInfinity;
        s[1][2 * half + e] = visible_to_lane >> (8 + e) & 1 ? s[1][2 * half + e] * scale : -kInfinity;
      }
    }
    update_softmax(s);
    const int last = first + kSliceKeys < all.last ? first + kSliceKeys : all.last;
    // Then a row sees all keys of the slice, or its output is 0 whatever the values are.
    const bool all_alike = first >= all.shared_first && last <= all.shared_last;
    if (!all_alike && has_non_finite<D, T>(values, lane)) {
      multiply_visible_values(s, values, visible, lane);
    } else {
      multiply_values(s, values, lane);
    }
  }

  // Largest score and sum of exponentials to `stats` [16, 2], sums to `out` [16, kSumRow]. A sum of 1 beside a largest
  // score of -inf means that all visible keys have the score -inf; a sum of 0, that none is visible.
  MMK_DEVICE void store(float* stats, float* out, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      float sum = total[half];
      sum += from_neighbour(sum, 1);
      sum += from_neighbour(sum, 2);
      if (lane % 4 == 0) {
        stats[2 * row] = largest[half];
        stats[2 * row + 1] = sees[half] && largest[half] == -kInfinity && sum == 0.0f ? 1.0f : sum;
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[row * kSumRow<D> + 8 * n + 2 * (lane % 4)] = sums[n][2 * half];
        out[row * kSumRow<D> + 8 * n + 2 * (lane % 4) + 1] = sums[n][2 * half + 1];
      }
    }
  }
};

} // namespace mmkernels
