// Writes gradients from float32 sums, in the gradient's dtype and layout.
#pragma once

#include "mask.h"

namespace mmkernels {
namespace MMK_ISA {

// Writes the sums of the places from `first` on to their keys' rows.
inline void write_key_rows(const float* from, i64 cols, float scale, const View& x, const KeyList& list, i64 kv,
                           i64 key_heads, i64 first, i64 count) {
  const i64 size = bytes_of(x.type), padded = pad_lanes(cols);
  char* base = x.data + (kv / key_heads * x.b + kv % key_heads * x.h) * size;
  for (i64 r = 0; r < count; ++r) {
    char* row = base + key_at(list, first + r) * x.l * size;
    for (i64 c = 0; c < cols; c += kLanes) {
      const Vec y = load(from + r * padded + c) * scale;
      if (x.d == 1) {
        store_from_f32(row + c * size, x.type, y, cols - c);
      } else {
        for (i64 i = 0; i < least<i64>(kLanes, cols - c); ++i) {
          store_one(row + (c + i) * x.d * size, x.type, y[i]);
        }
      }
    }
  }
}

// Rows [begin, end) of dQ [B, Hq, Lq]: the sum over the splits, in their order.
inline void backward_merge(const AttentionParams& p, i64 begin, i64 end) {
  const View& x = p.grad_query;
  const i64 rows = p.batch * p.heads * p.q_len;
  for (i64 r = begin; r < end; ++r) {
    char* to =
        x.data + (r / (p.heads * p.q_len) * x.b + r / p.q_len % p.heads * x.h + r % p.q_len * x.l) * bytes_of(x.type);
    for (i64 c = 0; c < p.dim; c += kLanes) {
      const i64 n = least<i64>(kLanes, p.dim - c);
      Vec total = zero();
      for (i64 s = 0; s < p.splits; ++s) {
        total += load_part(p.query_parts + (s * rows + r) * p.dim + c, n);
      }
      if (x.d == 1) {
        store_from_f32(to + c * bytes_of(x.type), x.type, total, n);
      } else {
        for (i64 i = 0; i < n; ++i) {
          store_one(to + (c + i) * x.d * bytes_of(x.type), x.type, total[i]);
        }
      }
    }
  }
}

} // namespace MMK_ISA
} // namespace mmkernels
