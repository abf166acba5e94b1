// The products of a linear op's gradients: words shared out to the threads, each share with its own sums for the hidden
// states' gradient, or, where those would take much memory, columns shared out.
#pragma once

#include "launch.h"

namespace mmkernels {

// Bytes of a word's row of logits for so many tokens. Rows at multiples of a page would meet in the same cache lines.
inline i64 logits_row(i64 tokens, i64 size) {
  const i64 bytes = (tokens + kVectorAlign - 1) / kVectorAlign * kVectorAlign * size;
  return bytes % 1024 == 0 ? bytes + 64 : bytes;
}

class Products {
public:
  // Whether as many shares as threads fit into so many bytes of sums for so many tokens; see `by_words`.
  static bool fits(const LinearLaunch& launch, i64 tokens, i64 bytes) {
    return launch.threads * sums_of(launch, tokens) * 4 <= bytes;
  }

  // `tokens`: at most, of a chunk. `bytes`: of all sums for the hidden states' gradient.
  Products(const LinearLaunch& launch, i64 tokens, bool need_hidden, const WeightSums& weight, i64 bytes = kPartBytes)
      : launch_(launch), weight_(weight), need_hidden_(need_hidden), block_(launch.k.product_words(launch.p)),
        groups_((launch.p.dim + launch.k.panel_tokens() - 1) / launch.k.panel_tokens()),
        apart_(sums_of(launch, tokens)),
        parts_(launch.threads == 1
                   ? 1
                   : std::clamp<i64>(need_hidden ? bytes / (apart_ * 4) : 2 * launch.threads, 1, 2 * launch.threads)),
        sums_(need_hidden ? parts_ * apart_ * 4 : 0) {}

  // Whether each share of the words computes its products at once: then nothing of other shares is needed.
  bool by_words() const {
    return parts_ >= launch_.threads;
  }
  void set_weight(const WeightSums& weight) {
    weight_ = weight;
  }

  // Of words whose logits' gradient prepare(chunk, words, first word of `logits`, scratch) computes. If by_words(), the
  // chunk's `logits` may be null: each task then has its own memory for a block.
  template <typename Prepare>
  void run(const LinearParams& chunk, Words words, bool add_hidden, i64 prepare_scratch, const Prepare& prepare) {
    const i64 product_scratch = launch_.k.product_scratch(chunk);
    if (by_words()) {
      const bool own = chunk.logits == nullptr;
      const i64 scratch_bytes = (std::max(prepare_scratch, product_scratch) + 63) / 64 * 64;
      const i64 of_logits = own ? block_ * chunk.logits_row : 0;
      used_ = launch_.in_shares(
          words, parts_, block_, scratch_bytes + of_logits, [&](Words share, i64 part, char* scratch) {
            LinearParams p = chunk;
            p.logits = own ? scratch + scratch_bytes : chunk.logits;
            for (i64 word = share.first; word < share.last; word += block_) {
              const Words some{word, std::min(share.last, word + block_)};
              const i64 first_word = own ? word : words.first;
              prepare(p, some, first_word, scratch);
              multiply(p, some, {0, groups_}, part, add_hidden || word > share.first, first_word, scratch);
            }
          });
      return;
    }
    launch_.in_shares(words, 4 * launch_.threads, block_, prepare_scratch,
                      [&](Words some, i64, char* scratch) { prepare(chunk, some, words.first, scratch); });
    used_ = launch_.share_count(words, parts_, block_);
    const i64 share = launch_.share_words(words, parts_, block_);
    const i64 wanted = std::min(groups_, (launch_.threads + used_ - 1) / used_), each = (groups_ + wanted - 1) / wanted;
    const i64 splits = (groups_ + each - 1) / each;
    parallel_tasks(used_ * splits, launch_.threads, product_scratch, [&](i64 i, char* scratch) {
      const i64 part = i / splits, split = i % splits, begin = words.first + part * share;
      multiply(chunk, {begin, std::min(words.last, begin + share)},
               {split * each, std::min(groups_, (split + 1) * each)}, part, add_hidden, words.first, scratch);
      multiplied() += launch_.k.take_multiplied();
    });
  }

  // Writes the hidden states' gradient of a chunk's tokens to their rows.
  void write_hidden(const LinearParams& chunk, const Tensor& to) const {
    if (!need_hidden_) {
      return;
    }
    const float* sums = reinterpret_cast<const float*>(sums_.data());
    char* data = static_cast<char*>(to.mutable_data_ptr());
    launch_.in_shares({0, chunk.tokens}, launch_.threads, 1, 0, [&](Words tokens, i64, char*) {
      launch_.k.hidden_rows(chunk, sums, used_, apart_, tokens, type_of(to), data);
    });
  }

private:
  // Floats of one share's sums.
  static i64 sums_of(const LinearLaunch& launch, i64 tokens) {
    const i64 width = launch.k.panel_tokens();
    return (launch.p.dim + width - 1) / width * tokens * width;
  }

  void multiply(const LinearParams& p, Words words, Words groups, i64 part, bool add_hidden, i64 first_word,
                char* scratch) const {
    float* sums = need_hidden_ ? reinterpret_cast<float*>(sums_.data()) + part * apart_ : nullptr;
    launch_.k.products(p, {words, groups.first, groups.last, sums, add_hidden}, first_word, weight_, scratch);
  }

  const LinearLaunch& launch_;
  WeightSums weight_;
  bool need_hidden_;
  i64 block_, groups_, apart_, parts_, used_ = 0;
  Workspace sums_;
};

// Zeros to the rows that take no part.
inline void clear_ignored(const LinearLaunch& launch, const Tensor& rows) {
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const i64 bytes = launch.p.dim * static_cast<i64>(rows.element_size());
  launch.each_ignored([&](i64 row) { std::memset(to + row * bytes, 0, bytes); });
}

} // namespace mmkernels
