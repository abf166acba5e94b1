// select_tokens on the CPU. The public function has checked the arguments.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>

#include <limits>
#include <numeric>

#include "../common/arguments.h"
#include "nearest_params.h"
#include "ranking.h"
#include "rows_launch.h"

namespace mmkernels {

MMK_TABLES(NearestKernels, nearest_kernels)

namespace {

using Numbers = std::vector<std::int32_t>;

// The record's sizes, and what is kept.
struct Selection {
  std::vector<i64> lengths;
  i64 tokens, kept;
  Numbers index;           // [kept], ascending
  std::vector<i64> counts; // of each image
};

template <typename Score> std::vector<decltype(key_of(Score()))> keys_of(const Tensor& scores) {
  std::vector<decltype(key_of(Score()))> keys(scores.numel());
  const Score* data = scores.const_data_ptr<Score>();
  for (i64 i = 0; i < scores.numel(); ++i) {
    keys[i] = key_of(data[i]);
  }
  return keys;
}

template <typename Key> void choose(Selection& s, const std::vector<Key>& keys, bool per_image) {
  if (!per_image) {
    choose_largest(keys.data(), s.tokens, s.kept, 0, s.index.data());
    i64 at = 0, first = 0;
    for (std::size_t image = 0; image < s.lengths.size(); ++image) {
      const i64 last = first + s.lengths[image], before = at;
      while (at < s.kept && s.index[at] < last) {
        ++at;
      }
      s.counts[image] = at - before;
      first = last;
    }
    return;
  }
  std::vector<i64> from(s.lengths.size()), to(s.lengths.size());
  std::exclusive_scan(s.lengths.begin(), s.lengths.end(), from.begin(), i64{0});
  std::exclusive_scan(s.counts.begin(), s.counts.end(), to.begin(), i64{0});
  const int threads = threads_for(20.0 * static_cast<double>(s.tokens));
  parallel_tasks(static_cast<i64>(s.lengths.size()), threads, 0, [&](i64 image, char*) {
    choose_largest(keys.data() + from[image], s.lengths[image], s.counts[image], from[image],
                   s.index.data() + to[image]);
  });
}

Selection select(const Arguments& args) {
  const Tensor &x = args.tensor("x"), &scores = args.tensor("scores");
  Selection s;
  s.lengths = args.sizes("lengths");
  s.counts = args.sizes("keep");
  const bool per_image = args.text("over") == "image";
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be [tokens, C], got ", x.sizes());
  s.tokens = x.size(0);
  s.kept = std::accumulate(s.counts.begin(), s.counts.end(), i64{0});
  TORCH_CHECK_VALUE(s.tokens <= std::numeric_limits<std::int32_t>::max(), "x must have fewer than 2^31 tokens, got ",
                    s.tokens);
  check_sizes("scores", scores, {s.tokens});
  bool fits = std::accumulate(s.lengths.begin(), s.lengths.end(), i64{0}) == s.tokens;
  fits = fits && s.counts.size() == (per_image ? s.lengths.size() : 1) && s.kept <= s.tokens;
  for (std::size_t image = 0; fits && per_image && image < s.lengths.size(); ++image) {
    fits = s.counts[image] >= 0 && s.counts[image] <= s.lengths[image];
  }
  TORCH_CHECK_VALUE(fits, "lengths and keep must match x's ", s.tokens, " tokens, got ", s.lengths, " and ", s.counts);
  s.counts.resize(s.lengths.size());
  s.index.resize(s.kept);
  if (scores.scalar_type() == at::kDouble) {
    choose(s, keys_of<double>(scores.contiguous()), per_image);
  } else {
    choose(s, keys_of<float>(scores.to(at::kFloat).contiguous()), per_image);
  }
  return s;
}

TokenMatrix matrix_of(const Tensor& x) {
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(0) * x.element_size(), x.size(1), type_of(x)};
}

// Writes to each token which row of the result it is merged into: -1 where its image keeps none.
void place_tokens(const Selection& s, const Tensor& metric, std::int32_t* place) {
  const NearestKernels& k = nearest_kernels();
  const TokenMatrix x = matrix_of(metric);
  std::fill(place, place + s.tokens, -1);
  for (i64 n = 0; n < s.kept; ++n) {
    place[s.index[n]] = static_cast<std::int32_t>(n);
  }
  const i64 scratch = k.scratch(x), most = s.counts.empty() ? 0 : *std::max_element(s.counts.begin(), s.counts.end());
  const Workspace memory(std::max<i64>(k.panels_bytes(x, most), 1));
  Numbers rest;
  i64 first = 0, kept_first = 0;
  for (std::size_t image = 0; image < s.lengths.size(); ++image) {
    const i64 last = first + s.lengths[image], kept_count = s.counts[image];
    rest.clear();
    for (i64 token = first; token < last && kept_count > 0; ++token) {
      if (place[token] < 0) {
        rest.push_back(static_cast<std::int32_t>(token));
      }
    }
    if (!rest.empty()) {
      const i64 panels = (kept_count + k.panel - 1) / k.panel, count = static_cast<i64>(rest.size());
      float* norms = reinterpret_cast<float*>(memory.data());
      const KeptTokens kept{s.index.data() + kept_first, kept_count, static_cast<std::int32_t>(kept_first),
                            norms + panels * k.panel, norms};
      const int threads = threads_for(2.0 * static_cast<double>(count) * kept_count * x.channels);
      parallel_tasks(panels, threads, scratch, [&](i64 panel, char* own) { k.pack(x, kept, panel, own); });
      parallel_tasks((count + k.rows - 1) / k.rows, threads, scratch, [&](i64 task, char* own) {
        const i64 begin = task * k.rows;
        k.nearest(x, kept, rest.data() + begin, std::min(k.rows, count - begin), place, own);
      });
    }
    first = last;
    kept_first += kept_count;
  }
}

// Lists the tokens of each row in ascending order: `starts` [kept + 1], `order`.
void list_members(const std::int32_t* place, i64 tokens, i64 kept, Numbers& starts, Numbers& order) {
  starts.assign(kept + 2, 0);
  for (i64 token = 0; token < tokens; ++token) {
    if (place[token] >= 0) {
      ++starts[place[token] + 2];
    }
  }
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  order.resize(starts[kept + 1]);
  for (i64 token = 0; token < tokens; ++token) {
    if (place[token] >= 0) {
      order[starts[place[token] + 1]++] = static_cast<std::int32_t>(token);
    }
  }
}

// See `weights_of` in Python.
void weigh(const Selection& s, const std::string& merge, const Tensor& scores, const std::int32_t* place,
           const Numbers& starts, float* weights) {
  const Tensor wide = scores.to(at::kFloat).contiguous();
  const float* score = wide.const_data_ptr<float>();
  for (i64 token = 0; token < s.tokens; ++token) {
    const std::int32_t row = place[token];
    if (row < 0) {
      weights[token] = 0.0f;
      continue;
    }
    const bool is_kept = s.index[row] == token;
    const i64 members = starts[row + 1] - starts[row];
    if (merge == "mean") {
      weights[token] = 1.0f / static_cast<float>(members);
    } else if (merge == "visionzip") {
      weights[token] = is_kept ? 1.0f : 1.0f / static_cast<float>(members - 1);
    } else {
      weights[token] = is_kept ? 1.0f : score[token];
    }
  }
}

// x's tokens merged; fills in `place` and `weights`.
void merge_rest(const Arguments& args, const Selection& s, const Tensor& x, const Tensor& y, const Tensor& place,
                const Tensor& weights) {
  const OptionalTensor given = args.optional_tensor("metric");
  const Tensor metric = with_dense_channels(given.has_value() ? *given : x);
  check_sizes("metric", metric, {s.tokens, -1});
  std::int32_t* to = place.mutable_data_ptr<std::int32_t>();
  place_tokens(s, metric, to);
  Numbers starts, order;
  list_members(to, s.tokens, s.kept, starts, order);
  float* weight = weights.mutable_data_ptr<float>();
  weigh(s, args.text("merge"), args.tensor("scores"), to, starts, weight);
  const NearestKernels& k = nearest_kernels();
  const TokenMatrix from = matrix_of(x);
  const TokenSums sums{order.data(), starts.data(), weight};
  char* out = static_cast<char*>(expect_writes(y).mutable_data_ptr());
  constexpr i64 kStep = 16;
  const int threads = threads_for_bytes(static_cast<double>(x.nbytes()));
  parallel_tasks((s.kept + kStep - 1) / kStep, threads, 0,
                 [&](i64 task, char*) { k.sum(from, sums, out, task * kStep, std::min(s.kept, (task + 1) * kStep)); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select_tokens(const Arguments& args) {
  const Selection s = select(args);
  const Tensor x = with_dense_channels(args.tensor("x"));
  const bool merges = !args.text("merge").empty();
  const Tensor y = at::detail::empty_cpu({s.kept, x.size(1)}, x.scalar_type());
  const Tensor index = at::detail::empty_cpu({s.kept}, at::kLong);
  const i64 images = args.text("over") == "batch" ? static_cast<i64>(s.counts.size()) : 0;
  const Tensor counts = at::detail::empty_cpu({images}, at::kLong);
  const Tensor place = at::detail::empty_cpu({merges ? s.tokens : 0}, at::kInt);
  const Tensor weights = at::detail::empty_cpu({merges ? s.tokens : 0}, at::kFloat);
  std::copy(s.index.begin(), s.index.end(), index.mutable_data_ptr<i64>());
  std::copy_n(s.counts.begin(), images, counts.mutable_data_ptr<i64>());
  if (merges) {
    merge_rest(args, s, x, y, place, weights);
    return {y, index, counts, place, weights};
  }
  ComposeParams p{};
  p.picked = rows_of(x);
  p.source = s.index.data();
  compose(p, y);
  return {y, index, counts, place, weights};
}

Tensor select_tokens_backward(const Arguments& args) {
  const Tensor &x = args.tensor("x"), &place = args.tensor("place");
  const Tensor grad = with_dense_channels(args.tensor("grad_y")), index = args.tensor("positions").contiguous();
  const i64 tokens = x.size(0), kept = index.numel();
  check_sizes("grad_y", grad, {kept, x.size(1)});
  const Tensor out = at::detail::empty_cpu(x.sizes(), x.scalar_type());
  ComposeParams p{};
  p.picked = rows_of(grad);
  Numbers source;
  const Tensor weights = args.tensor("weight").contiguous(), places = place.contiguous();
  if (args.text("merge").empty()) {
    source.assign(tokens, -1);
    for (i64 n = 0; n < kept; ++n) {
      source[index.const_data_ptr<i64>()[n]] = static_cast<std::int32_t>(n);
    }
    p.source = source.data();
  } else {
    check_sizes("place", place, {tokens});
    p.source = places.const_data_ptr<std::int32_t>();
    p.weights = weights.const_data_ptr<float>();
  }
  compose(p, out);
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("select_tokens_cpu", by_name<select_tokens>());
  m.impl("select_tokens_backward_cpu", by_name<select_tokens_backward>());
}

} // namespace mmkernels
