// Rows of tokens composed from two tensors: the kernel of scatter_tokens and select_tokens, forward and backward.
#pragma once

#include "../common/rows.h"
#include "rows_params.h"
#include "stream.h"

namespace mmkernels::MMK_ISA {

// Null: a row of zeros.
MMK_INLINE const char* row_at(const RowsOf& x, i64 row) {
  return x.data == nullptr ? nullptr : x.data + row / x.inner * x.outer_bytes + row % x.inner * x.row_bytes;
}

template <Type kType> void add_rows(char* __restrict to, const char* a, const char* b, i64 bytes) {
  constexpr i64 kSize = bytes_of(kType), kStep = kLanes * kSize;
  i64 at = 0;
  for (; at + kStep <= bytes; at += kStep) {
    const Vec sum = load_as_f32(a + at, kType, kLanes) + load_as_f32(b + at, kType, kLanes);
    store_from_f32(to + at, kType, sum, kLanes);
  }
  if (const i64 count = (bytes - at) / kSize; count > 0) {
    store_from_f32(to + at, kType, load_as_f32(a + at, kType, count) + load_as_f32(b + at, kType, count), count);
  }
}

MMK_INLINE void add_rows(char* to, const char* a, const char* b, i64 bytes, Type type) {
  switch (type) {
  case Type::f32:
    return add_rows<Type::f32>(to, a, b, bytes);
  case Type::bf16:
    return add_rows<Type::bf16>(to, a, b, bytes);
  case Type::f16:
    return add_rows<Type::f16>(to, a, b, bytes);
  }
}

inline void weigh_row(char* to, const char* from, float weight, i64 bytes, Type type) {
  const i64 size = bytes_of(type);
  for (i64 at = 0; at < bytes; at += kLanes * size) {
    const i64 count = (bytes - at) / size;
    store_from_f32(to + at, type, load_as_f32(from + at, type, count) * weight, count);
  }
}

inline void compose_rows(const ComposeParams& p, i64 first, i64 last) {
  for (i64 row = first; row < last; ++row) {
    const i64 source = p.source[row];
    const char* from = source < 0 ? row_at(p.base, row) : row_at(p.picked, source);
    char* to = p.out + row * p.bytes;
    if (from == nullptr) {
      std::memset(to, 0, p.bytes);
    } else if (source >= 0 && p.add) {
      add_rows(to, row_at(p.base, row), from, p.bytes, p.type);
    } else if (source >= 0 && p.weights != nullptr && p.weights[row] != 1.0f) {
      weigh_row(to, from, p.weights[row], p.bytes, p.type);
    } else {
      copy_row(to, from, p.bytes, p.stream);
    }
  }
  end_stream(p.stream);
}

} // namespace mmkernels::MMK_ISA
