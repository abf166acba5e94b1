// co_attention's backward pass on the CPU: cuts the work for the threads and sums what they share. The public function
// has checked the arguments.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "co_attention_launch.h"

namespace mmkernels {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

class CoBackward {
public:
  explicit CoBackward(const Arguments& args) : launch_(args), p_(launch_.p) {
    const Tensor &a = args.tensor("a"), &b = args.tensor("b"), &value_a = args.tensor("value_a"),
                 &value_b = args.tensor("value_b"), &out_a = args.tensor("out_a"), &out_b = args.tensor("out_b"),
                 &grad_out_a = args.tensor("grad_out_a"), &grad_out_b = args.tensor("grad_out_b");
    const auto check = [&](const char* name, const Tensor& x, const Tensor& tokens, const Tensor& values) {
      check_sizes(name, x, {a.size(0), a.size(1), tokens.size(2), values.size(3)});
      TORCH_CHECK_TYPE(x.scalar_type() == a.scalar_type(), name, " must have a's dtype");
    };
    check("out_a", out_a, a, value_b), check("grad_out_a", grad_out_a, a, value_b);
    check("out_b", out_b, b, value_a), check("grad_out_b", grad_out_b, b, value_a);
    for (const Tensor& out : {out_a, out_b}) {
      TORCH_CHECK_VALUE(out.stride(3) == 1 || out.size(3) == 1, "out must be as the forward pass made it");
    }
    launch_.assign_sides(out_a, out_b, p_.out, p_.row_out);
    launch_.assign_sides(grad_out_a, grad_out_b, p_.grad_out, p_.row_grad_out);
    check_sizes("lse_a", args.tensor("lse_a"), {a.size(0), a.size(1), a.size(2)});
    check_sizes("lse_b", args.tensor("lse_b"), {a.size(0), a.size(1), b.size(2)});
    lse_a_ = args.tensor("lse_a").to(at::kFloat).contiguous();
    lse_b_ = args.tensor("lse_b").to(at::kFloat).contiguous();
    p_.lse = const_cast<float*>((p_.swapped ? lse_b_ : lse_a_).const_data_ptr<float>());
    p_.row_lse = const_cast<float*>((p_.swapped ? lse_a_ : lse_b_).const_data_ptr<float>());
    p_.floor = args.tensor("floor").item<float>();
    allocate_gradients(args, a, b, value_a, value_b);
    options_ = a.options();
  }

  Gradients run() {
    if (!is_empty()) {
      plan();
      const CoAttentionKernels& k = launch_.k;
      const i64 tasks = static_cast<i64>(heads_of_task_.size()) * p_.slabs;
      parallel_tasks(tasks, threads_, k.backward_scratch(p_), [&](i64 i, char* scratch) {
        for (const i64 bh : heads_of_task_[i / p_.slabs]) {
          k.backward(p_, bh, i % p_.slabs, scratch);
        }
      });
      launch_.merge_slabs(threads_, k.backward_merge);
      if (bias_sums_.defined()) {
        grad_bias_.copy_(bias_sums_);
      }
    }
    // Each of its own: PyTorch refuses an op whose outputs share memory.
    const auto or_empty = [&](const Tensor& x) { return x.defined() ? x : at::empty({0}, options_); };
    return {or_empty(grad_a_), or_empty(grad_b_), or_empty(grad_value_a_), or_empty(grad_value_b_),
            or_empty(grad_bias_)};
  }

private:
  bool is_empty() const {
    return launch_.units() == 0 || p_.k_len == 0;
  }

  void allocate_gradients(const Arguments& args, const Tensor& a, const Tensor& b, const Tensor& value_a,
                          const Tensor& value_b) {
    const auto like = [&](const Tensor& x, const char* need) {
      if (!args.flag(need)) {
        return Tensor();
      }
      const Tensor grad = expect_writes(at::empty_like(x));
      return is_empty() ? grad.zero_() : grad;
    };
    grad_a_ = like(a, "need_a"), grad_b_ = like(b, "need_b");
    grad_value_a_ = like(value_a, "need_value_a"), grad_value_b_ = like(value_b, "need_value_b");
    const auto set = [&](const Tensor& grad, View& view) {
      if (grad.defined()) {
        view = view_of(grad);
      }
    };
    set(p_.swapped ? grad_b_ : grad_a_, p_.grad_query);
    set(p_.swapped ? grad_a_ : grad_b_, p_.grad_key);
    set(p_.swapped ? grad_value_b_ : grad_value_a_, p_.grad_lane_value);
    set(p_.swapped ? grad_value_a_ : grad_value_b_, p_.grad_value);
    const OptionalTensor bias = args.optional_tensor("bias");
    if (args.flag("need_bias") && bias.has_value()) {
      grad_bias_ = at::zeros_like(*bias);
      if (grad_bias_.scalar_type() != at::kFloat) {
        bias_sums_ = at::zeros_like(*bias, at::kFloat);
      }
      p_.grad_bias = launch_.bias_view(bias_sums_.defined() ? bias_sums_ : grad_bias_);
    }
  }

  // Half a tile where a whole one's rows would not leave a panel, with all that is made from it, in the second-level
  // cache.
  i64 tile_rows() const {
    const i64 dims = p_.dim + p_.value_dim + p_.lane_value_dim, most = launch_.k.max_tile_rows;
    const i64 of_panel = 3 * dims * launch_.attention.panel * 4, of_row = 2 * dims * 4;
    return of_panel + most * of_row <= (1 << 19) + (1 << 18) ? most : most / 2;
  }

  // The (b, h) that share a slice of the bias, whose gradient is needed, belong to one task, and their lanes are not
  // cut where lanes share it.
  void plan() {
    launch_.plan_panels();
    p_.tile_rows = tile_rows();
    threads_ = threads_for(4.0 * launch_.pairs() * (p_.dim + p_.value_dim + p_.lane_value_dim));
    const bool of_bias = grad_bias_.defined(), one_batch = of_bias && p_.grad_bias.b == 0,
               one_head = of_bias && p_.grad_bias.h == 0;
    const i64 batch = one_batch ? 1 : p_.batch, heads = one_head ? 1 : p_.heads;
    heads_of_task_.resize(batch * heads);
    for (i64 bh = 0; bh < launch_.units(); ++bh) {
      const i64 b = one_batch ? 0 : bh / p_.heads, h = one_head ? 0 : bh % p_.heads;
      heads_of_task_[b * heads + h].push_back(bh);
    }
    launch_.plan_slabs(batch * heads, threads_, launch_.k.backward_row_part(p_), !(of_bias && p_.grad_bias.l == 0));
  }

  CoAttentionLaunch launch_;
  CoAttentionParams& p_;
  Tensor lse_a_, lse_b_;
  at::TensorOptions options_;
  Tensor grad_a_, grad_b_, grad_value_a_, grad_value_b_, grad_bias_, bias_sums_; // undefined where not needed
  int threads_ = 1;
  std::vector<std::vector<i64>> heads_of_task_;
};

Gradients co_attention_backward(const Arguments& args) {
  return CoBackward(args).run();
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("co_attention_backward_cpu", by_name<co_attention_backward>());
}

} // namespace mmkernels
