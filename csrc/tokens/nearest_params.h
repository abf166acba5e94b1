// What the kernels take that compare tokens with kept ones, of select_tokens and token_similarity: see nearest.h.
#pragma once

#include <cstdint>

#include "../common/table.h"
#include "../common/type.h"

namespace mmkernels {

// Rows [tokens, channels] with contiguous channels.
struct TokenMatrix {
  const char* data;
  std::int64_t row_bytes, channels;
  Type type;
};

// The kept tokens of one image, packed, and numbered from `first` on in the result.
struct KeptTokens {
  const std::int32_t* index; // rows of the matrix
  std::int64_t count;
  std::int32_t first;
  float *panels, *inverse_norms;
};

// Which tokens are summed into each row of a result, by row and in ascending order, and with which weights.
struct TokenSums {
  const std::int32_t *order, *starts;
  const float* weights; // by token
};

struct NearestKernels {
  std::int64_t rows;  // of the rest that a call of `nearest` takes at most
  std::int64_t panel; // kept tokens in one panel
  std::int64_t (*panels_bytes)(const TokenMatrix&, std::int64_t kept);
  std::int64_t (*scratch)(const TokenMatrix&);
  void (*pack)(const TokenMatrix&, const KeptTokens&, std::int64_t panel, char* scratch);
  void (*nearest)(const TokenMatrix&, const KeptTokens&, const std::int32_t* rest, std::int64_t count,
                  std::int32_t* place, char* scratch);
  // The largest or smallest cosine of each of so many tokens from `first` on with a kept one; at most `rows` of them.
  void (*extreme)(const TokenMatrix&, const KeptTokens&, std::int64_t first, std::int64_t count, bool smallest,
                  float* to, char* scratch);
  void (*sum)(const TokenMatrix&, const TokenSums&, char* out, std::int64_t first, std::int64_t last);
};

} // namespace mmkernels
