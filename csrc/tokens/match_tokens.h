// Bipartite matching: for each token of one side the token of the other with the largest cosine. Tokens that may merge
// are lanes, those into which they may are rows. A tile of products never leaves the registers: only the running best
// is stored.
#pragma once

#include "../common/rows.h"
#include "../common/tile_gemm.h"
#include "cosine.h"
#include "merge_tokens_params.h"

namespace mmkernels::MMK_ISA {

inline i64 prepared_bytes(Type type, i64 dim) {
  return row_bytes(uses_dot(type), dim);
}

inline void prepare(const TokenRows& x, i64 dim, i64 first, i64 count, char* to, float* inverse) {
  const bool is_dot = uses_dot(x.type);
  const i64 stride = row_bytes(is_dot, dim), out = is_dot ? 2 : 4;
  with_type(x.type, [&](auto type) {
    constexpr Type kType = decltype(type)::value;
    for (i64 r = 0; r < count; ++r) {
      const char* from = x.data + (first + 2 * r) * x.stride;
      const RowScale s = row_scale<kType>(from, dim);
      const float factor = is_dot ? 1.0f : s.inverse; // bfloat16 would be rounded
      inverse[r] = is_dot ? s.inverse : 1.0f;
      for (i64 c = 0; c < dim; c += kLanes) {
        const Vec v = load_as_f32(from + c * bytes_of(kType), kType, dim - c);
        store_working(to + r * stride + c * out, is_dot, v * s.scale * factor);
      }
    }
  });
}

struct MatchScratch : Arena {
  explicit MatchScratch(Arena memory, const MatchTask& t) : Arena(memory) {
    panel = take<float>(depth_of(uses_dot(t.type), t.dim) * kPanel);
  }
  float* panel = nullptr;
};

inline i64 match_scratch(const MatchTask& t) {
  return scratch_bytes<MatchScratch>(t);
}

// kRows rows against kCols vectors of lanes: products in registers, then the running best. Of equal ones the first
// stays, NaN is skipped.
template <int kRows, int kCols, bool kDot>
MMK_INLINE void best_of_rows(const MatchTask& t, const float* panel, i64 lanes, i64 depth, i64 stride, i64 first) {
  Vec acc[kRows][kCols] = {};
  const char* a = t.into + first * stride;
  for (i64 k = 0; k < depth; ++k) {
    Vec x[kCols];
#pragma GCC unroll 4
    for (int n = 0; n < kCols; ++n) {
      x[n] = load(panel + k * lanes + n * kLanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec y = broadcast(a + m * stride + k * 4);
#pragma GCC unroll 4
      for (int n = 0; n < kCols; ++n) {
        acc[m][n] = multiply_add<kDot>(y, x[n], acc[m][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kCols; ++n) {
    Vec number = (Vec)((std::int32_t)first - IVec{});
    keep(number); // else GCC makes each row's number anew, from a scalar
    Vec best = load(t.best + n * kLanes);
    IVec partner = (IVec)load(t.partner + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec x = kDot ? acc[m][n] * t.into_inverse[first + m] : acc[m][n];
      const IVec row = (IVec)number + m;
#if defined(__AVX512F__)
      const __mmask16 more = _mm512_cmp_ps_mask((__m512)x, (__m512)best, _CMP_GT_OQ);
      partner = (IVec)_mm512_mask_mov_epi32((__m512i)partner, more, (__m512i)row);
#else
      partner = x > best ? row : partner;
#endif
      best = max_skip_nan(best, x);
    }
    store(t.best + n * kLanes, best);
    store(t.partner + n * kLanes, (Vec)partner);
  }
}

template <int kCols, bool kDot> void match_columns(const MatchTask& t, const float* panel, i64 lanes, i64 depth) {
  constexpr int kTall = kCols == 4 || (kLanes < 16 && kCols == 2) ? 6 : 8;
  const i64 stride = row_bytes(kDot, t.dim);
  i64 row = 0;
  const auto run = [&](auto height) {
    constexpr int kRows = decltype(height)::value;
    for (; row + kRows <= t.into_count; row += kRows) {
      best_of_rows<kRows, kCols, kDot>(t, panel, lanes, depth, stride, row);
    }
  };
  run(std::integral_constant<int, kTall>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

template <bool kDot> void match_rows(const MatchTask& t, float* panel) {
  const i64 depth = depth_of(kDot, t.dim), lanes = pad_lanes(t.from_count);
  transpose_rows({t.from, row_bytes(kDot, t.dim)}, t.from_count, depth, lanes, panel);
  for (i64 i = 0; i < lanes; i += kLanes) {
    store(t.best + i, set1(-kInf));
    store(t.partner + i, zero());
  }
  switch (lanes / kLanes) {
  case 1:
    return match_columns<1, kDot>(t, panel, lanes, depth);
  case 2:
    return match_columns<2, kDot>(t, panel, lanes, depth);
  case 3:
    return match_columns<kVectors == 4 ? 3 : 1, kDot>(t, panel, lanes, depth);
  default:
    return match_columns<kVectors, kDot>(t, panel, lanes, depth);
  }
}

inline void match(const MatchTask& t, char* scratch) {
  const MatchScratch s{{scratch}, t};
  with_pairs(uses_dot(t.type), [&](auto pairs) { match_rows<decltype(pairs)::value>(t, s.panel); });
}

} // namespace mmkernels::MMK_ISA
