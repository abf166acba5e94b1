// The running sums of each token's softmax, block of words by block.
#pragma once

#include "blocks.h"

namespace mmkernels::MMK_ISA {

// kLanes tokens of a task's states.
struct StateLanes {
  float* at;
  i64 stride;

  MMK_INLINE Vec get(StateRow row) const {
    return load(at + row * stride);
  }
  MMK_INLINE void set(StateRow row, Vec x) const {
    store(at + row * stride, x);
  }
  // Adds to a sum that is first multiplied by a factor; what rounding takes of the sum goes to its lost part.
  MMK_INLINE void add(StateRow sum, StateRow lost, Vec old, Vec factor, Vec more) const {
    const Vec total = old + more, added = total - old;
    set(lost, fma(get(lost), factor, (old - (total - added)) + (more - added)));
    set(sum, total);
  }
};

// kLanes tokens of a block.
struct BlockLanes {
  const LinearParams& p;
  i64 word, rows, token;
  float* tile; // of these tokens: products, then logits

  // Makes logits of products; returns the largest up to now, ignoring NaN.
  MMK_INLINE Vec make_logits(const StateLanes& s) const {
    Vec top = s.get(kReference), total = zero();
    if (are_products(p) && p.word_weight == nullptr) {
      for (i64 r = 0; r < rows; ++r) {
        top = max_skip_nan(top, load(tile + r * kPanel));
      }
      return top;
    }
    for (i64 r = 0; r < rows; ++r) {
      const Vec y = logit_of(p, load(tile + r * kPanel), word + r).value;
      store(tile + r * kPanel, y);
      top = max_skip_nan(top, y);
      if (p.word_weight != nullptr) {
        total = fma(set1(p.word_weight[word + r]), y, total);
      }
    }
    if (p.word_weight != nullptr) {
      s.add(kTotal, kTotalLost, s.get(kTotal), set1(1.0f), total);
    }
    return top;
  }

  // Keeps the logits of targets that are words of this block.
  MMK_INLINE void pick_targets(const StateLanes& s) const {
    const IVec at = (IVec)load(p.target + token) - ((std::int32_t)word - IVec{});
    for (std::uint32_t bits = bits_of((at >= 0) & (at < (std::int32_t)rows - IVec{})); bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      s.at[kPicked * s.stride + lane] = tile[at[lane] * kPanel + lane];
    }
  }

  // The best word up to now, the first of equals.
  MMK_INLINE void find_best(const StateLanes& s) const {
    Vec best = s.get(kBest);
    IVec at = (IVec)s.get(kBestWord);
    for (i64 r = 0; r < rows; ++r) {
      const Vec y = load(tile + r * kPanel);
      const IVec better = y > best;
      best = better ? y : best;
      at = better ? (std::int32_t)(word + r) - IVec{} : at;
    }
    s.set(kBest, best);
    s.set(kBestWord, (Vec)at);
  }

  // Adds exponentials relative to the largest logit; keep(r, exponential).
  template <typename Keep> MMK_INLINE void add_exponentials(const StateLanes& s, Vec top, const Keep& keep) const {
    const Vec old = s.get(kReference), base = top == -kInf ? zero() : top; // no logit above -inf yet
    const Vec factor = exp_of(old - base), before = s.get(kSum);
    Vec sum = zero(), moment = zero();
    if (p.entropy) {
      for (i64 r = 0; r < rows; ++r) {
        const Vec y = load(tile + r * kPanel), x = y - base, e = exp_of(x);
        sum += e;
        moment += x == -kInf ? zero() : e * x;
        keep(r, e);
      }
      const Vec moved = old == -kInf ? zero() : (old - base) * before;
      s.add(kMoment, kMomentLost, factor * (s.get(kMoment) + moved), factor, moment);
    } else {
      for (i64 r = 0; r < rows; ++r) {
        const Vec y = load(tile + r * kPanel), e = exp_of(y - base);
        sum += e;
        keep(r, e);
      }
    }
    s.add(kSum, kSumLost, factor * before, factor, sum);
    s.set(kReference, top);
  }
};

inline void states(const LinearParams& p, Words words, float* states, i64 stride, char* scratch) {
  const LogitsScratch s{{scratch}, p};
  each_block(words.first, words.last, s.words, [&](i64 word, i64 rows) {
    each_tile(p, s, word, rows, [&](i64 panel) {
      for (i64 v = 0; v < vectors_of_panel(p, panel); ++v) {
        const i64 token = panel * kPanel + v * kLanes;
        const StateLanes lanes{states + token, stride};
        const BlockLanes block{p, word, rows, token, s.tile + v * kLanes};
        char* kept = p.kept + word * p.kept_row + token * (p.keeps_exponentials ? 2 : 4);
        for (i64 r = 0; p.kept != nullptr && !p.keeps_exponentials && r < rows; ++r) {
          store(kept + r * p.kept_row, load(block.tile + r * kPanel));
        }
        const Vec top = block.make_logits(lanes);
        block.pick_targets(lanes);
        if (p.best) {
          block.find_best(lanes);
        }
        if (p.kept != nullptr && p.keeps_exponentials) {
          block.add_exponentials(lanes, top,
                                 [&](i64 r, Vec e) { store_bf16((std::uint16_t*)(kept + r * p.kept_row), e); });
          store(p.exponents + word / s.words * padded_tokens(p) + token, top == -kInf ? zero() : top);
        } else {
          block.add_exponentials(lanes, top, [](i64, Vec) {});
        }
      }
    });
  });
}

} // namespace mmkernels::MMK_ISA
