// Rows of groups of tokens: sums into them, copies out of them, products with them.
#pragma once

#include "../common/rows.h"
#include "merge_tokens_params.h"

namespace mmkernels::MMK_ISA {

constexpr int kGroupVectors = 4; // of a row at a time, in registers

inline void sum_groups(const TokenGroups& g, const TokenRows& x, Type type, char* to, i64 first, i64 last) {
  const i64 size = bytes_of(x.type), out = bytes_of(type);
  for (i64 j = first; j < last; ++j) {
    const std::int32_t* tokens = g.order + g.starts[j];
    const i64 count = g.starts[j + 1] - g.starts[j];
    char* row = to + j * g.channels * out;
    if (count == 1 && x.type == type && (g.weights == nullptr || g.weights[tokens[0]] == 1.0f)) {
      std::memcpy(row, x.data + tokens[0] * x.stride, g.channels * size);
      continue;
    }
    for (i64 c = 0; c < g.channels; c += kGroupVectors * kLanes) {
      const i64 vectors = least<i64>(kGroupVectors, (g.channels - c + kLanes - 1) / kLanes);
      const auto sum = [&](auto whole) {
        Vec acc[kGroupVectors] = {};
        for (i64 n = 0; n < count; ++n) {
          const char* from = x.data + tokens[n] * x.stride + c * size;
          const Vec weight = set1(g.weights == nullptr ? 1.0f : g.weights[tokens[n]]);
#pragma GCC unroll 4
          for (int v = 0; v < kGroupVectors; ++v) {
            const i64 left = decltype(whole)::value ? kLanes : g.channels - c - v * kLanes;
            if (left > 0) {
              acc[v] = fma(load_as_f32(from + v * kLanes * size, x.type, left), weight, acc[v]);
            }
          }
        }
        for (int v = 0; v < vectors; ++v) {
          store_from_f32(row + (c + v * kLanes) * out, type, acc[v], g.channels - c - v * kLanes);
        }
      };
      if (c + kGroupVectors * kLanes <= g.channels) {
        sum(std::true_type());
      } else {
        sum(std::false_type());
      }
    }
  }
}

inline void spread_groups(const TokenGroups& g, const TokenRows& y, char* to, i64 first, i64 last) {
  const i64 size = bytes_of(y.type);
  for (i64 i = first; i < last; ++i) {
    const char* from = y.data + g.group[i] * y.stride;
    char* row = to + i * g.channels * size;
    if (g.weights == nullptr || g.weights[i] == 1.0f) {
      std::memcpy(row, from, g.channels * size);
      continue;
    }
    const Vec weight = set1(g.weights[i]);
    for (i64 c = 0; c < g.channels; c += kLanes) {
      const i64 left = g.channels - c;
      store_from_f32(row + c * size, y.type, load_as_f32(from + c * size, y.type, left) * weight, left);
    }
  }
}

inline void group_dots(const TokenGroups& g, const TokenRows& x, const TokenRows& y, float* to, i64 first, i64 last) {
  const i64 size = bytes_of(x.type);
  for (i64 i = first; i < last; ++i) {
    const char *a = x.data + i * x.stride, *b = y.data + g.group[i] * y.stride;
    Vec acc = zero();
    for (i64 c = 0; c < g.channels; c += kLanes) {
      const i64 left = g.channels - c;
      acc = fma(load_as_f32(a + c * size, x.type, left), load_as_f32(b + c * size, y.type, left), acc);
    }
    to[i] = sum(acc);
  }
}

} // namespace mmkernels::MMK_ISA
