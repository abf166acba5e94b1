// merge_tokens and unmerge_tokens on the CPU, forward and backward. The public functions have checked the arguments.
#include <ATen/EmptyTensor.h>

#include <numeric>
#include <tuple>

#include "groups.h"

namespace mmkernels {
namespace {

Tensor empty_rows(i64 rows, i64 channels, at::ScalarType type) {
  return expect_writes(at::detail::empty_cpu({rows, channels}, type));
}

Tensor tensor_of(const std::vector<float>& x) {
  const Tensor y = at::detail::empty_cpu({static_cast<i64>(x.size())}, at::kFloat);
  std::copy(x.begin(), x.end(), y.mutable_data_ptr<float>());
  return y;
}

Tensor no_gradient(const Tensor& like) {
  return at::detail::empty_cpu({0}, like.scalar_type());
}

// float32 [count], contiguous; undefined where there is none.
Tensor floats_of(const char* name, const OptionalTensor& x, i64 count) {
  if (!x.has_value()) {
    return Tensor();
  }
  check_sizes(name, *x, {count});
  TORCH_CHECK_TYPE(x->scalar_type() == at::kFloat, name, " must be float32, got ", x->scalar_type());
  return x->contiguous();
}

const float* data_of(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

i64 count_of(const Arguments& args) {
  const std::vector<i64> kept = args.sizes("kept");
  return std::accumulate(kept.begin(), kept.end(), i64{0});
}

void sum_groups(const Grouping& groups, const float* weights, const TokenRows& x, const Tensor& to) {
  const MergeTokensKernels& k = merge_tokens_kernels();
  const TokenGroups g = groups.rows(to.size(1), weights);
  const Type type = type_of(to);
  char* data = static_cast<char*>(to.mutable_data_ptr());
  for_rows(groups.count(), to.size(1), [&](i64 first, i64 last) { k.sum_groups(g, x, type, data, first, last); });
}

void spread_groups(const TokenGroups& g, const TokenRows& y, const Tensor& to) {
  const MergeTokensKernels& k = merge_tokens_kernels();
  char* data = static_cast<char*>(to.mutable_data_ptr());
  for_rows(to.size(0), to.size(1), [&](i64 first, i64 last) { k.spread_groups(g, y, data, first, last); });
}

std::tuple<Tensor, Tensor> merge_tokens(const Arguments& args) {
  const Tensor& x = args.tensor("x");
  Tensor keep;
  const TokenRows rows = rows_of("x", x, keep);
  const Tensor sizes = floats_of("sizes", args.optional_tensor("sizes"), x.size(0));
  const i64 count = count_of(args);
  const Grouping groups = grouping_of(args.tensor("assignment"), x.size(0), count);
  const std::vector<float> total = groups.sums(data_of(sizes)), weights = groups.weights(data_of(sizes), total.data());
  const Tensor merged = empty_rows(count, x.size(1), x.scalar_type());
  sum_groups(groups, weights.data(), rows, merged);
  return {merged, tensor_of(total)};
}

std::tuple<Tensor, Tensor> merge_tokens_backward(const Arguments& args) {
  const Tensor& x = args.tensor("x");
  const i64 tokens = x.size(0), channels = x.size(1), count = count_of(args);
  const Tensor sizes = floats_of("sizes", args.optional_tensor("sizes"), tokens);
  const Grouping groups = grouping_of(args.tensor("assignment"), tokens, count);
  const Tensor total = floats_of("merged_sizes", args.tensor("merged_sizes"), count);
  const OptionalTensor flow = args.optional_tensor("grad_merged");
  const Tensor flow_of_sizes = floats_of("grad_merged_sizes", args.optional_tensor("grad_merged_sizes"), count);
  const std::vector<float> weights = groups.weights(data_of(sizes), data_of(total));
  Tensor keep;
  TokenRows y;
  if (flow.has_value()) {
    check_sizes("grad_merged", *flow, {count, channels});
    y = rows_of("grad_merged", *flow, keep);
    TORCH_CHECK_TYPE(flow->scalar_type() == x.scalar_type(), "grad_merged must have x's dtype");
  }
  Tensor grad_x = no_gradient(x), grad_sizes = no_gradient(x);
  if (args.flag("need_x")) {
    grad_x = empty_rows(tokens, channels, x.scalar_type());
    if (flow.has_value()) {
      spread_groups(groups.rows(channels, weights.data()), y, grad_x);
    } else {
      grad_x.zero_();
    }
  }
  if (args.flag("need_sizes") && sizes.defined()) {
    std::vector<float> found(tokens);
    if (flow.has_value()) {
      Tensor keep_x;
      const TokenRows rows = rows_of("x", x, keep_x);
      const MergeTokensKernels& k = merge_tokens_kernels();
      const TokenGroups g = groups.rows(channels, nullptr);
      for_rows(tokens, channels, [&](i64 first, i64 last) { k.group_dots(g, rows, y, found.data(), first, last); });
      std::vector<float> mean(count);
      for (i64 i = 0; i < tokens; ++i) {
        mean[groups.of(i)] += weights[i] * found[i];
      }
      for (i64 i = 0; i < tokens; ++i) {
        found[i] = (found[i] - mean[groups.of(i)]) / data_of(total)[groups.of(i)];
      }
    }
    for (i64 i = 0; flow_of_sizes.defined() && i < tokens; ++i) {
      found[i] += data_of(flow_of_sizes)[groups.of(i)];
    }
    grad_sizes = tensor_of(found);
  }
  return {grad_x, grad_sizes};
}

Tensor unmerge_tokens(const Arguments& args) {
  const Tensor &x = args.tensor("x"), &assignment = args.tensor("assignment");
  Tensor keep;
  const TokenRows y = rows_of("x", x, keep);
  const std::vector<std::int32_t> group = groups_from(assignment, assignment.numel(), x.size(0));
  const Tensor tokens = empty_rows(assignment.numel(), x.size(1), x.scalar_type());
  spread_groups({x.size(1), group.data(), nullptr, nullptr, nullptr}, y, tokens);
  return tokens;
}

Tensor unmerge_tokens_backward(const Arguments& args) {
  const Tensor &x = args.tensor("x"), &assignment = args.tensor("assignment");
  const Tensor flow = args.tensor("grad_tokens");
  check_sizes("grad_tokens", flow, {assignment.numel(), x.size(1)});
  TORCH_CHECK_TYPE(flow.scalar_type() == x.scalar_type(), "grad_tokens must have x's dtype");
  Tensor keep;
  const TokenRows rows = rows_of("grad_tokens", flow, keep);
  const Grouping groups = grouping_of(assignment, assignment.numel(), x.size(0));
  const Tensor grad = empty_rows(x.size(0), x.size(1), x.scalar_type());
  sum_groups(groups, nullptr, rows, grad);
  return grad;
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("merge_tokens_cpu", by_name<merge_tokens>());
  m.impl("merge_tokens_backward_cpu", by_name<merge_tokens_backward>());
  m.impl("unmerge_tokens_cpu", by_name<unmerge_tokens>());
  m.impl("unmerge_tokens_backward_cpu", by_name<unmerge_tokens_backward>());
}

} // namespace mmkernels
