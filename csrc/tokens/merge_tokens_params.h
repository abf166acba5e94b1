// Calls of match_tokens, merge_tokens and unmerge_tokens as the kernels see them: plain data, no torch.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace mmkernels {

// Rows of channels next to each other.
struct TokenRows {
  const char* data = nullptr;
  Type type = Type::f32;
  std::int64_t stride = 0; // bytes from one row to the next
};

// Some tokens of one image that may merge, against all into which they may. Both are rows as `prepare` writes them.
struct MatchTask {
  Type type = Type::f32; // of the metric
  std::int64_t dim = 0;
  const char *from = nullptr, *into = nullptr;
  const float* into_inverse = nullptr; // 1 / the length of each row, as `prepare` says
  std::int64_t from_count = 0, into_count = 0;
  float* best = nullptr; // [panel]: the largest product with a row of length 1; -inf: all are NaN
  std::int32_t* partner = nullptr;
};

// Tokens in groups. Token i is of group[i]; order[starts[j]] to order[starts[j + 1] - 1] are the tokens of group j.
struct TokenGroups {
  std::int64_t channels = 0;
  const std::int32_t *group = nullptr, *order = nullptr, *starts = nullptr;
  const float* weights = nullptr; // of tokens; null: 1 each
};

// The kernels of one instruction set.
struct MergeTokensKernels {
  std::int64_t panel;                                   // the most tokens of a MatchTask
  std::int64_t (*prepared_bytes)(Type, std::int64_t d); // of a row
  // Tokens first, first + 2, ...: rows as products read them, and 1 / their lengths. A row of zeros stays, one that is
  // not finite is NaN. Rows of float32 have length 1; those of bfloat16 pairs, which that would round, are near it.
  void (*prepare)(const TokenRows&, std::int64_t dim, std::int64_t first, std::int64_t count, char* to, float* inverse);
  std::int64_t (*match_scratch)(const MatchTask&);
  void (*match)(const MatchTask&, char* scratch);

  // Groups [first, last): the weighted sums of their tokens' rows, in the rows' type or float32.
  void (*sum_groups)(const TokenGroups&, const TokenRows& tokens, Type type, char* to, std::int64_t first,
                     std::int64_t last);
  // Tokens [first, last): their groups' rows times their weights.
  void (*spread_groups)(const TokenGroups&, const TokenRows& groups, char* to, std::int64_t first, std::int64_t last);
  // Tokens [first, last): the products of their rows with their groups' rows.
  void (*group_dots)(const TokenGroups&, const TokenRows& tokens, const TokenRows& groups, float* to,
                     std::int64_t first, std::int64_t last);
};

} // namespace mmkernels
