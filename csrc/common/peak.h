// The arithmetic peak, measured: independent multiply-adds in registers.
#pragma once

#include <time.h>

#include "table.h"
#include "tile_gemm.h"

namespace mmkernels {
namespace MMK_ISA {

template <bool kDot> double measure_peak() {
  constexpr int kGroups = kLanes == 16 ? 4 : 3,
                kChains = 4 * kGroups; // more than latency times throughput; all fit the registers
  constexpr i64 kRounds = 1 << 14;
  const auto now = [] {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
  };
  Vec acc[kGroups][4];
#pragma GCC unroll 8
  for (int m = 0; m < kGroups; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < 4; ++n) {
      acc[m][n] = set1(1.0f);
    }
  }
  const Vec a = set1(0.25f), b = set1(0.5f);
  double best = 0.0;
  for (int sample = 0; sample < 64; ++sample) { // some milliseconds
    const double begin = now();
    for (i64 i = 0; i < kRounds; ++i) {
#pragma GCC unroll 8
      for (int m = 0; m < kGroups; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < 4; ++n) {
          acc[m][n] = kDot ? dot(a, b, acc[m][n]) : fma(acc[m][n], a, b);
          keep(acc[m][n]);
        }
      }
    }
    best = most(best, (double)(kRounds * kChains * kLanes * (kDot ? 4 : 2)) / (now() - begin));
  }
  return best;
}

inline double peak(bool bf16) {
  return kHasDot && bf16 ? measure_peak<kHasDot>() : measure_peak<false>();
}

} // namespace MMK_ISA
} // namespace mmkernels
