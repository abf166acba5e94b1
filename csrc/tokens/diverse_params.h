// What the kernels of select_diverse take: plain data, no torch.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace mmkernels {

// [count, dim]; strides in elements.
struct StridedRows {
  const char* data = nullptr;
  Type type = Type::f32;
  std::int64_t dim = 0, row = 0, column = 1;
};

struct DiverseKernels {
  // Bytes of scratch memory that the others take.
  std::int64_t (*scratch)(std::int64_t dim);
  // Writes row `at` as float32, and returns 1 / its length; 0 where it has none, NaN where it is not finite.
  float (*read)(const StridedRows& rows, std::int64_t at, float* to, char* scratch);
  // Dots of a float32 row with rows [first, first + count).
  void (*dots)(const float* row, const StridedRows& rows, std::int64_t first, std::int64_t count, float* to,
               char* scratch);
  // row = scale * row - sum_m factors[m] * others[m], others float32 [count, dim].
  void (*subtract)(float* row, float scale, const float* others, const float* factors, std::int64_t count,
                   std::int64_t dim);
};

} // namespace mmkernels
