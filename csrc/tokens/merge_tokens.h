// Rows of groups of tokens: sums into them, copies out of them, products with them.
#pragma once

#include "loops.h"
#include "merge_tokens_params.h"

namespace mmkernels::MMK_ISA {

constexpr int kGroupVectors = 4; // of a row at a time, in registers

// One group's sum of kCount vectors of channels.
template <int kCount, Type kFrom, Type kTo>
MMK_INLINE void sum_channels(const TokenGroups& g, const TokenRows& x, const std::int32_t* tokens, i64 count, i64 c,
                             i64 left, char* to) {
  Vec acc[kCount] = {};
  for (i64 n = 0; n < count; ++n) {
    const char* from = x.data + tokens[n] * x.stride + c * bytes_of(kFrom);
    const Vec weight = set1(g.weights == nullptr ? 1.0f : g.weights[tokens[n]]);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      acc[v] = fma(load_as_f32(from + v * kLanes * bytes_of(kFrom), kFrom, left), weight, acc[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    store_from_f32(to + (c + v * kLanes) * bytes_of(kTo), kTo, acc[v], left);
  }
}

template <Type kFrom, Type kTo> void sum_rows(const TokenGroups& g, const TokenRows& x, char* to, i64 first, i64 last) {
  for (i64 j = first; j < last; ++j) {
    const std::int32_t* tokens = g.order + g.starts[j];
    const i64 count = g.starts[j + 1] - g.starts[j];
    char* row = to + j * g.channels * bytes_of(kTo);
    if (count == 1 && kFrom == kTo && (g.weights == nullptr || g.weights[tokens[0]] == 1.0f)) {
      std::memcpy(row, x.data + tokens[0] * x.stride, g.channels * bytes_of(kFrom));
      continue;
    }
    i64 c = 0;
    for (; c + kGroupVectors * kLanes <= g.channels; c += kGroupVectors * kLanes) {
      sum_channels<kGroupVectors, kFrom, kTo>(g, x, tokens, count, c, kLanes, row);
    }
    for (; c < g.channels; c += kLanes) {
      sum_channels<1, kFrom, kTo>(g, x, tokens, count, c, least<i64>(kLanes, g.channels - c), row);
    }
  }
}

inline void sum_groups(const TokenGroups& g, const TokenRows& x, Type type, char* to, i64 first, i64 last) {
  with_type(x.type, [&](auto from) {
    constexpr Type kFrom = decltype(from)::value;
    if (type == kFrom) {
      sum_rows<kFrom, kFrom>(g, x, to, first, last);
    } else {
      sum_rows<kFrom, Type::f32>(g, x, to, first, last);
    }
  });
}

inline void spread_groups(const TokenGroups& g, const TokenRows& y, char* to, i64 first, i64 last) {
  with_type(y.type, [&](auto type) {
    constexpr Type kType = decltype(type)::value;
    constexpr i64 kSize = bytes_of(kType);
    for (i64 i = first; i < last; ++i) {
      const char* from = y.data + g.group[i] * y.stride;
      char* row = to + i * g.channels * kSize;
      if (g.weights == nullptr || g.weights[i] == 1.0f) {
        std::memcpy(row, from, g.channels * kSize);
        continue;
      }
      const Vec weight = set1(g.weights[i]);
      each_vector(g.channels, [&](i64 c, i64 count) {
        store_from_f32(row + c * kSize, kType, load_as_f32(from + c * kSize, kType, count) * weight, count);
      });
    }
  });
}

inline void group_dots(const TokenGroups& g, const TokenRows& x, const TokenRows& y, float* to, i64 first, i64 last) {
  with_type(x.type, [&](auto type) {
    constexpr Type kType = decltype(type)::value;
    constexpr i64 kSize = bytes_of(kType);
    for (i64 i = first; i < last; ++i) {
      const char *a = x.data + i * x.stride, *b = y.data + g.group[i] * y.stride;
      Vec acc = zero();
      each_vector(g.channels, [&](i64 c, i64 count) {
        acc = fma(load_as_f32(a + c * kSize, kType, count), load_as_f32(b + c * kSize, kType, count), acc);
      });
      to[i] = sum(acc);
    }
  });
}

} // namespace mmkernels::MMK_ISA
