// Rows of one (b, h) of an attention tensor.
#pragma once

#include "../common/rows.h"
#include "params.h"

namespace mmkernels {
namespace MMK_ISA {

MMK_INLINE Source source_of(const View& x, i64 b, i64 h) {
  return {x.data + (b * x.b + h * x.h) * bytes_of(x.type), x.type, x.l, x.d, nullptr};
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

// Prefetches rows of one (b, h): they lie so far apart that the hardware does not.
template <bool kToWrite> MMK_INLINE void prefetch_rows(const View& x, i64 b, i64 h, i64 first, i64 count, i64 cols) {
  const i64 size = bytes_of(x.type);
  const char* base = x.data + (b * x.b + h * x.h + first * x.l) * size;
  for (i64 r = 0; r < count && x.d == 1; ++r) {
    for (i64 byte = 0; byte < cols * size; byte += 64) {
      __builtin_prefetch(base + r * x.l * size + byte, kToWrite ? 1 : 0, 2);
    }
  }
}

// Writes [channels, lanes] to `count` rows of one (b, h) of a tensor, each lane times its factor.
inline void write_rows(const float* tile, i64 lanes, i64 channels, const float* factor, const View& x, i64 b, i64 h,
                       i64 first, i64 count) {
  const i64 size = bytes_of(x.type);
  char* base = x.data + (b * x.b + h * x.h + first * x.l) * size;
  for (i64 q = 0; q < count; q += kLanes) {
    const Vec scale = load(factor + q);
    for (i64 c = 0; c < channels; c += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = c + i < channels ? load(tile + (c + i) * lanes + q) * scale : zero();
      }
      transpose(block);
      for (i64 i = 0; i < least<i64>(kLanes, count - q); ++i) {
        char* row = base + (q + i) * x.l * size;
        if (x.d == 1) {
          store_from_f32(row + c * size, x.type, block[i], channels - c);
        } else {
          for (i64 n = 0; n < least<i64>(kLanes, channels - c); ++n) {
            store_one(row + (c + n) * x.d * size, x.type, block[i][n]);
          }
        }
      }
    }
  }
}

} // namespace MMK_ISA
} // namespace mmkernels
