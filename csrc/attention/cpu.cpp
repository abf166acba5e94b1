// The attention ops on the CPU: work to threads. Arguments were checked by the public functions.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

#include "call.h"

namespace mmkernels {
namespace {

constexpr i64 kDecodeQueries = 8;

void run_decode(Call& call) {
  Problem& p = call.p;
  const Kernels& k = call.k;
  const i64 heads = call.key_head_count(), rows = call.rows_of_key_head();
  const i64 blocks = (rows + k.decode_rows - 1) / k.decode_rows;
  const int threads = call.threads(4.0 * heads * std::max<i64>(rows, 4) * p.k_len * p.dim);
  // Enough pieces for all threads, but none shorter than 512 keys.
  const i64 tasks = heads * blocks;
  p.splits = std::clamp<i64>((2 * threads + tasks - 1) / tasks, 1, std::max<i64>(1, p.k_len / 512));
  if (threads == 1 || tasks >= 4 * threads) {
    p.splits = 1;
  }
  Tensor partial;
  if (p.splits > 1) {
    partial = at::empty({heads * p.splits * rows * (p.value_dim + 3)}, at::kFloat);
    p.partial = partial.mutable_data_ptr<float>();
  }
  parallel_tasks(tasks * p.splits, threads, k.decode_scratch(p), [&](i64 i, char* scratch) {
    k.decode(p, i / (blocks * p.splits), i / p.splits % blocks, i % p.splits, scratch);
  });
  if (p.splits > 1) {
    parallel_tasks(heads, threads, 0, [&](i64 kv, char*) { k.decode_merge(p, kv); });
  }
}

// Panels that share a tile of keys: as many as leave their running results in the second-level cache, and all threads
// something to do.
i64 panels_together(const Problem& p, const Kernels& k, i64 panels, i64 heads, int threads) {
  const i64 bytes = (p.dim + p.value_dim) * k.panel * 4;
  const i64 fit = std::max<i64>(1, (1 << 18) / bytes), share = std::max<i64>(1, panels * heads / (8 * threads));
  const i64 items = (panels + std::min(fit, share) - 1) / std::min(fit, share);
  return (panels + items - 1) / items; // even ones
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& start, const OptionalTensor& end,
                                   const OptionalTensor& key_valid, const OptionalTensor& dense,
                                   const OptionalTensor& bias, const OptionalTensor& gate, const OptionalTensor& seed,
                                   double scale, double dropout_p) {
  Call call(query, key, scale);
  Problem& p = call.p;
  call.set_value(value, key);
  const i64 row = p.heads * p.value_dim;
  // Not through the dispatcher: a small call notices.
  const Tensor out = at::detail::empty_strided_cpu({p.batch, p.heads, p.q_len, p.value_dim},
                                                   {p.q_len * row, p.value_dim, row, 1}, query.scalar_type());
  const Tensor lse = at::detail::empty_cpu({p.batch, p.heads, p.q_len}, at::kFloat);
  if (out.numel() == 0) {
    return {out, lse};
  }
  expect_writes(out.mutable_data_ptr(), static_cast<i64>(out.nbytes()));
  p.out = view_of(out);
  p.lse = lse.mutable_data_ptr<float>();
  call.set_mask(start, end, key_valid, dense);
  call.set_rest(bias, gate, seed, dropout_p);
  if (p.q_len <= kDecodeQueries && !p.dropout) {
    run_decode(call);
    return {out, lse};
  }
  call.plan_panels();
  const Kernels& k = call.k;
  const i64 heads = call.key_head_count(), panels = call.panels_of_key_head();
  const int threads = call.threads(2.0 * call.pairs() * (p.dim + p.value_dim));
  const i64 together = panels_together(p, k, panels, heads, threads), items = (panels + together - 1) / together;
  parallel_tasks(heads * items, threads, k.forward_scratch(p, together), [&](i64 i, char* scratch) {
    const i64 first = i % items * together;
    k.forward(p, i / items, first, std::min(panels, first + together), scratch);
  });
  return {out, lse};
}

// How a backward pass is cut. `heads`: key heads that one task takes one after the other, since they add to one bias.
struct Plan {
  i64 splits = 1, row_splits = 1;
  std::vector<std::vector<i64>> heads;
};

// Key heads that share a slice of the bias whose gradient is wanted belong to one task. Where that leaves too few tasks
// for the threads, keys are split, or queries: whichever leaves the smaller partial sums, of dQ or of dK and dV, as far
// as these stay within the size of what the pass reads and writes, or 16 MiB.
Plan plan_backward(const Call& call, bool bias_grad, bool query_grad, int threads) {
  const Problem& p = call.p;
  Plan plan;
  const bool one_batch = bias_grad && p.bias.b == 0, one_head = bias_grad && p.bias.h == 0;
  const i64 batch = one_batch ? 1 : p.key_batch, heads = one_head ? 1 : p.key_heads, count = batch * heads;
  plan.heads.resize(count);
  for (i64 kv = 0; kv < p.key_batch * p.key_heads; ++kv) {
    const i64 b = one_batch ? 0 : kv / p.key_heads, h = one_head ? 0 : kv % p.key_heads;
    plan.heads[b * heads + h].push_back(kv);
  }
  const i64 wanted = (4 * threads + count - 1) / count;
  if (threads == 1 || wanted == 1) {
    return plan;
  }
  const i64 of_query = query_grad ? 4 * p.batch * p.heads * p.q_len * p.dim : 0;
  const i64 of_keys = 4 * p.key_batch * p.key_heads * p.k_len * (p.dim + p.value_dim);
  const i64 budget = std::max<i64>(1 << 24, 2 * (of_query + of_keys));
  const i64 by_keys = std::min(wanted, std::max<i64>(1, p.k_len / 192));
  const i64 by_rows = std::min(wanted, call.panels_of_key_head());
  if (!bias_grad && (of_keys < of_query || by_keys == 1)) {
    plan.row_splits = std::min(by_rows, std::max<i64>(1, budget / of_keys));
  } else {
    plan.splits = of_query == 0 ? by_keys : std::min(by_keys, std::max<i64>(1, budget / of_query));
  }
  return plan;
}

// A gradient like x; 0 where the kernels write nothing: for keys that nobody may see.
Tensor grad_like(const Tensor& x, bool wanted, bool partly_written) {
  if (!wanted) {
    return Tensor();
  }
  Tensor grad = at::empty_like(x);
  expect_writes(grad.mutable_data_ptr(), static_cast<i64>(grad.nbytes()));
  return partly_written ? grad.zero_() : grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
         const Tensor& value, const OptionalTensor& start, const OptionalTensor& end, const OptionalTensor& key_valid,
         const OptionalTensor& dense, const OptionalTensor& bias, const OptionalTensor& gate,
         const OptionalTensor& seed, const Tensor& out, const Tensor& lse, double scale, double dropout_p,
         std::array<bool, 5> needs) {
  Call call(query, key, scale);
  Problem& p = call.p;
  call.set_value(value, key);
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>("out", out), {"grad_out", grad_out}}) {
    check_sizes(name, x, {p.batch, p.heads, p.q_len, p.value_dim});
    TORCH_CHECK_TYPE(x.scalar_type() == query.scalar_type(), name, " must have query's dtype");
  }
  check_sizes("lse", lse, {p.batch, p.heads, p.q_len});
  TORCH_CHECK_VALUE(out.stride(3) == 1 || p.value_dim == 1, "out must be as the forward pass made it");
  const bool empty = out.numel() == 0 || p.k_len == 0;
  call.set_mask(start, end, key_valid, dense);
  call.set_rest(bias, gate, seed, dropout_p);
  const bool bias_grad = needs[3] && bias.has_value(), gate_grad = needs[4] && gate.has_value();
  const bool partly = empty || p.lists != nullptr;
  const Tensor grad_query = grad_like(query, needs[0], empty), grad_key = grad_like(key, needs[1], partly),
               grad_value = grad_like(value, needs[2], partly);
  Tensor grad_bias = grad_like(bias.has_value() ? *bias : query, bias_grad, true);
  Tensor grad_gate = gate_grad ? at::zeros_like(*gate) : Tensor();
  const auto answer = [&] {
    const auto given = [&](const Tensor& x) { return x.defined() ? x : at::empty({0}, grad_out.options()); };
    return std::make_tuple(given(grad_query), given(grad_key), given(grad_value), given(grad_bias), given(grad_gate));
  };
  if (empty) {
    return answer();
  }
  p.out = view_of(out);
  const Tensor row_lse = lse.contiguous();
  p.lse = const_cast<float*>(row_lse.const_data_ptr<float>());
  p.grad_out = view_of(grad_out);
  if (grad_lse.has_value()) {
    check_sizes("grad_lse", *grad_lse, lse.sizes());
  }
  const Tensor lse_grad = grad_lse.has_value() ? grad_lse->to(at::kFloat).contiguous() : Tensor();
  p.grad_lse = lse_grad.defined() ? lse_grad.const_data_ptr<float>() : nullptr;
  for (const auto& [tensor, view] : {std::pair<const Tensor&, View&>(grad_query, p.grad_query),
                                     std::pair<const Tensor&, View&>(grad_key, p.grad_key),
                                     std::pair<const Tensor&, View&>(grad_value, p.grad_value)}) {
    if (tensor.defined()) {
      view = view_of(tensor);
    }
  }
  call.plan_panels();

  const Kernels& k = call.k;
  const double products = 5.0 * call.pairs() * (p.dim + p.value_dim);
  const int threads = call.threads(products);
  const Plan plan = plan_backward(call, bias_grad, needs[0], threads);
  p.splits = plan.splits;
  p.row_splits = plan.row_splits;
  Tensor bias_sums, gate_rows, parts, key_parts, value_parts;
  if (p.row_splits > 1) {
    const auto split = [&](const Tensor& grad, View& view, i64& apart) {
      if (!grad.defined()) {
        return Tensor();
      }
      std::vector<i64> shape = grad.sizes().vec();
      shape.insert(shape.begin(), p.row_splits);
      const Tensor sums = at::zeros(shape, grad.options().dtype(at::kFloat));
      view = view_of(sums.select(0, 0));
      apart = sums.stride(0);
      return sums;
    };
    key_parts = split(grad_key, p.grad_key, p.key_part);
    value_parts = split(grad_value, p.grad_value, p.value_part);
  }
  if (bias_grad) { // float32 sums; one for each split where splits share it
    const bool shared = bias->size(3) == 1 && p.splits > 1;
    if (shared || grad_bias.scalar_type() != at::kFloat) {
      std::vector<i64> shape = bias->sizes().vec();
      shape.insert(shape.begin(), shared ? p.splits : 1);
      bias_sums = at::empty(shape, bias->options().dtype(at::kFloat));
      expect_writes(bias_sums.mutable_data_ptr(), static_cast<i64>(bias_sums.nbytes()));
      bias_sums.zero_();
    }
    p.grad_bias = bias_of(bias_sums.defined() ? bias_sums.select(0, 0) : grad_bias);
    p.grad_bias_split = shared ? bias_sums.stride(0) : 0;
  }
  if (gate_grad) {
    gate_rows = at::zeros({p.splits, p.batch, p.heads, p.q_len}, query.options().dtype(at::kFloat));
    p.gate_rows = gate_rows.mutable_data_ptr<float>();
  }
  if (needs[0] && p.splits > 1) {
    parts = at::empty({p.splits, p.batch, p.heads, p.q_len, p.dim}, query.options().dtype(at::kFloat));
    p.query_parts = parts.mutable_data_ptr<float>();
  }
  const i64 pieces = p.splits * p.row_splits;
  parallel_tasks(static_cast<i64>(plan.heads.size()) * pieces, threads, k.backward_scratch(p),
                 [&](i64 i, char* scratch) {
                   for (const i64 kv : plan.heads[i / pieces]) {
                     k.backward(p, kv, i / p.splits % p.row_splits, i % p.splits, scratch);
                   }
                 });
  for (const auto& [grad, sums] : {std::pair<const Tensor&, const Tensor&>(grad_key, key_parts),
                                   std::pair<const Tensor&, const Tensor&>(grad_value, value_parts)}) {
    if (sums.defined()) {
      grad.copy_(sums.sum(0));
    }
  }
  if (parts.defined()) {
    const i64 rows = p.batch * p.heads * p.q_len, share = (rows + 4 * threads - 1) / (4 * threads);
    parallel_tasks((rows + share - 1) / share, threads, 0,
                   [&](i64 i, char*) { k.backward_merge(p, i * share, std::min(rows, (i + 1) * share)); });
  }
  if (bias_sums.defined()) {
    grad_bias.copy_(bias_sums.size(0) == 1 ? bias_sums.select(0, 0) : bias_sums.sum(0));
  }
  if (gate_grad) {
    const Tensor of_head = gate_rows.sum(at::IntArrayRef{0, 1, 3}) * (1 - call.factor * call.factor);
    grad_gate.copy_(gate->numel() == 1 ? of_head.sum().expand(gate->sizes()) : of_head);
  }
  return answer();
}

// Log-sum-exp of all rows, which both passes over probabilities need first.
Tensor log_sum_exp(Call& call, const Tensor& query, const Kernels& k, i64 panels, int threads) {
  Problem& p = call.p;
  const Tensor lse = at::empty({p.batch, p.heads, p.q_len}, query.options().dtype(at::kFloat));
  p.lse = lse.mutable_data_ptr<float>();
  parallel_tasks(call.key_head_count() * panels, threads, k.scores_scratch(p),
                 [&](i64 i, char* scratch) { k.scores_lse(p, i / panels, i % panels, scratch); });
  return lse;
}

Tensor received(const Tensor& query, const Tensor& key, const OptionalTensor& start, const OptionalTensor& end,
                const OptionalTensor& key_valid, const OptionalTensor& dense, const OptionalTensor& bias,
                const OptionalTensor& query_weights, double scale) {
  Call call(query, key, scale);
  Problem& p = call.p;
  const Tensor result = at::zeros({p.batch, p.heads, p.k_len}, query.options().dtype(at::kFloat));
  if (result.numel() == 0 || p.q_len == 0) {
    return result;
  }
  call.set_mask(start, end, key_valid, dense);
  call.set_rest(bias, {}, {}, 0.0);
  call.plan_panels();
  p.received = result.mutable_data_ptr<float>();
  Tensor counts;
  if (query_weights.has_value()) {
    check_sizes("query_weights", *query_weights, {p.batch, p.heads, p.q_len}, true);
    counts = query_weights->to(at::kFloat).unsqueeze(3);
    p.query_weights = view_of(counts);
  }
  const Kernels& k = call.k;
  const i64 panels = call.panels_of_key_head(), heads = p.batch * p.heads;
  const int threads = call.threads(4.0 * call.pairs() * p.dim);
  const Tensor lse = log_sum_exp(call, query, k, panels, threads);
  p.splits = std::clamp<i64>((4 * threads + heads - 1) / heads, 1, std::max<i64>(1, p.k_len / 192));
  const i64 of_key_head = heads / call.key_head_count();
  parallel_tasks(heads * p.splits, threads, k.scores_scratch(p), [&](i64 i, char* scratch) {
    const i64 head = i / p.splits;
    k.received(p, head / of_key_head, head % of_key_head, i % p.splits, scratch);
  });
  return result;
}

Tensor weights(const Tensor& query, const Tensor& key, const OptionalTensor& start, const OptionalTensor& end,
               const OptionalTensor& key_valid, const OptionalTensor& dense, const OptionalTensor& bias, double scale) {
  Call call(query, key, scale);
  Problem& p = call.p;
  const Tensor result = at::zeros({p.batch, p.heads, p.q_len, p.k_len}, query.options().dtype(at::kFloat));
  if (result.numel() == 0) {
    return result;
  }
  call.set_mask(start, end, key_valid, dense);
  call.set_rest(bias, {}, {}, 0.0);
  call.plan_panels();
  p.weights = result.mutable_data_ptr<float>();
  const Kernels& k = call.k;
  const i64 panels = call.panels_of_key_head();
  const int threads = call.threads(4.0 * call.pairs() * p.dim);
  const Tensor lse = log_sum_exp(call, query, k, panels, threads);
  parallel_tasks(call.key_head_count() * panels, threads, k.scores_scratch(p),
                 [&](i64 i, char* scratch) { k.weights(p, i / panels, i % panels, scratch); });
  return result;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  const std::string mask = "Tensor? start, Tensor? end, Tensor? key_valid, Tensor? dense, Tensor? bias, ",
                    inputs = "Tensor query, Tensor key, Tensor value, " + mask + "Tensor? gate, Tensor? seed, ",
                    scores = "Tensor query, Tensor key, " + mask;
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("cross_attention_cpu(" + inputs + "float scale, float dropout_p) -> (Tensor, Tensor)");
  define("cross_attention_backward_cpu(Tensor grad_out, Tensor? grad_lse, " + inputs +
         "Tensor out, Tensor lse, float scale, float dropout_p, bool[5] needs) -> "
         "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  define("attention_received_cpu(" + scores + "Tensor? query_weights, float scale) -> Tensor");
  define("attention_weights_cpu(" + scores + "float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("cross_attention_cpu", forward);
  m.impl("cross_attention_backward_cpu", backward);
  m.impl("attention_received_cpu", received);
  m.impl("attention_weights_cpu", weights);
}

} // namespace mmkernels
