// One call of a linear op: its tensors as the plain data that the kernels take, and how the work is cut.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/arguments.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "../common/work.h"
#include "params.h"

namespace mmkernels {

MMK_TABLES(LinearKernels, linear_kernels)

constexpr i64 kIgnored = -1;               // the target of a row that takes no part
constexpr i64 kPanelBytes = i64(16) << 20; // of tokens that are packed at a time for sums alone
constexpr i64 kPartBytes = i64(16) << 20;  // of all parts of the hidden states' gradient

inline i64 padded(i64 tokens) {
  return (tokens + kTokenAlign - 1) / kTokenAlign * kTokenAlign;
}
inline Tensor wide_and_dense(const Tensor& x) {
  return x.to(at::kFloat).contiguous();
}

// Tokens of a call with their words' logits; `chunk` takes some of the tokens.
class LinearLaunch {
public:
  const LinearKernels& k = linear_kernels(); // once: another thread may choose another instruction set
  LinearParams p;                            // of all tokens; nothing is packed
  int threads = 1;

  LinearLaunch(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
               const OptionalTensor& word_weight)
      : rows_(hidden.size(0)) {
    check_sizes("hidden", hidden, {-1, -1});
    p.dim = hidden.size(1);
    check_sizes("weight", weight, {-1, p.dim});
    p.words = weight.size(0);
    check_sizes("target", target, {rows_});
    TORCH_CHECK_TYPE(weight.scalar_type() == hidden.scalar_type(), "weight must have the dtype ", hidden.scalar_type());
    TORCH_CHECK_VALUE(p.words > 0 && p.dim > 0, "weight must not be empty, got ", weight.sizes());
    TORCH_CHECK_VALUE(rows_ < INT32_MAX && p.words < INT32_MAX, "there are too many rows");
    p.hidden = matrix_of(hidden);
    p.weight = matrix_of(weight);
    if (bias.has_value()) {
      check_sizes("bias", *bias, {p.words});
      bias_ = wide_and_dense(*bias);
      p.bias = bias_.const_data_ptr<float>();
    }
    if (word_weight.has_value()) {
      check_sizes("token_weight", *word_weight, {p.words});
      word_weight_ = wide_and_dense(*word_weight);
      p.word_weight = word_weight_.const_data_ptr<float>();
    }
    find_live(target.contiguous());
  }

  i64 rows() const {
    return rows_; // of hidden
  }
  // Calls f(row) for each row that takes no part.
  template <typename F> void each_ignored(const F& f) const {
    i64 next = 0;
    for (i64 row = 0; row < rows_; ++row) {
      if (next < p.tokens && p.live[next] == row) {
        ++next;
      } else {
        f(row);
      }
    }
  }

  // `products`: how many matrix products of all tokens and words there are.
  void choose_threads(double products) {
    threads = threads_for(products * 2.0 * p.tokens * p.words * p.dim);
  }
  // Some tokens; `first` is a multiple of 16.
  LinearParams chunk(i64 first, i64 count) const {
    LinearParams some = p;
    some.tokens = count;
    some.live += first;
    some.target += first;
    return some;
  }

  // Packs panels to memory of `panels_floats`, and groups, if wanted, to memory of `groups_floats`.
  void pack(LinearParams& some, char* panels, char* groups) const {
    float *to_panels = reinterpret_cast<float*>(panels), *to_groups = reinterpret_cast<float*>(groups);
    const i64 width = k.panel_tokens(), count = (some.tokens + width - 1) / width;
    const i64 of_groups = groups != nullptr ? (p.dim + width - 1) / width : 0;
    parallel_tasks(count + of_groups, threads, k.pack_scratch(some), [&](i64 i, char* scratch) {
      if (i < count) {
        k.pack_panel(some, i, to_panels, scratch);
      } else {
        k.pack_group(some, i - count, to_groups, scratch);
      }
    });
    some.panels = to_panels;
    some.groups = to_groups;
  }

  // Calls run(words, task, scratch) for about so many shares of words [first, last), which begin at whole blocks.
  // Returns how many there are.
  template <typename F> i64 in_shares(Words words, i64 wanted, i64 block, i64 scratch_bytes, const F& run) const {
    const i64 count = share_count(words, wanted, block), share = share_words(words, wanted, block);
    parallel_tasks(count, threads, scratch_bytes, [&](i64 i, char* scratch) {
      const i64 begin = words.first + i * share;
      run(Words{begin, std::min(words.last, begin + share)}, i, scratch);
      multiplied() += k.take_multiplied();
    });
    return count;
  }
  static i64 share_words(Words words, i64 wanted, i64 block) {
    const i64 blocks = (words.last - words.first + block - 1) / block;
    return std::max<i64>((blocks + wanted - 1) / wanted, 1) * block;
  }
  static i64 share_count(Words words, i64 wanted, i64 block) {
    const i64 share = share_words(words, wanted, block);
    return (words.last - words.first + share - 1) / share;
  }

private:
  static Matrix matrix_of(const Tensor& x) {
    return {static_cast<const char*>(x.const_data_ptr()), type_of(x), x.stride(0), x.size(1) == 1 ? 1 : x.stride(1)};
  }

  void find_live(const Tensor& target) {
    const i64* targets = target.const_data_ptr<i64>();
    for (i64 row = 0; row < rows_; ++row) {
      if (targets[row] != kIgnored) {
        live_.push_back(static_cast<std::int32_t>(row));
        const bool here = targets[row] >= 0 && targets[row] < p.words;
        target_.push_back(here ? static_cast<std::int32_t>(targets[row]) : -1);
      }
    }
    p.tokens = static_cast<i64>(live_.size());
    target_.resize(padded(p.tokens) + kTokenAlign, -1);
    p.live = live_.data();
    p.target = target_.data();
  }

  i64 rows_;
  std::vector<std::int32_t> live_, target_;
  Tensor bias_, word_weight_;
};

// A token's states over all words.
struct TokenState {
  double reference = -std::numeric_limits<double>::infinity();
  double sum = 0.0, moment = 0.0, total = 0.0, picked = reference, best = reference;
  i64 best_word = 0;

  double lse() const {
    return reference + std::log(sum);
  }
};

// The states of a chunk of tokens, each share of the words its own, merged in order.
class StateSums {
public:
  StateSums(const LinearLaunch& launch, const LinearParams& chunk) : stride_(padded(chunk.tokens)) {
    const i64 wanted = launch.threads == 1 ? 1 : 4 * launch.threads, block = launch.k.block_words(chunk);
    const Words words{0, chunk.words};
    count_ = launch.share_count(words, wanted, block);
    states_.resize(count_ * kStateRows * stride_);
    launch.in_shares(words, wanted, block, launch.k.logits_scratch(chunk), [&](Words some, i64 i, char* scratch) {
      float* states = states_.data() + i * kStateRows * stride_;
      begin(states, static_cast<std::int32_t>(some.first));
      launch.k.states(chunk, some, states, stride_, scratch);
    });
  }

  TokenState of(i64 token) const {
    TokenState x;
    for (i64 i = 0; i < count_; ++i) {
      x.reference = std::max<double>(x.reference, at(i, kReference)[token]);
    }
    for (i64 i = 0; i < count_; ++i) {
      const double sum = at(i, kSum)[token] + static_cast<double>(at(i, kSumLost)[token]);
      if (sum != 0.0) {
        const double above = at(i, kReference)[token] - x.reference, factor = std::exp(above);
        const double moment = at(i, kMoment)[token] + static_cast<double>(at(i, kMomentLost)[token]);
        x.sum += factor * sum;
        x.moment += factor * (moment + above * sum);
      }
      const double total = at(i, kTotal)[token], lost = at(i, kTotalLost)[token];
      x.total += std::isfinite(total) ? total + lost : total;
      x.picked = std::isinf(at(i, kPicked)[token]) ? x.picked : at(i, kPicked)[token];
      if (i == 0 || at(i, kBest)[token] > x.best) {
        x.best = at(i, kBest)[token];
        std::int32_t word;
        std::memcpy(&word, at(i, kBestWord) + token, sizeof word);
        x.best_word = word;
      }
    }
    return x;
  }

private:
  const float* at(i64 share, StateRow row) const {
    return states_.data() + (share * kStateRows + row) * stride_;
  }
  void begin(float* states, std::int32_t first_word) const {
    for (const StateRow row : {kReference, kPicked, kBest}) {
      std::fill_n(states + row * stride_, stride_, -std::numeric_limits<float>::infinity());
    }
    for (const StateRow row : {kSum, kSumLost, kMoment, kMomentLost, kTotal, kTotalLost}) {
      std::fill_n(states + row * stride_, stride_, 0.0f);
    }
    float word;
    std::memcpy(&word, &first_word, sizeof word);
    std::fill_n(states + kBestWord * stride_, stride_, word);
  }

  i64 stride_, count_ = 0;
  std::vector<float> states_;
};

} // namespace mmkernels
