// select_diverse on the CPU. What a token would add only falls as others are chosen, so what it was when it was last
// computed bounds it: a heap gives the token with the largest bound, and only that one is brought up to date. The
// tokens chosen are those of the formula; most others are compared with few of them, and no similarity is stored.
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>
#include <vector>

#include "../common/arguments.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "diverse_params.h"

namespace mmkernels {

MMK_TABLES(DiverseKernels, diverse_kernels)

namespace {

constexpr float kNothingNew = 1e-5f; // spec.py says what it is
constexpr float kNotCounted = -1.0f; // ranks a token that does not count behind all others
constexpr i64 kPart = 32;            // tokens that one is compared with before the next bound is looked at

struct Bound {
  float value; // what the token would add, at most; 0: nothing; or `kNotCounted`
  i64 token;

  bool operator<(const Bound& other) const { // whether it comes after `other`
    return value != other.value ? value < other.value : token > other.token;
  }
};

// The selection from one image. With `orthogonal` the chosen directions are at right angles to each other.
class Selection {
public:
  Selection(const StridedRows& rows, const float* quality, i64 count, i64 keep, bool orthogonal, char* scratch)
      : rows_(rows), quality_(quality), count_(count), keep_(keep), orthogonal_(orthogonal), k_(diverse_kernels()),
        scratch_(scratch), row_(rows.dim), dots_(std::max(keep, kPart)), inverse_(count), done_(count) {
    chosen_.reserve(keep * rows.dim);
    for (i64 i = 0; i < count; ++i) {
      inverse_[i] = k_.read(rows_, i, row_.data(), scratch_);
    }
  }

  void by_determinant(i64 first, i64* to) {
    choose(
        first, to,
        [&](i64 i) {
          const float gain = has_length(i) ? square(quality(i)) : 0.0f;
          return counts(i) ? gain : kNotCounted;
        },
        [&](Bound& bound) {
          const float whole = square(quality(bound.token));
          float part = 0.0f;
          for_chosen(bound.token, [&](float cosine) { part += square(cosine); });
          bound.value -= whole * part;
          return bound.value > kNothingNew * whole ? bound.value : 0.0f;
        });
  }

  void by_distance(i64 first, i64* to) {
    if (keep_ == 0) {
      return;
    }
    const i64 start = loneliest();
    chosen_numbers_.push_back(start);
    remember(start);
    to[0] = first + start;
    choose(
        first, to, [&](i64 i) { return counts(i) ? std::numeric_limits<float>::infinity() : kNotCounted; },
        [&](Bound& bound) {
          for_chosen(bound.token, [&](float cosine) { bound.value = std::min(bound.value, 1.0f - cosine); });
          return bound.value > kNothingNew ? bound.value : 0.0f;
        });
  }

private:
  static float square(float x) {
    return x * x;
  }
  float quality(i64 i) const {
    return quality_ == nullptr ? 1.0f : quality_[i];
  }
  bool counts(i64 i) const {
    return !std::isnan(inverse_[i]) && std::isfinite(quality(i));
  }
  bool has_length(i64 i) const {
    return inverse_[i] > 0.0f;
  }

  // Chooses tokens until there are `keep`.
  template <typename Begin, typename Update> void choose(i64 first, i64* to, const Begin& begin, const Update& update) {
    std::vector<Bound> bounds;
    bounds.reserve(count_);
    for (i64 i = 0; i < count_; ++i) {
      if (std::find(chosen_numbers_.begin(), chosen_numbers_.end(), i) == chosen_numbers_.end()) {
        bounds.push_back({begin(i), i});
      }
    }
    std::make_heap(bounds.begin(), bounds.end());
    for (i64 n = static_cast<i64>(chosen_numbers_.size()); n < keep_;) {
      Bound best = bounds.front();
      std::pop_heap(bounds.begin(), bounds.end());
      if (best.value > 0.0f && done_[best.token] < remembered()) {
        best.value = update(best);
        done_[best.token] = remembered();
        bounds.back() = best;
        std::push_heap(bounds.begin(), bounds.end());
        continue;
      }
      bounds.pop_back();
      to[n++] = first + best.token;
      if (best.value > 0.0f) {
        remember(best.token);
      }
    }
  }

  i64 remembered() const {
    return static_cast<i64>(chosen_.size()) / rows_.dim;
  }

  // Calls f(cosine) for a token and each chosen direction that it has not been compared with.
  template <typename F> void for_chosen(i64 token, const F& f) {
    const i64 from = done_[token], count = remembered() - from;
    k_.read(rows_, token, row_.data(), scratch_);
    const StridedRows others{reinterpret_cast<const char*>(chosen_.data()), Type::f32, rows_.dim, rows_.dim, 1};
    k_.dots(row_.data(), others, from, count, dots_.data(), scratch_);
    for (i64 m = 0; m < count; ++m) {
      f(dots_[m] * inverse_[token]);
    }
  }

  // Adds a token's direction to the chosen ones: for distances as it is, for determinants what is new in it.
  void remember(i64 token);

  // The token whose nearest other token is farthest, the lowest of equal ones.
  i64 loneliest();

  const StridedRows rows_;
  const float* quality_;
  const i64 count_, keep_;
  const bool orthogonal_;
  const DiverseKernels& k_;
  char* scratch_;
  std::vector<float> row_, dots_, inverse_;
  std::vector<i64> done_;     // how many of the chosen directions, or in `loneliest` of the others, each token has met
  std::vector<float> chosen_; // directions, [remembered, dim]
  std::vector<i64> chosen_numbers_;
};

void Selection::remember(i64 token) {
  const i64 before = remembered(), dim = rows_.dim;
  const float inverse = k_.read(rows_, token, row_.data(), scratch_);
  const StridedRows others{reinterpret_cast<const char*>(chosen_.data()), Type::f32, dim, dim, 1};
  k_.subtract(row_.data(), std::isnan(inverse) ? 0.0f : inverse, nullptr, nullptr, 0, dim);
  if (orthogonal_) {
    for (int again = 0; again < 2; ++again) { // once more: the first time leaves errors as large as what is subtracted
      k_.dots(row_.data(), others, 0, before, dots_.data(), scratch_);
      k_.subtract(row_.data(), 1.0f, chosen_.data(), dots_.data(), before, dim);
    }
    const StridedRows itself{reinterpret_cast<const char*>(row_.data()), Type::f32, dim, dim, 1};
    float squares = 0.0f;
    k_.dots(row_.data(), itself, 0, 1, &squares, scratch_);
    k_.subtract(row_.data(), 1.0f / std::sqrt(squares), nullptr, nullptr, 0, dim);
  }
  chosen_.insert(chosen_.end(), row_.begin(), row_.end());
}

i64 Selection::loneliest() {
  std::vector<Bound> bounds;
  for (i64 i = 0; i < count_; ++i) {
    bounds.push_back({counts(i) ? std::numeric_limits<float>::infinity() : kNotCounted, i});
  }
  std::make_heap(bounds.begin(), bounds.end());
  std::vector<float> other(kPart);
  for (;;) {
    Bound best = bounds.front();
    const i64 i = best.token, met = done_[i];
    if (best.value <= 0.0f || met == count_ - 1) {
      std::fill(done_.begin(), done_.end(), 0);
      return i;
    }
    // Those behind it first, then from the beginning: neighbours are often alike.
    const i64 next = (i + 1 + met) % count_, part = std::min({kPart, count_ - 1 - met, count_ - next});
    k_.read(rows_, i, row_.data(), scratch_);
    // By a power of two, so that the products are the same from either side: tokens that are nearest to each other must
    // tie.
    const float scale = inverse_[i] > 0.0f ? std::exp2(std::floor(std::log2(inverse_[i]))) : 1.0f;
    k_.subtract(row_.data(), scale, nullptr, nullptr, 0, rows_.dim);
    k_.dots(row_.data(), rows_, next, part, dots_.data(), scratch_);
    for (i64 m = 0; m < part; ++m) {
      if (counts(next + m)) {
        best.value = std::min(best.value, 1.0f - dots_[m] * (inverse_[i] / scale * inverse_[next + m]));
      }
    }
    best.value = best.value > kNothingNew ? best.value : 0.0f;
    done_[i] = met + part;
    std::pop_heap(bounds.begin(), bounds.end());
    bounds.back() = best;
    std::push_heap(bounds.begin(), bounds.end());
  }
}

Tensor select_diverse(const Arguments& args) {
  const Tensor& x = args.tensor("x");
  const OptionalTensor quality = args.optional_tensor("quality");
  const std::vector<i64> lengths = args.sizes("lengths"), keep = args.sizes("keep");
  const bool by_determinant = args.text("method") == "determinant";
  TORCH_CHECK_VALUE(x.dim() == 2 && lengths.size() == keep.size(), "x must be [tokens, C], with keep for each length");
  std::vector<i64> first(lengths.size() + 1), kept(lengths.size() + 1);
  for (std::size_t image = 0; image < lengths.size(); ++image) {
    TORCH_CHECK_VALUE(keep[image] >= 0 && keep[image] <= lengths[image], "keep must be 0 to the tokens of each image");
    first[image + 1] = first[image] + lengths[image];
    kept[image + 1] = kept[image] + keep[image];
  }
  check_sizes("x", x, {first.back(), -1});
  if (quality.has_value()) {
    check_sizes("quality", *quality, {first.back()});
  }
  const Tensor qualities = quality.has_value() ? quality->contiguous() : x.slice(0, 0, 0);
  const Tensor index = at::detail::empty_cpu({kept.back()}, at::kLong);
  i64* to = index.mutable_data_ptr<i64>();
  const i64 dim = x.size(1);
  StridedRows rows{static_cast<const char*>(x.const_data_ptr()), type_of(x), dim, x.stride(0),
                   dim == 1 ? 1 : x.stride(1)};
  const i64 bytes = diverse_kernels().scratch(dim), size = x.element_size();
  const int threads = threads_for(2.0 * static_cast<double>(kept.back()) * static_cast<double>(x.numel()));
  parallel_tasks(static_cast<i64>(lengths.size()), threads, bytes, [&](i64 image, char* scratch) {
    StridedRows some = rows;
    some.data += first[image] * rows.row * size;
    const float* of = quality.has_value() ? qualities.const_data_ptr<float>() + first[image] : nullptr;
    Selection selection(some, of, lengths[image], keep[image], by_determinant, scratch);
    if (by_determinant) {
      selection.by_determinant(first[image], to + kept[image]);
    } else {
      selection.by_distance(first[image], to + kept[image]);
    }
  });
  return index;
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("select_diverse_cpu", by_name<select_diverse>());
}

} // namespace mmkernels
