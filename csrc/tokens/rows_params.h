// What the kernel of rows of tokens takes: see rows.h.
#pragma once

#include <cstdint>

#include "../common/table.h"
#include "../common/type.h"

namespace mmkernels {

// Rows of a tensor [outer, inner, channels] by their number, or of [inner, channels].
struct RowsOf {
  const char* data = nullptr; // null: every row is zero
  std::int64_t inner = 1, outer_bytes = 0, row_bytes = 0;
};

// Row r of the result is row source[r] of `picked`, times weights[r] if there are weights, plus row r of `base` if
// `add`; where source[r] is -1, row r of `base`.
struct ComposeParams {
  RowsOf base, picked;
  const std::int32_t* source;
  const float* weights; // null: all are 1; not together with `add`
  char* out;            // contiguous rows
  std::int64_t bytes;   // of a row
  Type type;
  bool add;
  bool stream; // stores pass by the caches; rows and `out` are aligned to cache lines
};

struct RowKernels {
  void (*compose)(const ComposeParams&, std::int64_t first, std::int64_t last);
};

} // namespace mmkernels
