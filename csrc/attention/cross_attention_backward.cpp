// cross_attention's backward pass on the CPU: cuts the work for the threads and sums what they share. The public
// function has checked the arguments.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "launch.h"

namespace mmkernels {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// A float32 tensor [count, shape of x], not filled.
Tensor stacked_like(const Tensor& x, i64 count) {
  std::vector<i64> shape = x.sizes().vec();
  shape.insert(shape.begin(), count);
  return at::empty(shape, x.options().dtype(at::kFloat));
}

// A gradient like x, undefined where it is not needed; with `zeroed` filled with 0.
Tensor grad_like(const Tensor& x, bool need, bool zeroed) {
  if (!need) {
    return Tensor();
  }
  const Tensor grad = expect_writes(at::empty_like(x));
  return zeroed ? grad.zero_() : grad;
}

class Backward {
public:
  explicit Backward(const Arguments& args)
      : launch_(args), p_(launch_.p), grad_out_(args.tensor("grad_out")), query_(args.tensor("query")),
        bias_(args.optional_tensor("bias")), gate_(args.optional_tensor("gate")) {
    launch_.set_value(args);
    const Tensor &out = args.tensor("out"), &lse = args.tensor("lse");
    for (const auto& [name, x] : {std::pair<const char*, const Tensor&>("out", out), {"grad_out", grad_out_}}) {
      check_sizes(name, x, {p_.batch, p_.heads, p_.q_len, p_.value_dim});
      TORCH_CHECK_TYPE(x.scalar_type() == query_.scalar_type(), name, " must have query's dtype");
    }
    check_sizes("lse", lse, {p_.batch, p_.heads, p_.q_len});
    TORCH_CHECK_VALUE(out.stride(3) == 1 || p_.value_dim == 1, "out must be as the forward pass made it");
    launch_.set_mask(args);
    launch_.set_bias(bias_);
    launch_.set_gate(gate_);
    launch_.set_dropout(args);
    p_.out = view_of(out);
    p_.grad_out = view_of(grad_out_);
    lse_ = lse.contiguous();
    p_.lse = const_cast<float*>(lse_.const_data_ptr<float>());
    const OptionalTensor grad_lse = args.optional_tensor("grad_lse");
    if (grad_lse.has_value()) {
      check_sizes("grad_lse", *grad_lse, lse.sizes());
      grad_lse_ = grad_lse->to(at::kFloat).contiguous();
      p_.grad_lse = grad_lse_.const_data_ptr<float>();
    }
    allocate_gradients(args);
  }

  Gradients run() {
    if (!is_empty()) {
      launch_.plan_panels();
      threads_ = threads_for(5.0 * launch_.pairs() * (p_.dim + p_.value_dim));
      plan_splits();
      allocate_sums();
      const AttentionKernels& k = launch_.k;
      const i64 splits = p_.splits * p_.row_splits, tasks = static_cast<i64>(key_heads_of_task_.size()) * splits;
      parallel_tasks(tasks, threads_, k.backward_scratch(p_), [&](i64 i, char* scratch) {
        for (const i64 kv : key_heads_of_task_[i / splits]) {
          k.backward(p_, kv, i / p_.splits % p_.row_splits, i % p_.splits, scratch);
        }
      });
      reduce_sums();
    }
    const auto or_empty = [&](const Tensor& x) { return x.defined() ? x : at::empty({0}, grad_out_.options()); };
    return {or_empty(grad_query_), or_empty(grad_key_), or_empty(grad_value_), or_empty(grad_bias_),
            or_empty(grad_gate_)};
  }

private:
  bool is_empty() const {
    return grad_out_.numel() == 0 || p_.k_len == 0;
  }

  void allocate_gradients(const Arguments& args) {
    const bool partly = is_empty() || p_.lists != nullptr; // kernels write no gradient of a key that is not valid
    grad_query_ = grad_like(query_, args.flag("need_query"), is_empty());
    grad_key_ = grad_like(args.tensor("key"), args.flag("need_key"), partly);
    grad_value_ = grad_like(args.tensor("value"), args.flag("need_value"), partly);
    if (args.flag("need_bias") && bias_.has_value()) {
      grad_bias_ = grad_like(*bias_, true, true);
    }
    if (args.flag("need_gate") && gate_.has_value()) {
      grad_gate_ = at::zeros_like(*gate_);
    }
    for (const auto& [tensor, view] : {std::pair<const Tensor&, View&>(grad_query_, p_.grad_query),
                                       {grad_key_, p_.grad_key},
                                       {grad_value_, p_.grad_value}}) {
      if (tensor.defined()) {
        view = view_of(tensor);
      }
    }
  }

  // Key heads that share a slice of the bias, whose gradient is needed, belong to one task. Where that leaves too few
  // tasks for the threads, keys or queries are split: whichever needs the smaller partial sums, of dQ or of dK and dV.
  // These stay within 16 MiB or the size of what the pass reads and writes.
  void plan_splits() {
    const bool one_batch = grad_bias_.defined() && p_.bias.b == 0, one_head = grad_bias_.defined() && p_.bias.h == 0;
    const i64 batch = one_batch ? 1 : p_.key_batch, heads = one_head ? 1 : p_.key_heads, count = batch * heads;
    key_heads_of_task_.resize(count);
    for (i64 kv = 0; kv < launch_.key_head_count(); ++kv) {
      const i64 b = one_batch ? 0 : kv / p_.key_heads, h = one_head ? 0 : kv % p_.key_heads;
      key_heads_of_task_[b * heads + h].push_back(kv);
    }
    const i64 wanted = (4 * threads_ + count - 1) / count;
    if (threads_ == 1 || wanted == 1) {
      return;
    }
    const i64 query_bytes = grad_query_.defined() ? 4 * p_.batch * p_.heads * p_.q_len * p_.dim : 0;
    const i64 key_bytes = 4 * p_.key_batch * p_.key_heads * p_.k_len * (p_.dim + p_.value_dim);
    const i64 budget = std::max<i64>(1 << 24, 2 * (query_bytes + key_bytes));
    const i64 by_keys = std::min(wanted, std::max<i64>(1, p_.k_len / 192));
    const i64 by_rows = std::min(wanted, launch_.panels_of_key_head());
    if (!grad_bias_.defined() && (key_bytes < query_bytes || by_keys == 1)) {
      p_.row_splits = std::min(by_rows, std::max<i64>(1, budget / key_bytes));
    } else {
      p_.splits = query_bytes == 0 ? by_keys : std::min(by_keys, std::max<i64>(1, budget / query_bytes));
    }
  }

  // Memory that splits add to, apart from each other.
  void allocate_sums() {
    if (p_.row_splits > 1) {
      key_sums_ = sums_of_row_splits(grad_key_, p_.grad_key, p_.key_part);
      value_sums_ = sums_of_row_splits(grad_value_, p_.grad_value, p_.value_part);
    }
    if (grad_bias_.defined()) {
      const bool by_split = bias_->size(3) == 1 && p_.splits > 1; // splits of the keys add to the same elements
      if (by_split || grad_bias_.scalar_type() != at::kFloat) {
        bias_sums_ = expect_writes(stacked_like(*bias_, by_split ? p_.splits : 1)).zero_();
      }
      p_.grad_bias = view_of(bias_sums_.defined() ? bias_sums_.select(0, 0) : grad_bias_, true);
      p_.grad_bias_split = by_split ? bias_sums_.stride(0) : 0;
    }
    if (grad_gate_.defined()) {
      gate_sums_ = at::zeros({p_.splits, p_.batch, p_.heads, p_.q_len}, at::kFloat);
      p_.gate_rows = gate_sums_.mutable_data_ptr<float>();
    }
    if (grad_query_.defined() && p_.splits > 1) {
      query_sums_ = at::empty({p_.splits, p_.batch, p_.heads, p_.q_len, p_.dim}, at::kFloat);
      p_.query_parts = query_sums_.mutable_data_ptr<float>();
    }
  }

  Tensor sums_of_row_splits(const Tensor& grad, View& view, i64& part) {
    if (!grad.defined()) {
      return Tensor();
    }
    const Tensor sums = stacked_like(grad, p_.row_splits).zero_();
    view = view_of(sums.select(0, 0));
    part = sums.stride(0);
    return sums;
  }

  void reduce_sums() {
    for (const auto& [grad, sums] :
         {std::pair<Tensor&, Tensor&>(grad_key_, key_sums_), {grad_value_, value_sums_}, {grad_bias_, bias_sums_}}) {
      if (sums.defined()) {
        grad.copy_(sums.size(0) == 1 ? sums.select(0, 0) : sums.sum(0));
      }
    }
    if (query_sums_.defined()) {
      const i64 rows = p_.batch * p_.heads * p_.q_len, share = (rows + 4 * threads_ - 1) / (4 * threads_);
      parallel_tasks((rows + share - 1) / share, threads_, 0,
                     [&](i64 i, char*) { launch_.k.backward_merge(p_, i * share, std::min(rows, (i + 1) * share)); });
    }
    if (grad_gate_.defined()) { // the derivative of tanh is 1 - tanh^2
      const Tensor& tanh_gate = launch_.tanh_gate();
      const Tensor of_head = gate_sums_.sum(at::IntArrayRef{0, 1, 3}) * (1 - tanh_gate * tanh_gate);
      grad_gate_.copy_(gate_->numel() == 1 ? of_head.sum().expand(gate_->sizes()) : of_head);
    }
  }

  AttentionLaunch launch_;
  AttentionParams& p_;
  const Tensor &grad_out_, &query_;
  const OptionalTensor bias_, gate_;
  Tensor lse_, grad_lse_;
  Tensor grad_query_, grad_key_, grad_value_, grad_bias_, grad_gate_; // undefined where not needed
  Tensor query_sums_, key_sums_, value_sums_, bias_sums_, gate_sums_; // undefined where gradients are written directly
  int threads_ = 1;
  // The key heads that each task takes one after the other, since they add to one slice of the bias's gradient.
  std::vector<std::vector<i64>> key_heads_of_task_;
};

Gradients cross_attention_backward(const Arguments& args) {
  return Backward(args).run();
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("cross_attention_backward_cpu", by_name<cross_attention_backward>());
}

} // namespace mmkernels
