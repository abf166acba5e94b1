// Bipartite matching: for each token of one side the token of the other with the largest cosine. Tokens that may merge
// are lanes, those into which they may are rows; of a tile of products only the running best is kept.
#pragma once

#include "../common/rows.h"
#include "../common/tile_gemm.h"
#include "merge_tokens_params.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kMatchRows = 48;   // rows of a tile: whole steps of the tile GEMM; with a step of the panel in first-level cache
constexpr i64 kMatchDepth = 128; // 32-bit elements that are summed in one chain

inline i64 prepared_bytes(Type type, i64 dim) {
  return row_bytes(uses_dot(type), dim);
}

// The power of two that brings x near 1: squares of rows far from 1 would not be finite, or 0.
MMK_INLINE float scale_to_one(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::int32_t exponent = most(1, least(253, bits >> 23));
  const std::int32_t scale = (254 - exponent) << 23;
  float y;
  std::memcpy(&y, &scale, sizeof y);
  return y;
}

inline void prepare(const TokenRows& x, i64 dim, i64 first, i64 count, char* to, float* inverse) {
  const bool is_dot = uses_dot(x.type);
  const i64 size = bytes_of(x.type), stride = row_bytes(is_dot, dim), out = is_dot ? 2 : 4;
  for (i64 r = 0; r < count; ++r) {
    const char* from = x.data + (first + 2 * r) * x.stride;
    char* row = to + r * stride;
    Vec top = zero(), bad = zero(); // 0 * x is NaN exactly where x is not finite
    for (i64 c = 0; c < dim; c += kLanes) {
      const Vec v = load_as_f32(from + c * size, x.type, dim - c);
      top = max_skip_nan(top, (Vec)((IVec)v & 0x7fffffff));
      bad += zero() * v;
    }
    if (sum(bad) != 0.0f || dim == 0) {
      std::memset(row, 0, stride);
      inverse[r] = dim == 0 ? 0.0f : sum(bad);
      continue;
    }
    const Vec scale = set1(scale_to_one(largest(top)));
    Vec squares = zero();
    for (i64 c = 0; c < dim; c += kLanes) {
      const Vec v = load_as_f32(from + c * size, x.type, dim - c) * scale;
      squares = fma(v, v, squares);
      store_working(row + c * out, is_dot, v);
    }
    const float square = sum(squares);
    inverse[r] = square > 0.0f ? 1.0f / __builtin_sqrtf(square) : 0.0f;
  }
}

struct MatchScratch : Arena {
  explicit MatchScratch(Arena memory, const MatchTask& t) : Arena(memory) {
    panel = take<float>(depth_of(uses_dot(t.type), t.dim) * kPanel);
    tile = take<float>(kMatchRows * kPanel);
  }
  float *panel = nullptr, *tile = nullptr;
};

inline i64 match_scratch(const MatchTask& t) {
  return scratch_bytes<MatchScratch>(t);
}

// Rows [first, first + rows) of a tile are compared with the best so far; of equal ones the first stays, NaN is skipped.
template <int kCount>
MMK_INLINE void keep_best(const MatchTask& t, const float* tile, i64 first, i64 rows) {
  Vec best[kCount];
  IVec partner[kCount];
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    best[v] = load(t.best + v * kLanes);
    partner[v] = (IVec)load(t.partner + v * kLanes);
  }
  for (i64 r = 0; r < rows; ++r) {
    const Vec inverse = set1(t.into_inverse[first + r]);
    const IVec row = (std::int32_t)(first + r) - IVec{};
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      const Vec x = load(tile + r * kPanel + v * kLanes) * inverse;
#if defined(__AVX512F__)
      const __mmask16 more = _mm512_cmp_ps_mask((__m512)x, (__m512)best[v], _CMP_GT_OQ);
      partner[v] = (IVec)_mm512_mask_mov_epi32((__m512i)partner[v], more, (__m512i)row);
#else
      partner[v] = x > best[v] ? row : partner[v];
#endif
      best[v] = max_skip_nan(best[v], x);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    store(t.best + v * kLanes, best[v]);
    store(t.partner + v * kLanes, (Vec)partner[v]);
  }
}

template <bool kDot> void match_rows(const MatchTask& t, const MatchScratch& s) {
  const i64 stride = row_bytes(kDot, t.dim), depth = depth_of(kDot, t.dim), lanes = pad_lanes(t.from_count);
  transpose_rows({t.from, stride}, t.from_count, depth, lanes, s.panel);
  for (i64 i = 0; i < lanes; i += kLanes) {
    store(t.best + i, set1(-kInf));
    store(t.partner + i, zero());
  }
  for (i64 row = 0; row < t.into_count; row += kMatchRows) {
    const i64 rows = least(kMatchRows, t.into_count - row);
    for (i64 k = 0; k < most<i64>(depth, 1); k += kMatchDepth) {
      const Operand a{t.into + row * stride + k * 4, stride, 4};
      gemm<kDot>(a, s.panel + k * lanes, lanes * 4, s.tile, kPanel, rows, lanes / kLanes,
                 least(kMatchDepth, depth - k), k > 0);
    }
    switch (lanes / kLanes) {
    case 1:
      keep_best<1>(t, s.tile, row, rows);
      break;
    case 2:
      keep_best<2>(t, s.tile, row, rows);
      break;
    case 3:
      keep_best<kVectors == 4 ? 3 : 1>(t, s.tile, row, rows);
      break;
    default:
      keep_best<kVectors>(t, s.tile, row, rows);
    }
  }
}

inline void match(const MatchTask& t, char* scratch) {
  const MatchScratch s{{scratch}, t};
  with_pairs(uses_dot(t.type), [&](auto pairs) { match_rows<decltype(pairs)::value>(t, s); });
}

} // namespace mmkernels::MMK_ISA
