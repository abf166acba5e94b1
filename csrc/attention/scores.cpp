// attention_received and attention_weights on the CPU: cuts the work for the threads. The public functions have checked
// the arguments.
#include <ATen/ops/zeros.h>

#include "launch.h"

namespace mmkernels {
namespace {

constexpr i64 kFewQueries = 8;

// What both ops begin with. Both compute each row's log-sum-exp in a first pass over the keys, but for few queries.
class ScoresLaunch : public AttentionLaunch {
public:
  explicit ScoresLaunch(const Arguments& args) : AttentionLaunch(args) {
    set_mask(args);
    set_bias(args.optional_tensor("bias"));
    p.value_dim = 0;
  }

  int threads() const {
    return threads_for(4.0 * pairs() * p.dim);
  }

  // Writes p.weights, which has zeros, row by row: no log-sum-exp, and lanes are channels, not queries.
  void write_few_rows() {
    const i64 heads = key_head_count(), rows = rows_of_key_head();
    const int threads = this->threads();
    // Rows that are computed together share their keys; tasks for all threads.
    const i64 together =
        std::clamp<i64>(threads == 1 ? rows : heads * rows / (4 * threads), 1, std::min<i64>(rows, k.decode_rows));
    const i64 blocks = (rows + together - 1) / together;
    parallel_tasks(heads * blocks, threads, k.decode_scratch(p), [&](i64 i, char* scratch) {
      const i64 first = i % blocks * together;
      k.few_weights(p, i / blocks, first, std::min(together, rows - first), scratch);
    });
  }

  void compute_lse() {
    plan_panels();
    lse_ = at::empty({p.batch, p.heads, p.q_len}, at::kFloat);
    p.lse = lse_.mutable_data_ptr<float>();
    const i64 panels = panels_of_key_head();
    parallel_tasks(key_head_count() * panels, threads(), k.scores_scratch(p),
                   [&](i64 i, char* scratch) { k.scores_lse(p, i / panels, i % panels, scratch); });
  }

private:
  Tensor lse_;
};

Tensor attention_received(const Arguments& args) {
  ScoresLaunch launch(args);
  AttentionParams& p = launch.p;
  const Tensor result = at::zeros({p.batch, p.heads, p.k_len}, at::kFloat);
  if (result.numel() == 0 || p.q_len == 0) {
    return result;
  }
  const OptionalTensor query_weights = args.optional_tensor("query_weights");
  Tensor wide_weights;
  if (query_weights.has_value()) {
    check_sizes("query_weights", *query_weights, {p.batch, p.heads, p.q_len}, true);
    wide_weights = query_weights->to(at::kFloat).unsqueeze(3);
    p.query_weights = view_of(wide_weights);
  }
  if (p.q_len <= kFewQueries) { // one query's column sums are its weights
    const Tensor rows = p.q_len == 1 ? result : at::zeros({p.batch, p.heads, p.q_len, p.k_len}, at::kFloat);
    p.weights = rows.mutable_data_ptr<float>();
    launch.write_few_rows();
    return p.q_len == 1 ? result : rows.sum(2);
  }
  p.received = result.mutable_data_ptr<float>();
  launch.compute_lse();
  const AttentionKernels& k = launch.k;
  const int threads = launch.threads();
  const i64 heads = p.batch * p.heads, of_key_head = heads / launch.key_head_count();
  p.splits = std::clamp<i64>((4 * threads + heads - 1) / heads, 1, std::max<i64>(1, p.k_len / 192));
  parallel_tasks(heads * p.splits, threads, k.scores_scratch(p), [&](i64 i, char* scratch) {
    const i64 head = i / p.splits;
    k.received(p, head / of_key_head, head % of_key_head, i % p.splits, scratch);
  });
  return result;
}

Tensor attention_weights(const Arguments& args) {
  ScoresLaunch launch(args);
  AttentionParams& p = launch.p;
  const Tensor result = at::zeros({p.batch, p.heads, p.q_len, p.k_len}, at::kFloat);
  if (result.numel() == 0) {
    return result;
  }
  p.weights = result.mutable_data_ptr<float>();
  if (p.q_len <= kFewQueries) {
    launch.write_few_rows();
    return result;
  }
  launch.compute_lse();
  const AttentionKernels& k = launch.k;
  const i64 panels = launch.panels_of_key_head();
  parallel_tasks(launch.key_head_count() * panels, launch.threads(), k.scores_scratch(p),
                 [&](i64 i, char* scratch) { k.weights(p, i / panels, i % panels, scratch); });
  return result;
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("attention_received_cpu", by_name<attention_received>());
  m.impl("attention_weights_cpu", by_name<attention_weights>());
}

} // namespace mmkernels
