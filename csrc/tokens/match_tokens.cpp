// match_tokens on the CPU: all rounds of matching, over the means of the groups so far. The public function has checked
// the arguments.
#include <ATen/EmptyTensor.h>

#include <cmath>
#include <numeric>

#include "groups.h"

namespace mmkernels {
namespace {

constexpr float kWorst = -2.0f; // stands for a similarity that is NaN: below every cosine
constexpr i64 kPreparedRows = 256;

// The tokens of one image in one round. Those at even places may merge into those at odd places.
struct MatchImage {
  i64 first, length, merges; // first: among all tokens
  i64 even, odd;             // the first places of either kind that take part
  i64 from, into;            // how many there are
  i64 row = 0;               // the first of its prepared rows: those that may merge, then the others
};

// One round: the metric's rows in, each token's group out.
class Round {
public:
  Round(const MergeTokensKernels& k, const TokenRows& metric, i64 dim, const std::vector<i64>& lengths,
        const std::vector<i64>& kept, i64 protect)
      : k_(k), metric_(metric), dim_(dim), group_(std::accumulate(lengths.begin(), lengths.end(), i64{0})) {
    i64 first = 0;
    for (std::size_t image = 0; image < lengths.size(); ++image) {
      const i64 length = lengths[image], from = (length + 1) / 2 - (protect + 1) / 2, into = length / 2 - protect / 2;
      const i64 merges = length > kept[image] ? std::min(length - kept[image], from) : 0;
      TORCH_CHECK_VALUE(length == kept[image] || (length > kept[image] && from > 0 && into > 0),
                        "kept must be from protect + 1 to each image's length, or that length");
      images_.push_back(
          {first, length, merges, protect + protect % 2, protect + 1 - protect % 2, from, into, prepared_});
      prepared_ += merges > 0 ? from + into : 0;
      first += length;
    }
  }

  std::vector<std::int32_t> groups() {
    if (prepared_ > 0) {
      match();
    }
    i64 next = 0;
    for (const MatchImage& image : images_) {
      next = merge(image, next);
    }
    return std::move(group_);
  }
  std::vector<i64> lengths() const {
    std::vector<i64> left;
    for (const MatchImage& image : images_) {
      left.push_back(image.length - image.merges);
    }
    return left;
  }

private:
  struct Piece {
    const MatchImage* image;
    i64 first, count; // of the tokens that may merge; of prepared rows
  };

  std::vector<Piece> pieces(i64 step, bool both) const {
    std::vector<Piece> found;
    for (const MatchImage& image : images_) {
      const i64 count = image.merges == 0 ? 0 : image.from + (both ? image.into : 0);
      for (i64 first = 0; first < count; first += step) {
        found.push_back({&image, first, std::min(step, count - first)});
      }
    }
    return found;
  }

  void match() {
    const i64 stride = k_.prepared_bytes(metric_.type, dim_);
    const Workspace memory(prepared_ * (stride + 4));
    char* rows = memory.data();
    float* inverse = reinterpret_cast<float*>(rows + prepared_ * stride);
    double flops = 0.0;
    for (const MatchImage& image : images_) {
      flops += image.merges > 0 ? 2.0 * static_cast<double>(image.from * image.into * dim_) : 0.0;
    }
    const int threads = threads_for(flops);
    prepare(rows, inverse, stride, threads);

    best_.resize(prepared_);
    partner_.resize(prepared_);
    const std::vector<Piece> strips = pieces(k_.panel, false);
    const auto task_of = [&](const Piece& piece) {
      const MatchImage& image = *piece.image;
      const i64 into = image.row + image.from;
      MatchTask t;
      t.type = metric_.type;
      t.dim = dim_;
      t.from = rows + (image.row + piece.first) * stride;
      t.into = rows + into * stride;
      t.into_inverse = inverse + into;
      t.from_count = piece.count;
      t.into_count = image.into;
      return t;
    };
    const i64 bytes = k_.match_scratch(task_of(strips[0]));
    const i64 found = k_.panel * 4;
    parallel_tasks(static_cast<i64>(strips.size()), threads, bytes + 2 * found, [&](i64 i, char* scratch) {
      MatchTask t = task_of(strips[i]);
      t.best = reinterpret_cast<float*>(scratch + bytes);
      t.partner = reinterpret_cast<std::int32_t*>(scratch + bytes + found);
      k_.match(t, scratch);
      const i64 row = strips[i].image->row + strips[i].first;
      for (i64 n = 0; n < t.from_count; ++n) {
        const float cosine = t.best[n] * inverse[row + n];
        best_[row + n] = t.best[n] == -INFINITY ? kWorst : cosine;
        partner_[row + n] = t.partner[n];
      }
    });
  }

  void prepare(char* rows, float* inverse, i64 stride, int threads) const {
    const std::vector<Piece> parts = pieces(kPreparedRows, true);
    parallel_tasks(static_cast<i64>(parts.size()), threads, 0, [&](i64 i, char*) {
      const MatchImage& image = *parts[i].image;
      const auto side = [&](i64 place, i64 first, i64 last, i64 row) { // rows [first, last) of this side
        first = std::max<i64>(first, 0);
        if (first < last) {
          k_.prepare(metric_, dim_, image.first + place + 2 * first, last - first, rows + (row + first) * stride,
                     inverse + row + first);
        }
      };
      const i64 first = parts[i].first, last = first + parts[i].count;
      side(image.even, first, std::min(last, image.from), image.row);
      side(image.odd, first - image.from, last - image.from, image.row + image.from);
    });
  }

  // Writes the groups of an image's tokens, numbered from `next` on in the order of the tokens that are left.
  i64 merge(const MatchImage& image, i64 next) {
    std::int32_t* group = group_.data() + image.first;
    std::vector<std::int32_t> gone(image.merges > 0 ? image.from : 0);
    std::iota(gone.begin(), gone.end(), 0);
    const float* best = best_.data() + image.row;
    if (image.merges < static_cast<i64>(gone.size())) {
      std::nth_element(gone.begin(), gone.begin() + image.merges, gone.end(), [&](std::int32_t a, std::int32_t b) {
        return best[a] > best[b] || (best[a] == best[b] && a < b);
      });
      gone.resize(image.merges);
    }
    std::fill(group, group + image.length, 0);
    for (const std::int32_t a : gone) {
      group[image.even + 2 * a] = -1;
    }
    for (i64 i = 0; i < image.length; ++i) {
      if (group[i] == 0) {
        group[i] = static_cast<std::int32_t>(next++);
      }
    }
    for (const std::int32_t a : gone) {
      group[image.even + 2 * a] = group[image.odd + 2 * partner_[image.row + a]];
    }
    return next;
  }

  const MergeTokensKernels& k_;
  TokenRows metric_;
  i64 dim_, prepared_ = 0;
  std::vector<MatchImage> images_;
  std::vector<std::int32_t> group_;
  std::vector<float> best_;
  std::vector<std::int32_t> partner_;
};

Tensor match_tokens(const Arguments& args) {
  const Tensor& metric = args.tensor("metric");
  const OptionalTensor sizes = args.optional_tensor("sizes");
  std::vector<i64> lengths = args.sizes("lengths");
  const std::vector<i64> kept = args.sizes("kept");
  const i64 protect = args.integer("protect");
  Tensor keep;
  TokenRows rows = rows_of("metric", metric, keep);
  const i64 tokens = metric.size(0), dim = metric.size(1);
  TORCH_CHECK_VALUE(lengths.size() == kept.size() && protect >= 0 && tokens < INT32_MAX &&
                        std::accumulate(lengths.begin(), lengths.end(), i64{0}) == tokens &&
                        std::all_of(
                            lengths.begin(), lengths.end(), [](i64 n) { return n >= 0; }),
                    "lengths must be of all tokens, and as many as kept");
  std::vector<float> weight;
  if (sizes.has_value()) {
    check_sizes("sizes", *sizes, {tokens});
    TORCH_CHECK_TYPE(sizes->scalar_type() == at::kFloat, "sizes must be float32, got ", sizes->scalar_type());
    const Tensor contiguous = sizes->contiguous();
    weight.assign(contiguous.const_data_ptr<float>(), contiguous.const_data_ptr<float>() + tokens);
  }
  std::vector<std::int32_t> found(tokens);
  std::iota(found.begin(), found.end(), 0);
  const MergeTokensKernels& k = merge_tokens_kernels(); // once: another thread may choose another instruction set
  std::vector<float> means[2];                          // of the groups so far; one is read while the other is written
  for (int turn = 0; lengths != kept; ++turn) {
    Round round(k, rows, dim, lengths, kept, protect);
    std::vector<std::int32_t> group = round.groups();
    for (std::int32_t& row : found) {
      row = group[row];
    }
    lengths = round.lengths();
    if (lengths == kept) {
      break;
    }
    const Grouping groups(std::move(group), std::accumulate(lengths.begin(), lengths.end(), i64{0}));
    const float* given = weight.empty() ? nullptr : weight.data();
    std::vector<float> total = groups.sums(given);
    const std::vector<float> weights = groups.weights(given, total.data());
    std::vector<float>& mean = means[turn % 2];
    mean.resize(groups.count() * dim);
    char* to = reinterpret_cast<char*>(mean.data());
    const TokenGroups g = groups.rows(dim, weights.data());
    for_rows(groups.count(), dim,
             [&](i64 first, i64 last) { merge_tokens_kernels().sum_groups(g, rows, Type::f32, to, first, last); });
    rows = {to, Type::f32, dim * 4};
    weight = std::move(total);
  }
  const Tensor assignment = at::detail::empty_cpu({tokens}, at::kLong);
  std::copy(found.begin(), found.end(), assignment.mutable_data_ptr<i64>());
  return assignment;
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("match_tokens_cpu", by_name<match_tokens>());
}

} // namespace mmkernels
