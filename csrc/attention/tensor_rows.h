// Rows of an attention tensor.
#pragma once

#include "../common/rows.h"
#include "params.h"

namespace mmkernels::MMK_ISA {

MMK_INLINE char* row_at(const View& x, i64 b, i64 h, i64 i) {
  return x.data + (b * x.b + h * x.h + i * x.l) * bytes_of(x.type);
}
// The rows of one (b, h), from row i on.
MMK_INLINE Source source_of(const View& x, i64 b, i64 h, i64 i = 0) {
  return {row_at(x, b, h, i), x.type, x.l, x.d, nullptr};
}
MMK_INLINE i64 key_at(const KeyList& list, i64 place) {
  return list.index != nullptr ? list.index[place] : place;
}
// The rows of places first to first + count.
MMK_INLINE Source at_keys(Source x, const KeyList& list, i64 first, i64 count) {
  i64 row = first;
  if (list.index != nullptr) {
    row = list.index[first];
    if (list.index[first + count - 1] - row != count - 1) { // not contiguous
      x.index = list.index + first;
      return x;
    }
  }
  x.data += row * x.l * bytes_of(x.type);
  return x;
}

// Stores the first `count` lanes, `stride` bytes apart. Not inlined: GCC would unroll it inside of its callers' loops.
MMK_OUTLINE void store_strided(char* to, i64 stride, Type type, Vec v, i64 count) {
  for (i64 i = 0; i < least<i64>(kLanes, count); ++i) {
    store_one(to + i * stride, type, v[i]);
  }
}
// Stores a vector to the columns of a row from column `c` on, as far as there are `cols` of them.
MMK_INLINE void store_columns(const View& x, char* row, i64 c, i64 cols, Vec v) {
  const i64 size = bytes_of(x.type);
  if (x.d == 1) {
    store_from_f32(row + c * size, x.type, v, cols - c);
  } else {
    store_strided(row + c * x.d * size, x.d * size, x.type, v, cols - c);
  }
}

// Writes the sums of the places from `first` on to their keys' rows.
inline void write_key_rows(const float* from, i64 cols, float scale, const View x, const KeyList& list, i64 kv,
                           i64 key_heads, i64 first, i64 count) {
  const i64 padded = pad_lanes(cols);
  char* base = row_at(x, kv / key_heads, kv % key_heads, 0);
  for (i64 r = 0; r < count; ++r) {
    char* row = base + key_at(list, first + r) * x.l * bytes_of(x.type);
    for (i64 c = 0; c < cols; c += kLanes) {
      store_columns(x, row, c, cols, load(from + r * padded + c) * scale);
    }
  }
}

} // namespace mmkernels::MMK_ISA
