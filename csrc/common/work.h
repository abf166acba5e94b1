// How much the contrastive ops' matrix products have multiplied, for benchmarks that count them.
#pragma once

#include <atomic>
#include <cstdint>

namespace mmkernels {

// FLOP since the process began, two for each product and sum.
inline std::atomic<std::int64_t>& multiplied() {
  static std::atomic<std::int64_t> total{0};
  return total;
}

} // namespace mmkernels
