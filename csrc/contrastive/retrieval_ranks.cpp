// retrieval_ranks on the CPU: queries are the kernels' images, the gallery is their texts. The public function has
// checked the arguments.
#include <ATen/EmptyTensor.h>

#include "launch.h"

namespace mmkernels {
namespace {

constexpr i64 kNan = -1; // a count where the right answer's score is NaN

// How many of the gallery's items stand before each query's right answer, int64 [n], or kNan. place_of: of each query,
// the right answer's place in the gallery.
template <typename Place> Tensor count_before(ContrastiveLaunch& launch, const Place& place_of) {
  const ContrastiveParams& p = launch.p;
  const ContrastiveKernels& k = launch.k;
  const i64 n = p.image.count, m = p.text.count;
  launch.choose_threads(1.0);
  // Each strip of queries is one task; where strips are few, the gallery is split too.
  const i64 lanes = k.strip_lanes(p), strips = (n + lanes - 1) / lanes;
  const i64 wanted = launch.threads == 1 ? 1 : (2 * launch.threads + strips - 1) / strips;
  const i64 each = std::max((m + wanted - 1) / wanted, std::min(m, kLongTask)), splits = (m + each - 1) / each;
  const i64 panels_bytes = k.panels_bytes(p);
  std::vector<std::int32_t> before(splits * n); // [splits, n]
  parallel_tasks(strips * splits, launch.threads, panels_bytes + k.gradient_scratch(p), [&](i64 task, char* memory) {
    const i64 split = task % splits, first = task / splits * lanes;
    float* panels = reinterpret_cast<float*>(memory);
    char* scratch = memory + panels_bytes;
    const Strip strip{first, std::min(lanes, n - first), panels, nullptr};
    std::vector<float> best = padded_array(strip.count);
    std::vector<std::int32_t> place(best.size()), counts(best.size());
    for (i64 i = 0; i < strip.count; ++i) {
      place[i] = place_of(strip.first + i);
    }
    for (i64 piece = 0; piece < k.pieces(p); ++piece) {
      k.pack(p, strip, piece, panels, nullptr, scratch);
    }
    const Ranks of_strip{best.data(), place.data(), counts.data()};
    k.target_scores(p, strip, of_strip, scratch);
    k.count_before(p, strip, {false, split * each, std::min(m, (split + 1) * each)}, of_strip, scratch);
    multiplied() += k.take_multiplied();
    for (i64 i = 0; i < strip.count; ++i) {
      before[split * n + first + i] = std::isnan(best[i]) ? kNan : counts[i];
    }
  });
  const Tensor counts = at::detail::empty_cpu({n}, at::kLong);
  i64* to = counts.mutable_data_ptr<i64>();
  for (i64 i = 0; i < n; ++i) {
    i64 count = 0;
    for (i64 split = 0; split < splits; ++split) {
      count += before[split * n + i];
    }
    to[i] = before[i] < 0 ? kNan : count;
  }
  return counts;
}

Tensor retrieval_ranks(const Arguments& args) {
  const Tensor &query = args.tensor("query"), &gallery = args.tensor("gallery"), &target = args.tensor("target");
  if (query.size(0) == 0) {
    return at::detail::empty_cpu({0}, at::kLong);
  }
  TORCH_CHECK_VALUE(query.dim() == 2, "query must be [N, d], got ", query.sizes());
  ContrastiveLaunch launch(query, gallery, "query", "gallery");
  const i64 n = launch.p.image.count, m = launch.p.text.count;
  check_sizes("target", target, {n});
  const Tensor targets = target.contiguous();
  const i64* target_of = targets.const_data_ptr<i64>();
  const Tensor ranks = count_before(launch, [&](i64 i) {
    const i64 item = target_of[i];
    TORCH_CHECK_VALUE(item >= 0 && item < m, "target must be from 0 to ", m - 1, ", got ", item);
    return static_cast<std::int32_t>(item);
  });
  i64* to = ranks.mutable_data_ptr<i64>();
  std::replace(to, to + n, kNan, m - 1);
  return ranks;
}

// A piece of the gallery, whose items' scores must not depend on how many there are.
Tensor retrieval_ranks_block(const Arguments& args) {
  const Tensor &query = args.tensor("query"), &right = args.tensor("right"), &index = args.tensor("right_index");
  TORCH_CHECK_VALUE(query.dim() == 2, "query must be [N, d], got ", query.sizes());
  ContrastiveLaunch launch(query, args.tensor("gallery"), "query", "gallery");
  const i64 n = launch.p.image.count, m = launch.p.text.count;
  launch.p.few_texts = false;
  launch.set_right(right);
  check_sizes("right_index", index, {n});
  const Tensor places = index.contiguous();
  const i64* place_of = places.const_data_ptr<i64>();
  return count_before(launch, [&](i64 i) { return static_cast<std::int32_t>(std::clamp<i64>(place_of[i], -1, m)); });
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("retrieval_ranks_cpu", by_name<retrieval_ranks>());
  m.impl("retrieval_ranks_block_cpu", by_name<retrieval_ranks_block>());
}

} // namespace mmkernels
