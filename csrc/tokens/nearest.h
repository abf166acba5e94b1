// For each token that is not kept, the kept token of its image with the largest cosine similarity; sums of tokens.
// Kept tokens are lanes, the rest are rows; of a tile of products only each row's best is kept. The norm of a row of
// the rest divides all of its similarities, so that it is not computed.
#pragma once

#include "../common/rows.h"
#include "../common/tile_gemm.h"
#include "cosine.h"
#include "nearest_params.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kNearestRows = 48;   // of a tile: with a panel's step, in the caches of one core
constexpr i64 kNearestDepth = 128; // 32-bit elements that are summed in one chain

inline i64 packed_floats(const TokenMatrix& x) {
  return depth_of(uses_dot(x.type), x.channels) * kPanel;
}
// Of the panels and the inverse norms, which are of whole panels too.
inline i64 nearest_panels_bytes(const TokenMatrix& x, i64 kept) {
  return round_up(kept, kPanel) / kPanel * (packed_floats(x) + kPanel) * (i64)sizeof(float);
}

struct NearestScratch : Arena {
  explicit NearestScratch(Arena memory, const TokenMatrix& x) : Arena(memory) {
    const i64 stride = row_bytes(uses_dot(x.type), x.channels);
    rows = take<char>(kPanel > kNearestRows ? kPanel * stride : kNearestRows * stride);
    tile = take<float>(kNearestRows * kPanel);
    best = take<float>(kNearestRows * kLanes);
    winner = take<std::int32_t>(kNearestRows * kLanes);
  }
  char* rows = nullptr;
  float *tile = nullptr, *best = nullptr;
  std::int32_t* winner = nullptr;
};

inline i64 nearest_scratch(const TokenMatrix& x) {
  return scratch_bytes<NearestScratch>(x);
}

MMK_INLINE Source source_of(const TokenMatrix& x, const std::int32_t* index) {
  return {x.data, x.type, x.row_bytes / bytes_of(x.type), 1, index};
}

// Scales a row in the working format by a power of two, and returns 1 over its norm then; 0 for a row of zeros, NaN for
// one that is not finite.
inline float scale_row(char* row, i64 channels, bool is_dot) {
  const Type type = is_dot ? Type::bf16 : Type::f32;
  Vec top = zero(), squares = zero();
  for (i64 c = 0; c < channels; c += kLanes) {
    const Vec x = load_as_f32(row + c * bytes_of(type), type, channels - c);
    top = max_skip_nan(top, (Vec)((IVec)x & 0x7fffffff));
  }
  const Vec scale = set1(scale_near_one(largest(top)));
  for (i64 c = 0; c < channels; c += kLanes) {
    char* at = row + c * bytes_of(type);
    const Vec x = load_as_f32(at, type, channels - c) * scale;
    store_from_f32(at, type, x, channels - c);
    squares = fma(x, x, squares);
  }
  const float square = sum(squares);
  return square == 0.0f ? 0.0f : square < kInf ? 1.0f / __builtin_sqrtf(square) : kInf - kInf;
}

inline void pack_kept(const TokenMatrix& x, const KeptTokens& kept, i64 panel, char* scratch) {
  const NearestScratch s{{scratch}, x};
  const bool is_dot = uses_dot(x.type);
  const i64 first = panel * kPanel, count = least<i64>(kPanel, kept.count - first);
  // A copy, since the rows are listed.
  const Rows rows = fetch(source_of(x, kept.index + first), count, x.channels, is_dot, s.rows);
  for (i64 lane = 0; lane < kPanel; ++lane) { // NaN, which is no similarity's best, where there is no token
    kept.inverse_norms[first + lane] =
        lane < count ? scale_row(s.rows + lane * rows.stride, x.channels, is_dot) : kInf - kInf;
  }
  transpose_rows(rows, count, depth_of(is_dot, x.channels), kPanel, kept.panels + panel * packed_floats(x));
}

// Compares a tile with the best so far: of equal ones the first stays, NaN is skipped.
inline void keep_best(const NearestScratch& s, const float* inverse, i64 first, i64 rows, i64 vectors) {
  for (i64 r = 0; r < rows; ++r) {
    Vec best = load(s.best + r * kLanes);
    IVec winner = (IVec)load(s.winner + r * kLanes);
    for (i64 v = 0; v < vectors; ++v) {
      const Vec x = load(s.tile + r * kPanel + v * kLanes) * load(inverse + v * kLanes);
      const IVec number = (std::int32_t)(first / kLanes + v) - IVec{};
      const IVec more = x > best;
      best = more ? x : best;
      winner = more ? number : winner;
    }
    store(s.best + r * kLanes, best);
    store(s.winner + r * kLanes, (Vec)winner);
  }
}

// The lane with the best; of equal ones, that of the first kept token. `winner` holds numbers of whole vectors.
MMK_INLINE std::int32_t best_of(const float* best, const std::int32_t* winner) {
  std::int32_t number = 0;
  float top = -kInf;
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int32_t here = winner[lane] * kLanes + lane;
    if (best[lane] > top || (best[lane] == top && top > -kInf && here < number)) {
      top = best[lane];
      number = here;
    }
  }
  return number;
}

// Calls f(first, vectors) with the products of rows near 1 with each panel of kept tokens, in s.tile.
template <typename F>
MMK_INLINE void each_panel(const TokenMatrix& x, const KeptTokens& kept, Rows rows, i64 count, const NearestScratch& s,
                           const F& f) {
  const bool is_dot = uses_dot(x.type);
  const i64 depth = depth_of(is_dot, x.channels);
  for (i64 first = 0; first < kept.count; first += kPanel) {
    const i64 vectors = (least<i64>(kPanel, kept.count - first) + kLanes - 1) / kLanes;
    const float* panel = kept.panels + first / kPanel * packed_floats(x);
    with_pairs(is_dot, [&](auto pairs) {
      for (i64 k = 0; k < depth; k += kNearestDepth) {
        const Operand a{rows.data + k * 4, rows.stride, 4};
        gemm<decltype(pairs)::value>(a, panel + k * kPanel, kPanel * 4, s.tile, kPanel, count, vectors,
                                     least(kNearestDepth, depth - k), k > 0);
      }
    });
    f(first, vectors);
  }
}

inline void nearest(const TokenMatrix& x, const KeptTokens& kept, const std::int32_t* rest, i64 count,
                    std::int32_t* place, char* scratch) {
  const NearestScratch s{{scratch}, x};
  const bool is_dot = uses_dot(x.type);
  const Rows rows = fetch(source_of(x, rest), count, x.channels, is_dot, s.rows);
  for (i64 r = 0; r < count; ++r) {
    scale_row(s.rows + r * rows.stride, x.channels, is_dot);
  }
  for (i64 i = 0; i < count * kLanes; i += kLanes) {
    store(s.best + i, set1(-kInf));
    store(s.winner + i, zero());
  }
  each_panel(x, kept, rows, count, s,
             [&](i64 first, i64 vectors) { keep_best(s, kept.inverse_norms + first, first, count, vectors); });
  for (i64 r = 0; r < count; ++r) {
    place[rest[r]] = kept.first + best_of(s.best + r * kLanes, s.winner + r * kLanes);
  }
}

// Rows near 1, and 1 over their norms: in place where they are so, else copied and scaled.
inline Rows rows_near_one(const TokenMatrix& x, i64 first, i64 count, const NearestScratch& s, float* inverse) {
  const bool is_dot = uses_dot(x.type);
  Source source = source_of(x, nullptr);
  source.data += first * x.row_bytes;
  bool near = usable_in_place(source, x.channels, is_dot);
  with_type(x.type, [&](auto type) {
    constexpr Type kType = decltype(type)::value;
    for (i64 r = 0; r < count && near; ++r) {
      const char* row = source.data + r * x.row_bytes;
      const float square = products_of<kType, kType>(row, row, x.channels).square;
      near = is_near_one(square);
      inverse[r] = 1.0f / __builtin_sqrtf(square);
    }
  });
  if (near) {
    return {source.data, x.row_bytes};
  }
  const Rows rows = fetch(source, count, x.channels, is_dot, s.rows);
  const i64 stride = row_bytes(is_dot, x.channels);
  for (i64 r = 0; r < count; ++r) {
    if (rows.data != s.rows) {
      std::memcpy(s.rows + r * stride, rows.data + r * rows.stride, x.channels * bytes_of(x.type));
    }
    inverse[r] = scale_row(s.rows + r * stride, x.channels, is_dot);
  }
  return {s.rows, stride};
}

// The largest cosine of each of some rows with a kept token, or the smallest. NaN of a row that is not finite.
inline void extreme(const TokenMatrix& x, const KeptTokens& kept, i64 begin, i64 count, bool smallest, float* to,
                    char* scratch) {
  const NearestScratch s{{scratch}, x};
  const float sign = smallest ? -1.0f : 1.0f;
  float inverse[kNearestRows];
  const Rows rows = rows_near_one(x, begin, count, s, inverse);
  for (i64 r = 0; r < count; ++r) {
    store(s.best + r * kLanes, set1(-kInf));
  }
  each_panel(x, kept, rows, count, s, [&](i64 first, i64 vectors) {
    for (i64 r = 0; r < count; ++r) {
      Vec best = load(s.best + r * kLanes);
      for (i64 v = 0; v < vectors; ++v) {
        const Vec norms = load(kept.inverse_norms + first + v * kLanes) * sign;
        best = max_skip_nan(best, load(s.tile + r * kPanel + v * kLanes) * norms);
      }
      store(s.best + r * kLanes, best);
    }
  });
  for (i64 r = 0; r < count; ++r) {
    to[r] = sign * largest(load(s.best + r * kLanes)) * inverse[r];
  }
}

// Rows [first, last) of the sums.
inline void sum_tokens(const TokenMatrix& x, const TokenSums& sums, char* out, i64 first, i64 last) {
  constexpr int kAtOnce = 4; // vectors of a row, in registers
  const i64 size = bytes_of(x.type);
  for (i64 row = first; row < last; ++row) {
    char* to = out + row * x.channels * size;
    for (i64 c = 0; c < x.channels; c += kAtOnce * kLanes) {
      Vec total[kAtOnce] = {};
      for (i64 n = sums.starts[row]; n < sums.starts[row + 1]; ++n) {
        const std::int32_t token = sums.order[n];
        const Vec weight = set1(sums.weights[token]);
        const char* from = x.data + token * x.row_bytes + c * size;
#pragma GCC unroll 4
        for (int v = 0; v < kAtOnce; ++v) {
          const i64 left = x.channels - c - v * kLanes;
          if (left > 0) {
            total[v] = fma(load_as_f32(from + v * kLanes * size, x.type, left), weight, total[v]);
          }
        }
      }
      for (int v = 0; v < kAtOnce; ++v) {
        const i64 left = x.channels - c - v * kLanes;
        if (left > 0) {
          store_from_f32(to + (c + v * kLanes) * size, x.type, total[v], left);
        }
      }
    }
  }
}

} // namespace mmkernels::MMK_ISA
