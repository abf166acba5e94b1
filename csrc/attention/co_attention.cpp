// co_attention's forward pass on the CPU: cuts the work for the threads. The public function has checked the arguments.
#include <ATen/EmptyTensor.h>

#include <limits>
#include <vector>

#include "co_attention_launch.h"

namespace mmkernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The largest norm of a side's tokens; NaN where one is not finite.
float largest_norm(const CoAttentionLaunch& launch, const View& side, i64 length, int threads) {
  const CoAttentionParams& p = launch.p;
  const i64 share = std::max<i64>(64, (length + threads - 1) / threads), parts = (length + share - 1) / share;
  std::vector<float> norms(launch.units() * parts);
  parallel_tasks(launch.units() * parts, threads, 0, [&](i64 i, char*) {
    const i64 bh = i / parts, begin = i % parts * share;
    norms[i] = launch.k.largest_norm(side, p.dim, bh / p.heads, bh % p.heads, begin, std::min(length, begin + share));
  });
  float top = 0.0f;
  for (const float norm : norms) {
    top = norm > top || norm != norm ? norm : top;
    if (norm != norm) {
      break;
    }
  }
  return std::sqrt(top);
}

// How far apart finite elements of the bias are. Reads each element that it has in memory once.
float range_of(const CoAttentionLaunch& launch, int threads) {
  const CoAttentionParams& p = launch.p;
  const View& x = p.bias;
  if (x.data == nullptr) {
    return 0.0f;
  }
  const auto own = [](i64 size, i64 stride) { return stride == 0 ? 1 : size; };
  const i64 heads = own(p.heads, x.h), units = own(p.batch, x.b) * heads;
  i64 rows = own(p.q_len, x.l), columns = own(p.k_len, x.d), row_stride = x.l, stride = x.d;
  if (columns == 1 || (rows != 1 && stride != 1 && row_stride == 1)) { // neighbours in memory are read together
    std::swap(rows, columns);
    std::swap(row_stride, stride);
  }
  constexpr i64 kShare = 1 << 15; // elements of a task, about
  const i64 share = std::max<i64>(1, kShare / columns), row_parts = (rows + share - 1) / share;
  const i64 width = std::min(columns, kShare), parts = row_parts * ((columns + width - 1) / width);
  std::vector<std::pair<float, float>> ranges(units * parts, {kInfinity, -kInfinity});
  parallel_tasks(units * parts, threads, 0, [&](i64 i, char*) {
    const i64 unit = i / parts, first = i % parts % row_parts * share, c = i % parts / row_parts * width;
    for (i64 r = first; r < std::min(rows, first + share); ++r) {
      const i64 at = unit / heads * x.b + unit % heads * x.h + r * row_stride + c * stride;
      launch.k.widen_range(x, at, stride, std::min(width, columns - c), ranges[i].first, ranges[i].second);
    }
  });
  float low = kInfinity, high = -kInfinity;
  for (const auto& [least, most] : ranges) {
    low = std::min(low, least);
    high = std::max(high, most);
  }
  return high >= low ? high - low : 0.0f;
}

// The largest finite score of the call less `clamp`, or -inf where no score can be below that.
float find_floor(CoAttentionLaunch& launch, float clamp, int threads) {
  const CoAttentionParams& p = launch.p;
  const float norms = largest_norm(launch, p.query, p.q_len, threads) * largest_norm(launch, p.key, p.k_len, threads);
  if (2.0f * std::abs(p.scale) * norms * 1.0001f + range_of(launch, threads) <=
      clamp) { // 1.0001: rounding; NaN: unknown
    return -kInfinity;
  }
  std::vector<float> tops(launch.units() * p.slabs);
  parallel_tasks(launch.units() * p.slabs, threads, launch.k.forward_scratch(p),
                 [&](i64 i, char* scratch) { tops[i] = launch.k.largest_score(p, i / p.slabs, i % p.slabs, scratch); });
  return *std::max_element(tops.begin(), tops.end()) - clamp;
}

// How many panels share a tile of rows: as many as leave their running results in the second-level cache.
i64 panels_together(const CoAttentionLaunch& launch) {
  const CoAttentionParams& p = launch.p;
  const i64 bytes = (p.dim + p.value_dim + p.lane_value_dim) * launch.attention.panel * 4;
  return std::clamp<i64>((1 << 18) / std::max<i64>(1, bytes), 1, std::max<i64>(1, p.slab_panels));
}

// An output [B, H, length, dim], in memory [B, length, H, dim].
Tensor empty_output(const CoAttentionParams& p, i64 length, i64 dim, at::ScalarType type) {
  const i64 row = p.heads * dim;
  return expect_writes(
      at::detail::empty_strided_cpu({p.batch, p.heads, length, dim}, {length * row, dim, row, 1}, type));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> co_attention(const Arguments& args) {
  const Tensor &a = args.tensor("a"), &b = args.tensor("b");
  CoAttentionLaunch launch(args);
  CoAttentionParams& p = launch.p;
  const auto type = a.scalar_type();
  const Tensor out_a = empty_output(p, a.size(2), args.tensor("value_b").size(3), type);
  const Tensor out_b = empty_output(p, b.size(2), args.tensor("value_a").size(3), type);
  const Tensor lse_a = at::detail::empty_cpu({p.batch, p.heads, a.size(2)}, at::kFloat);
  const Tensor lse_b = at::detail::empty_cpu({p.batch, p.heads, b.size(2)}, at::kFloat);
  const Tensor floor = at::detail::empty_cpu({}, at::kFloat);
  *floor.mutable_data_ptr<float>() = -kInfinity;
  if (p.k_len == 0) {
    out_a.zero_(), out_b.zero_(), lse_a.fill_(-kInfinity), lse_b.fill_(-kInfinity);
  }
  if (launch.units() == 0 || p.k_len == 0) {
    return {out_a, out_b, lse_a, lse_b, floor};
  }
  launch.assign_sides(out_a, out_b, p.out, p.row_out);
  p.lse = (p.swapped ? lse_b : lse_a).mutable_data_ptr<float>();
  p.row_lse = (p.swapped ? lse_a : lse_b).mutable_data_ptr<float>();
  const int threads = threads_for(2.0 * launch.pairs() * (p.dim + p.value_dim + p.lane_value_dim));
  launch.plan_slabs(launch.units(), threads, launch.k.row_part(p));
  p.panels_together = panels_together(launch);
  p.tile_rows = launch.k.max_tile_rows;
  const double clamp = args.number("clamp");
  if (clamp > 0.0) {
    p.floor = find_floor(launch, static_cast<float>(clamp), threads);
  }
  *floor.mutable_data_ptr<float>() = p.floor;
  launch.plan_panels();
  parallel_tasks(launch.units() * p.slabs, threads, launch.k.forward_scratch(p),
                 [&](i64 i, char* scratch) { launch.k.forward(p, i / p.slabs, i % p.slabs, scratch); });
  launch.merge_slabs(threads, launch.k.forward_merge);
  return {out_a, out_b, lse_a, lse_b, floor};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("co_attention_cpu", by_name<co_attention>());
}

} // namespace mmkernels
