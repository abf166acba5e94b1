// What the arithmetic units give at best: independent multiply-adds in registers.
#pragma once

#include <time.h>

#include "table.h"
#include "tile_gemm.h"

namespace mmkernels::MMK_ISA {

// Multiplies and adds for some seconds; returns how many FLOP that were.
template <bool kDot> double multiply_for(double seconds) {
  constexpr int kGroups = kLanes == 16 ? 4 : 3, kChains = 4 * kGroups; // above latency times throughput, in registers
  constexpr i64 kRounds = 1 << 14;                                     // some 30 us
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
  const double end = now() + seconds;
  double flops = 0.0;
  do {
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
    flops += (double)(kRounds * kChains * kLanes * (kDot ? 4 : 2));
  } while (now() < end);
  return flops;
}

inline double multiply_in_registers(bool bf16, double seconds) {
  return kHasDot && bf16 ? multiply_for<kHasDot>(seconds) : multiply_for<false>(seconds);
}

} // namespace mmkernels::MMK_ISA
