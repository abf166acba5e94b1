// The floor of co_attention's scores (GroundingDINO's clamp): whether it can matter, by the sides' largest norms, and
// where it can, the largest of all scores.
#pragma once

#include "co_attention_forward.h"

namespace mmkernels::MMK_ISA {

// The largest squared norm of rows [begin, end); NaN where one is not finite.
inline float largest_norm(const View& x, i64 dim, i64 b, i64 h, i64 begin, i64 end) {
  float top = 0.0f;
  for (i64 r = begin; r < end; ++r) {
    const char* row = row_at(x, b, h, r);
    Vec squares = zero();
    for (i64 c = 0; c < dim; c += kLanes) {
      Vec v;
      if (x.d == 1) {
        v = load_as_f32(row + c * bytes_of(x.type), x.type, dim - c);
      } else {
        for (i64 i = 0; i < kLanes; ++i) {
          v[i] = c + i < dim ? load_one(row + (c + i) * x.d * bytes_of(x.type), x.type) : 0.0f;
        }
      }
      squares = fma(v, v, squares);
    }
    const float norm = sum(squares);
    top = norm > top || norm != norm ? norm : top;
    if (!(top < kInf)) {
      return __builtin_nanf("");
    }
  }
  return top;
}

// Widens [low, high] to the finite ones of `count` elements, `stride` apart, from element `first` of the data on.
inline void widen_range(const View& x, i64 first, i64 stride, i64 count, float& low, float& high) {
  Vec least_of = set1(low), most_of = set1(high);
  for (i64 c = 0; c < count; c += kLanes) {
    const i64 n = least<i64>(kLanes, count - c);
    const char* at = x.data + (first + c * stride) * bytes_of(x.type);
    Vec v = set1(kInf);
    if (stride == 1) {
      v = load_as_f32(at, x.type, n);
    } else {
      for (i64 i = 0; i < n; ++i) {
        v[i] = load_one(at + i * stride * bytes_of(x.type), x.type);
      }
    }
    v = choose((std::uint32_t)((1u << n) - 1), v, set1(kInf));
    const Vec top = v - v == zero() ? v : set1(-kInf), bottom = v - v == zero() ? v : set1(kInf);
    most_of = top > most_of ? top : most_of;
    least_of = bottom < least_of ? bottom : least_of;
  }
  low = -largest(-least_of);
  high = largest(most_of);
}

inline float largest_score(const CoAttentionParams& p, i64 bh, i64 slab, char* memory) {
  CoForwardScratch scratch{{{memory}, p, true}, p};
  Tile keys(p, p.key, all_rows(p), bh, p.dim, {scratch.key_copy});
  const i64 end = least((slab + 1) * p.slab_panels, panels_of(p)), used = scratch.used;
  Vec top = set1(-kInf);
  for (i64 index = slab * p.slab_panels; index < end; ++index) {
    scratch.used = used;
    CoLanes s;
    begin_rows(p, all_rows(p), bh, index, s, scratch);
    const Panel& panel = s.panel;
    for (i64 a = 0; a < p.k_len; a += p.tile_rows) {
      const i64 b = least(a + p.tile_rows, p.k_len);
      keys.move(a, b - a);
      VisibleKeys pairs{a, b, nullptr, panel.real};
      const float unit = co_score_tile(p, panel, s.query, keys, pairs, scratch.scores, scratch.words) * kLn2;
      for (i64 r = 0; r < b - a; ++r) {
        for (i64 q = 0; q < panel.lanes; q += kLanes) {
          const Vec x = load(scratch.scores + r * panel.lanes + q);
          const Vec finite = x - x == zero() ? x * (p.bias.data != nullptr ? 1.0f : unit) : set1(-kInf);
          top = max_skip_nan(top, choose((std::uint32_t)(panel.real >> q), finite, set1(-kInf)));
        }
      }
    }
  }
  return largest(top);
}

} // namespace mmkernels::MMK_ISA
