// How many FLOP the contrastive and linear ops' matrix products have computed, for benchmarks that count them.
#pragma once

#include <atomic>
#include <cstdint>

namespace mmkernels {

// Since the process began; a multiply-add counts as two.
inline std::atomic<std::int64_t>& multiplied() {
  static std::atomic<std::int64_t> total{0};
  return total;
}

} // namespace mmkernels
