// Groups of tokens on the host: which tokens are in each, their weights, and the work cut for the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/arguments.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "merge_tokens_params.h"

namespace mmkernels {

MMK_TABLES(MergeTokensKernels, merge_tokens_kernels)

// Which group each token is in, and each group's tokens in their order.
class Grouping {
public:
  // Takes the groups of tokens, from 0 to count - 1, each with a token.
  Grouping(std::vector<std::int32_t> group, i64 count)
      : group_(std::move(group)), order_(group_.size()), starts_(count + 1) {
    for (const std::int32_t j : group_) {
      ++starts_[j + 1];
    }
    for (i64 j = 0; j < count; ++j) {
      starts_[j + 1] += starts_[j];
    }
    std::vector<std::int32_t> next(starts_.begin(), starts_.end() - 1);
    for (std::size_t i = 0; i < group_.size(); ++i) {
      order_[next[group_[i]]++] = static_cast<std::int32_t>(i);
    }
  }

  i64 tokens() const {
    return static_cast<i64>(group_.size());
  }
  i64 count() const {
    return static_cast<i64>(starts_.size()) - 1;
  }
  std::int32_t of(i64 token) const {
    return group_[token];
  }
  // Each group's sum of x over its tokens; `x` is null for 1 each.
  std::vector<float> sums(const float* x) const {
    std::vector<float> total(count());
    for (i64 i = 0; i < tokens(); ++i) {
      total[group_[i]] += x == nullptr ? 1.0f : x[i];
    }
    return total;
  }
  // The weight of each token in its group's mean: its size over the sum of sizes.
  std::vector<float> weights(const float* sizes, const float* total) const {
    std::vector<float> found(tokens());
    for (i64 i = 0; i < tokens(); ++i) {
      found[i] = (sizes == nullptr ? 1.0f : sizes[i]) / total[group_[i]];
    }
    return found;
  }
  // `weights`: null for 1 each.
  TokenGroups rows(i64 channels, const float* weights) const {
    return {channels, group_.data(), order_.data(), starts_.data(), weights};
  }

private:
  std::vector<std::int32_t> group_, order_, starts_;
};

// Each token's group, from 0 to count - 1, from a tensor int64 [tokens].
inline std::vector<std::int32_t> groups_from(const Tensor& assignment, i64 tokens, i64 count) {
  check_sizes("assignment", assignment, {tokens});
  TORCH_CHECK_TYPE(assignment.scalar_type() == at::kLong, "assignment must be int64, got ", assignment.scalar_type());
  TORCH_CHECK_VALUE(tokens < INT32_MAX && count < INT32_MAX, "there are too many tokens");
  const Tensor contiguous = assignment.contiguous();
  const i64* from = contiguous.const_data_ptr<i64>();
  std::vector<std::int32_t> group(tokens);
  for (i64 i = 0; i < tokens; ++i) {
    TORCH_CHECK_VALUE(from[i] >= 0 && from[i] < count, "assignment must be from 0 to ", count - 1, ", got ", from[i]);
    group[i] = static_cast<std::int32_t>(from[i]);
  }
  return group;
}

inline Grouping grouping_of(const Tensor& assignment, i64 tokens, i64 count) {
  return Grouping(groups_from(assignment, tokens, count), count);
}

// Rows with channels next to each other: `x` itself, or a copy that is kept in `keep`.
inline TokenRows rows_of(const char* name, const Tensor& x, Tensor& keep) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.device().is_cpu(), name, " must be [tokens, C] on the CPU, got ", x.sizes());
  keep = x.size(1) == 1 || x.stride(1) == 1 ? x : x.contiguous();
  return {static_cast<const char*>(keep.const_data_ptr()), type_of(keep),
          keep.stride(0) * static_cast<i64>(keep.element_size())};
}

// Calls run(first, last) for runs of `count` rows of so many channels.
template <typename F> void for_rows(i64 count, i64 channels, const F& run) {
  // Moving an element takes as long as some 40 FLOP; a task moves 16,384 of them, or one row.
  const int threads = threads_for(40.0 * static_cast<double>(count) * static_cast<double>(channels));
  const i64 step = threads == 1 ? std::max<i64>(count, 1) : std::max<i64>(16384 / std::max<i64>(channels, 1), 1);
  parallel_tasks((count + step - 1) / step, threads, 0,
                 [&](i64 task, char*) { run(task * step, std::min(count, (task + 1) * step)); });
}

} // namespace mmkernels
