// One call of co_attention: its arguments as the plain data that the kernels take, and how the work is cut.
#pragma once

#include "co_attention_params.h"
#include "launch.h"

namespace mmkernels {

MMK_TABLES(CoAttentionKernels, co_attention_kernels)

// The tensors of the call outlive it.
class CoAttentionLaunch {
public:
  CoAttentionParams p{};
  // Once: another thread may choose another instruction set meanwhile.
  const AttentionKernels& attention = attention_kernels();
  const CoAttentionKernels& k = co_attention_kernels();

  explicit CoAttentionLaunch(const Arguments& args) {
    const Tensor &a = args.tensor("a"), &b = args.tensor("b");
    check_sizes("a", a, {-1, -1, -1, -1});
    check_sizes("b", b, {a.size(0), a.size(1), -1, a.size(3)});
    const Tensor &value_a = args.tensor("value_a"), &value_b = args.tensor("value_b");
    check_sizes("value_a", value_a, {a.size(0), a.size(1), a.size(2), -1});
    check_sizes("value_b", value_b, {a.size(0), a.size(1), b.size(2), -1});
    for (const auto& [name, x] :
         {std::pair<const char*, const Tensor&>("b", b), {"value_a", value_a}, {"value_b", value_b}}) {
      TORCH_CHECK_TYPE(x.scalar_type() == a.scalar_type(), name, " must have a's dtype");
    }
    p.batch = p.key_batch = a.size(0);
    p.heads = p.key_heads = a.size(1);
    p.dim = a.size(3);
    // Sums of the rows stay with a task for all lanes: the side that is shorter takes less memory.
    p.swapped = b.size(2) > a.size(2);
    p.q_len = std::max(a.size(2), b.size(2));
    p.k_len = std::min(a.size(2), b.size(2));
    assign_sides(a, b, p.query, p.key);
    assign_sides(value_a, value_b, p.lane_value, p.value);
    p.lane_value_dim = (p.swapped ? value_b : value_a).size(3);
    p.value_dim = (p.swapped ? value_a : value_b).size(3);
    set_mask(args);
    set_bias(args.optional_tensor("bias"));
    set_dropout(args);
    p.scale = static_cast<float>(args.number("scale"));
  }

  // Views of a pair of tensors of sides a and b as those of the lanes and the rows.
  void assign_sides(const Tensor& of_a, const Tensor& of_b, View& lanes, View& rows) const {
    (p.swapped ? rows : lanes) = view_of(of_a);
    (p.swapped ? lanes : rows) = view_of(of_b);
  }

  // A bias [B, H, La, Lb], or its gradient, along lanes and rows.
  View bias_view(const Tensor& bias) const {
    View v = view_of(bias, true);
    if (p.swapped) {
      std::swap(v.l, v.d);
    }
    return v;
  }

  // Prepares the dense mask for panels, once for both directions.
  void plan_panels() {
    if (p.dense != nullptr) {
      words_ = pack_dense_mask(p, attention);
    }
  }

  // Cuts the lanes of each of `tasks` tasks into slabs where there are too few tasks for the threads, and allocates the
  // slabs' row sums, of `part` floats each. These stay within 16 MiB or twice the size of the sides in float32.
  void plan_slabs(i64 tasks, int threads, i64 part, bool may_cut = true) {
    i64 wanted = 1;
    if (may_cut && threads > 1 && tasks % threads != 0 && tasks < 4 * threads) {
      const i64 sides = 4 * units() * (p.q_len + p.k_len) * (p.dim + p.value_dim + p.lane_value_dim);
      const i64 budget = std::max<i64>(1 << 24, 2 * sides);
      wanted = std::clamp<i64>((2 * threads + tasks - 1) / tasks, 1,
                               std::max<i64>(1, budget / std::max<i64>(1, 4 * units() * part)));
    }
    p.slab_panels = std::max<i64>(1, (panels() + wanted - 1) / wanted);
    p.slabs = (panels() + p.slab_panels - 1) / p.slab_panels;
    p.row_part = part;
    if (p.slabs > 1) {
      parts_ = at::empty({units() * p.slabs * part}, at::kFloat);
      p.row_parts = parts_.mutable_data_ptr<float>();
    }
  }

  // Calls merge(p, bh, begin, end) for parts of the rows of each (b, h).
  template <typename F> void merge_slabs(int threads, const F& merge) {
    if (p.slabs > 1) {
      const i64 share = std::max<i64>(16, (p.k_len + threads - 1) / threads), parts = (p.k_len + share - 1) / share;
      parallel_tasks(units() * parts, threads, 0, [&](i64 i, char*) {
        merge(p, i / parts, i % parts * share, std::min(p.k_len, (i % parts + 1) * share));
      });
    }
  }

  i64 panels() const {
    return (p.q_len + attention.panel - 1) / attention.panel;
  }
  i64 units() const {
    return p.batch * p.heads;
  }
  double pairs() const {
    return static_cast<double>(units()) * p.q_len * p.k_len;
  }

private:
  void set_mask(const Arguments& args) {
    const OptionalTensor start = args.optional_tensor("start"), end = args.optional_tensor("end"),
                         key_valid = args.optional_tensor("key_valid"), dense = args.optional_tensor("dense"),
                         valid_a = args.optional_tensor("valid_a"), valid_b = args.optional_tensor("valid_b");
    const i64 a_len = p.swapped ? p.k_len : p.q_len, b_len = p.swapped ? p.q_len : p.k_len;
    if (start.has_value() && end.has_value()) {
      check_sizes("start", *start, {p.batch, a_len}, true);
      check_sizes("end", *end, {p.batch, a_len}, true);
      (p.swapped ? p.row_start : p.start) = lines_of(*start, start->const_data_ptr<std::int32_t>());
      (p.swapped ? p.row_end : p.end) = lines_of(*end, end->const_data_ptr<std::int32_t>());
    }
    const auto set_valid = [&](const char* name, const OptionalTensor& valid, i64 length, Lines<std::uint8_t>& to) {
      if (valid.has_value()) {
        check_sizes(name, *valid, {valid->size(0) == 1 ? 1 : p.batch, length});
        to = lines_of(*valid, static_cast<const std::uint8_t*>(valid->const_data_ptr()));
      }
    };
    set_valid("key_valid", key_valid, b_len, p.swapped ? p.lane_pair_valid : p.key_valid);
    set_valid("valid_a", valid_a, a_len, p.swapped ? p.row_valid : p.lane_valid);
    set_valid("valid_b", valid_b, b_len, p.swapped ? p.lane_valid : p.row_valid);
    if (dense.has_value()) {
      check_sizes("dense", *dense, {p.batch, p.heads, a_len, b_len}, true);
      p.dense = static_cast<const std::uint8_t*>(dense->const_data_ptr());
      p.dense_b = shared_stride(*dense, 0), p.dense_h = shared_stride(*dense, 1);
      p.dense_i = shared_stride(*dense, p.swapped ? 3 : 2), p.dense_j = shared_stride(*dense, p.swapped ? 2 : 3);
    }
  }

  void set_bias(const OptionalTensor& bias) {
    if (bias.has_value()) {
      const i64 a_len = p.swapped ? p.k_len : p.q_len, b_len = p.swapped ? p.q_len : p.k_len;
      check_sizes("bias", *bias, {p.batch, p.heads, a_len, b_len}, true);
      p.bias = bias_view(*bias);
    }
  }

  // Takes seed and dropout_p.
  void set_dropout(const Arguments& args) {
    const OptionalTensor seed = args.optional_tensor("seed");
    if (seed.has_value()) {
      check_sizes("seed", *seed, {2});
      const i64 *seeds = seed->const_data_ptr<i64>(), apart = seed->stride(0);
      const auto of_lanes = static_cast<std::uint64_t>(seeds[p.swapped ? apart : 0]);
      const auto of_rows = static_cast<std::uint64_t>(seeds[p.swapped ? 0 : apart]);
      p.seed_low = static_cast<std::uint32_t>(of_lanes);
      p.seed_high = static_cast<std::uint32_t>(of_lanes >> 32);
      p.row_seed_low = static_cast<std::uint32_t>(of_rows);
      p.row_seed_high = static_cast<std::uint32_t>(of_rows >> 32);
      set_dropout_p(p, args.number("dropout_p"));
    }
  }

  Tensor words_, parts_;
};

} // namespace mmkernels
