// The attention ops on the CPU: tensors to plain data, work to threads. Arguments were checked by the public functions.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "../common/isa.h"
#include "../common/parallel.h"
#include "problem.h"

namespace mmkernels {

#if defined(__x86_64__)
extern const Kernels kernels_avx512_bf16, kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_plain;

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using i64 = std::int64_t;

// The instruction sets that this machine can run, widest first.
const std::vector<const Kernels*>& offered() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> all;
#if defined(__x86_64__)
    const std::string isa = detect_isa();
    for (const Kernels* k : {&kernels_avx512_bf16, &kernels_avx512, &kernels_avx2}) {
      if (!all.empty() || isa == k->name) {
        all.push_back(k);
      }
    }
#endif
    all.push_back(&kernels_plain);
    return all;
  }();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  return k != nullptr ? *k : *offered().front();
}

// Sets the instruction set ("": the widest; "?": as it is), and answers the names of all that can be set, the one in use
// first.
std::string cpu_isa(const std::string& name) {
  const auto& all = offered();
  const bool asks = name == "?";
  const auto found = std::find_if(all.begin(), all.end(), [&](const Kernels* k) { return k->name == name; });
  TORCH_CHECK_VALUE(asks || name.empty() || found != all.end(), "the CPU's instruction set must be one that it has, got ", name);
  if (!asks) {
    chosen.store(name.empty() ? nullptr : *found);
  }
  std::string names = kernels().name;
  for (const Kernels* k : all) {
    if (k != &kernels()) {
      names += std::string(" ") + k->name;
    }
  }
  return names;
}

// FLOP a second of all threads together that only multiply and add in registers.
double cpu_peak(bool bf16) {
  const Kernels& k = kernels();
  const int threads = available_threads();
  std::vector<double> rates(threads);
  parallel_tasks(threads, threads, 0, [&](i64 i, char*) { rates[i] = k.peak(bf16); });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
  case at::kFloat:
    return Type::f32;
  case at::kBFloat16:
    return Type::bf16;
  case at::kHalf:
    return Type::f16;
  default:
    TORCH_CHECK_TYPE(false, "the cpu backend takes float32, bfloat16 and float16, got ", x.scalar_type());
  }
}

// A 4-D tensor; a dim of size 1 gets stride 0.
View view_of(const Tensor& x) {
  const auto stride = [&](int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
  View v;
  v.data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  v.type = type_of(x);
  v.b = stride(0);
  v.h = stride(1);
  v.l = stride(2);
  v.d = x.size(3) == 1 ? 1 : x.stride(3);
  return v;
}
View bias_of(const Tensor& x) {
  View v = view_of(x);
  v.d = x.size(3) == 1 ? 0 : x.stride(3);
  return v;
}

// The public functions have checked everything and said it better; this keeps a call of torch.ops from reading past an
// end. Sizes of -1 may be anything, those of `loose` dims also 1.
void check_sizes(const char* name, const Tensor& x, at::IntArrayRef sizes, bool loose = false) {
  bool fits = x.device().is_cpu() && x.dim() == static_cast<i64>(sizes.size());
  for (i64 dim = 0; fits && dim < x.dim(); ++dim) {
    fits = sizes[dim] < 0 || x.size(dim) == sizes[dim] || (loose && x.size(dim) == 1);
  }
  TORCH_CHECK_VALUE(fits, name, " must be on the CPU and of shape ", sizes, loose ? " or 1 in any dim" : "", ", got ",
                    x.sizes());
}

// A problem and what its pointers point to.
struct Call {
  Problem p{};
  std::vector<std::vector<std::int32_t>> index;
  std::vector<KeyList> lists;
  std::vector<PanelRange> panels;
  Tensor factor, words;

  Call(const Tensor& query, const Tensor& key, double scale) {
    check_sizes("query", query, {-1, -1, -1, -1});
    check_sizes("key", key, {-1, -1, -1, query.size(3)});
    TORCH_CHECK_VALUE((key.size(0) == 1 || key.size(0) == query.size(0)) && key.size(1) > 0 && query.size(3) > 0 &&
                          query.size(1) % key.size(1) == 0 && key.scalar_type() == query.scalar_type(),
                      "key must fit query ", query.sizes(), ", got ", key.sizes());
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.q_len = query.size(2);
    p.dim = query.size(3);
    p.key_batch = p.batch == 0 ? 0 : key.size(0);
    p.key_heads = key.size(1);
    p.k_len = key.size(2);
    p.scale = static_cast<float>(scale);
    p.query = view_of(query);
    p.key = view_of(key);
  }

  void set_value(const Tensor& value, const Tensor& key) {
    check_sizes("value", value, {key.size(0), key.size(1), key.size(2), -1});
    TORCH_CHECK_TYPE(value.scalar_type() == key.scalar_type(), "value must have key's dtype");
    p.value = view_of(value);
    p.value_dim = value.size(3);
  }

  void set_mask(const OptionalTensor& start, const OptionalTensor& end, const OptionalTensor& key_valid,
                const OptionalTensor& dense) {
    if (start.has_value() && end.has_value()) {
      check_sizes("start", *start, {p.batch, p.q_len}, true);
      check_sizes("end", *end, {p.batch, p.q_len}, true);
      const auto stride = [](const Tensor& x, int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
      p.start = start->const_data_ptr<std::int32_t>();
      p.end = end->const_data_ptr<std::int32_t>();
      p.start_b = stride(*start, 0), p.start_i = stride(*start, 1);
      p.end_b = stride(*end, 0), p.end_i = stride(*end, 1);
    }
    if (key_valid.has_value()) {
      check_sizes("key_valid", *key_valid, {key_valid->size(0) == 1 ? 1 : p.batch, p.k_len});
      list_keys(*key_valid);
    }
    if (dense.has_value()) {
      check_sizes("dense", *dense, {p.batch, p.heads, p.q_len, p.k_len}, true);
      if (dense->size(1) == 1 && dense->size(2) == 1 && !key_valid.has_value()) {
        list_keys(dense->select(2, 0).select(1, 0).expand({dense->size(0), p.k_len}));
      } else {
        const auto stride = [&](int dim) { return dense->size(dim) == 1 ? 0 : dense->stride(dim); };
        p.dense = dense->const_data_ptr<bool>();
        p.dense_b = stride(0), p.dense_h = stride(1), p.dense_i = stride(2), p.dense_j = stride(3);
      }
    }
  }

  // The valid keys of each batch entry of the keys; of a shared one, those valid for anybody.
  void list_keys(const Tensor& valid) {
    const bool* data = valid.const_data_ptr<bool>();
    const i64 b_stride = valid.size(0) == 1 ? 0 : valid.stride(0), j_stride = valid.stride(1);
    const i64 users = p.key_batch < p.batch && valid.size(0) > 1 ? p.batch : 1;
    index.resize(p.key_batch);
    for (i64 b = 0; b < p.key_batch; ++b) {
      if (b > 0 && b_stride == 0) {
        lists.push_back(lists[0]);
        continue;
      }
      for (i64 j = 0; j < p.k_len; ++j) {
        bool any = false;
        for (i64 u = b; u < b + users; ++u) {
          any |= data[u * b_stride + j * j_stride];
        }
        if (any) {
          index[b].push_back(static_cast<std::int32_t>(j));
        }
      }
      const i64 count = static_cast<i64>(index[b].size());
      lists.push_back({count == p.k_len ? nullptr : index[b].data(), count});
    }
    p.lists = lists.data();
    if (users > 1) {
      p.key_valid = data;
      p.valid_b = b_stride, p.valid_j = j_stride;
    }
  }

  // What the mask means to panels of queries: which queries to take together, and the dense mask as bits, once for all
  // heads and passes over it.
  void plan_panels() {
    const Kernels& k = kernels();
    if (p.dense == nullptr) {
      if (p.start_i != 0 || p.end_i != 0) {
        std::vector<std::vector<PanelRange>> found(p.batch, std::vector<PanelRange>(p.q_len));
        for (i64 b = 0; b < p.batch; ++b) {
          found[b].resize(k.plan_panels(p, b, found[b].data()));
          p.panel_count = std::max<i64>(p.panel_count, static_cast<i64>(found[b].size()));
        }
        for (std::vector<PanelRange>& of_batch : found) {
          of_batch.resize(p.panel_count, {static_cast<std::int32_t>(p.q_len), 0});
          panels.insert(panels.end(), of_batch.begin(), of_batch.end());
        }
        p.panels = panels.data();
      }
      return;
    }
    const i64 batch = p.dense_b == 0 ? 1 : p.batch, heads = p.dense_h == 0 ? 1 : p.heads;
    const i64 count = p.dense_i == 0 ? 1 : (p.q_len + k.panel - 1) / k.panel;
    words = at::empty({batch * heads * count * p.k_len * k.word_bytes}, at::kByte);
    p.words = static_cast<char*>(words.mutable_data_ptr());
    p.words_panel = count == 1 ? 0 : p.k_len;
    p.words_h = heads == 1 ? 0 : count * p.k_len;
    p.words_b = batch == 1 ? 0 : heads * count * p.k_len;
    const int threads = batch * heads * p.q_len * p.k_len < (1 << 16) ? 1 : available_threads();
    parallel_tasks(batch * heads * count, threads, 0,
                   [&](i64 i, char*) { k.mask_words(p, i / (heads * count), i / count % heads, i % count); });
  }

  void set_rest(const OptionalTensor& bias, const OptionalTensor& gate, const OptionalTensor& seed, double dropout_p) {
    if (bias.has_value()) {
      check_sizes("bias", *bias, {p.batch, p.heads, p.q_len, p.k_len}, true);
      p.bias = bias_of(*bias);
    }
    if (gate.has_value()) {
      TORCH_CHECK_VALUE(gate->numel() == 1 || gate->numel() == p.heads, "gate must have 1 or ", p.heads, " elements");
      factor = gate->to(at::kFloat).tanh().expand({p.heads}).contiguous();
      p.factor = factor.const_data_ptr<float>();
    }
    if (seed.has_value()) {
      check_sizes("seed", *seed, {1});
      const auto value = static_cast<std::uint64_t>(*seed->const_data_ptr<i64>());
      p.dropout = true;
      p.seed_low = static_cast<std::uint32_t>(value);
      p.seed_high = static_cast<std::uint32_t>(value >> 32);
      p.threshold = static_cast<std::uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
      p.keep_scale = dropout_p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - dropout_p));
    }
  }

  i64 key_head_count() const {
    return p.key_batch * p.key_heads;
  }
  // Query rows that look at one key head.
  i64 rows_of_key_head() const {
    return (p.key_batch == p.batch ? 1 : p.batch) * (p.heads / p.key_heads) * p.q_len;
  }
  i64 panels_of_key_head(const Kernels& k) const {
    const i64 of_head = p.panels != nullptr ? p.panel_count : (p.q_len + k.panel - 1) / k.panel;
    return rows_of_key_head() / std::max<i64>(1, p.q_len) * of_head;
  }
  double pairs() const {
    return static_cast<double>(p.batch) * p.heads * p.q_len * p.k_len;
  }
  // Threads worth starting: one costs some microseconds, in which a core does about a million operations.
  int threads(double operations) const {
    return operations < 4e5 ? 1 : available_threads();
  }
};

constexpr i64 kDecodeQueries = 8;

void run_decode(Call& call) {
  Problem& p = call.p;
  const Kernels& k = kernels();
  const i64 heads = call.key_head_count(), rows = call.rows_of_key_head();
  const int threads = call.threads(4.0 * heads * std::max<i64>(rows, 4) * p.k_len * p.dim);
  // Enough pieces for all threads, but none shorter than 512 keys.
  p.splits = std::clamp<i64>((2 * threads + heads - 1) / heads, 1, std::max<i64>(1, p.k_len / 512));
  if (threads == 1 || heads >= 4 * threads) {
    p.splits = 1;
  }
  Tensor partial;
  if (p.splits > 1) {
    partial = at::empty({heads * p.splits * rows * (p.value_dim + 3)}, at::kFloat);
    p.partial = partial.mutable_data_ptr<float>();
  }
  parallel_tasks(heads * p.splits, threads, k.decode_scratch(p),
                 [&](i64 i, char* scratch) { k.decode(p, i / p.splits, i % p.splits, scratch); });
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
  const Kernels& k = kernels();
  const i64 heads = call.key_head_count(), panels = call.panels_of_key_head(k);
  const int threads = call.threads(2.0 * call.pairs() * (p.dim + p.value_dim));
  const i64 together = panels_together(p, k, panels, heads, threads), items = (panels + together - 1) / together;
  parallel_tasks(heads * items, threads, k.forward_scratch(p, together), [&](i64 i, char* scratch) {
    const i64 first = i % items * together;
    k.forward(p, i / items, first, std::min(panels, first + together), scratch);
  });
  return {out, lse};
}

// What one split of a backward pass works on. `heads`: key heads one after the other, where they add to one bias.
struct Clusters {
  i64 count, splits;
  std::vector<std::vector<i64>> heads;
};

// Key heads that share a slice of the bias whose gradient is wanted belong to one thread. Where that leaves too few
// pieces for the threads, keys are split, as far as the partial dQ that each split writes stay within the size of the
// keys' and values' own gradients, or 16 MiB.
Clusters plan_backward(const Call& call, bool bias_grad, bool query_grad, int threads) {
  const Problem& p = call.p;
  Clusters plan;
  const bool one_batch = bias_grad && p.bias.b == 0, one_head = bias_grad && p.bias.h == 0;
  const i64 batch = one_batch ? 1 : p.key_batch, heads = one_head ? 1 : p.key_heads;
  plan.heads.resize(batch * heads);
  for (i64 kv = 0; kv < p.key_batch * p.key_heads; ++kv) {
    const i64 b = one_batch ? 0 : kv / p.key_heads, h = one_head ? 0 : kv % p.key_heads;
    plan.heads[b * heads + h].push_back(kv);
  }
  plan.count = batch * heads;
  plan.splits = 1;
  const i64 wanted = 4 * threads;
  if (threads > 1 && plan.count < wanted) {
    const i64 part = 4 * p.batch * p.heads * p.q_len * p.dim;
    const i64 budget = std::max<i64>(1 << 24, 4 * p.key_batch * p.key_heads * p.k_len * (p.dim + p.value_dim));
    plan.splits = std::min((wanted + plan.count - 1) / plan.count, std::max<i64>(1, p.k_len / 192));
    if (query_grad) {
      plan.splits = std::min(plan.splits, std::max<i64>(1, budget / part));
    }
  }
  return plan;
}

// A gradient like x; 0 where the kernels write nothing: for keys that nobody may see.
Tensor grad_like(const Tensor& x, bool wanted, bool partly_written) {
  if (!wanted) {
    return at::empty({0}, x.options());
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
  Tensor grad_gate = gate_grad ? at::zeros_like(*gate) : at::empty({0}, query.options());
  const auto answer = [&] { return std::make_tuple(grad_query, grad_key, grad_value, grad_bias, grad_gate); };
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
    if (tensor.numel() > 0) {
      view = view_of(tensor);
    }
  }
  call.plan_panels();

  const Kernels& k = kernels();
  const double products = 5.0 * call.pairs() * (p.dim + p.value_dim);
  const int threads = call.threads(products);
  const Clusters plan = plan_backward(call, bias_grad, needs[0], threads);
  p.splits = plan.splits;
  Tensor bias_sums, gate_rows, parts;
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
  parallel_tasks(plan.count * p.splits, threads, k.backward_scratch(p), [&](i64 i, char* scratch) {
    for (const i64 kv : plan.heads[i / p.splits]) {
      k.backward(p, kv, i % p.splits, scratch);
    }
  });
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
  const Kernels& k = kernels();
  const i64 panels = call.panels_of_key_head(k), heads = p.batch * p.heads;
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
  const Kernels& k = kernels();
  const i64 panels = call.panels_of_key_head(k);
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
  m.def("cpu_isa(str name) -> str", cpu_isa);
  m.def("cpu_peak(bool bf16) -> float", cpu_peak);
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
