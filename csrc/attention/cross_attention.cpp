// cross_attention's forward pass on the CPU: cuts the work for the threads. The public function has checked the
// arguments.
#include <ATen/EmptyTensor.h>
#include <limits>

#include "launch.h"

namespace mmkernels {
namespace {

constexpr i64 kDecodeQueries = 8;

void run_decode(AttentionLaunch& launch) {
  AttentionParams& p = launch.p;
  const AttentionKernels& k = launch.k;
  const i64 heads = launch.key_head_count(), rows = launch.rows_of_key_head();
  const i64 blocks = (rows + k.decode_rows - 1) / k.decode_rows;
  const int threads = threads_for(4.0 * heads * std::max<i64>(rows, 4) * p.k_len * p.dim);
  // Enough tasks for all threads, but no split shorter than 512 keys.
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

// Whether all panels see as many keys.
bool is_even(const AttentionParams& p) {
  bool even = p.dense == nullptr && p.panels == nullptr;
  even = even && (p.batch == 1 || (p.start.data == nullptr && p.end.data == nullptr && p.key_valid.data == nullptr));
  for (i64 b = 1; even && p.lists != nullptr && b < p.key_batch; ++b) {
    even = p.lists[b].count == p.lists[0].count;
  }
  return even;
}

// How many panels share a tile of keys: as many as leave their running results in the second-level cache, and tasks for
// all threads. Panels of one size are cut into rounds of equal tasks: of 8 panels, two threads take 4 each, and read
// the keys twice in all, not 8 times. Else there are so many tasks that a thread which took a long one gets fewer.
i64 panels_together(const AttentionLaunch& launch, int threads) {
  constexpr double kTile = 0.5; // what reading a tile costs, in panels that use it: measured with 256 channels
  const i64 panels = launch.panels_of_key_head(), heads = launch.key_head_count();
  const i64 bytes = (launch.p.dim + launch.p.value_dim) * launch.k.panel * 4;
  const auto tasks_of = [&](i64 together) { return (panels + together - 1) / together; };
  i64 best = std::max<i64>(1, std::min<i64>((1 << 18) / bytes, panels * heads / (8 * threads)));
  if (is_even(launch.p)) {
    double least = std::numeric_limits<double>::infinity();
    for (i64 together = 1; together <= std::min<i64>(panels, std::max<i64>(1, (1 << 20) / bytes)); ++together) {
      const i64 rounds = (heads * tasks_of(together) + threads - 1) / threads;
      const double cost = static_cast<double>(rounds) * (static_cast<double>(together) + kTile);
      best = cost < least ? together : best;
      least = std::min(cost, least);
    }
  }
  return (panels + tasks_of(best) - 1) / tasks_of(best); // tasks of equal size
}

void run_panels(AttentionLaunch& launch) {
  launch.plan_panels();
  const AttentionParams& p = launch.p;
  const AttentionKernels& k = launch.k;
  const int threads = threads_for(2.0 * launch.pairs() * (p.dim + p.value_dim));
  const i64 panels = launch.panels_of_key_head(), together = panels_together(launch, threads);
  const i64 tasks = (panels + together - 1) / together; // of one key head
  parallel_tasks(launch.key_head_count() * tasks, threads, k.forward_scratch(p, together), [&](i64 i, char* scratch) {
    const i64 first = i % tasks * together;
    k.forward(p, i / tasks, first, std::min(panels, first + together), scratch);
  });
}

std::tuple<Tensor, Tensor> cross_attention(const Arguments& args) {
  AttentionLaunch launch(args);
  AttentionParams& p = launch.p;
  launch.set_value(args);
  // Not through the dispatcher, whose time a small call would notice.
  const i64 row = p.heads * p.value_dim;
  const Tensor out = expect_writes(at::detail::empty_strided_cpu({p.batch, p.heads, p.q_len, p.value_dim},
                                                                 {p.q_len * row, p.value_dim, row, 1},
                                                                 args.tensor("query").scalar_type()));
  const Tensor lse = at::detail::empty_cpu({p.batch, p.heads, p.q_len}, at::kFloat);
  if (out.numel() == 0) {
    return {out, lse};
  }
  p.out = view_of(out);
  p.lse = lse.mutable_data_ptr<float>();
  launch.set_mask(args);
  launch.set_bias(args.optional_tensor("bias"));
  launch.set_gate(args.optional_tensor("gate"));
  launch.set_dropout(args);
  if (p.q_len <= kDecodeQueries && !p.dropout) {
    run_decode(launch);
  } else {
    run_panels(launch);
  }
  return {out, lse};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("cross_attention_cpu", by_name<cross_attention>());
}

} // namespace mmkernels
