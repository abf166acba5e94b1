// The gradient of logits: of what a pass kept of them, or of logits that are computed again.
#pragma once

#include "blocks.h"

namespace mmkernels::MMK_ISA {

// Of kLanes tokens.
struct GradientLanes {
  const LinearParams& p;
  i64 token;

  MMK_INLINE Vec get(GradientRow row) const {
    return load(p.gradient_rows + row * padded_tokens(p) + token);
  }
  MMK_INLINE IVec is_target(i64 word) const {
    return (IVec)load(p.target + token) == (std::int32_t)word - IVec{};
  }
  // What does not depend on the probability.
  MMK_INLINE Vec of_words(i64 word) const {
    return p.word_weight != nullptr ? get(kOfWords) * set1(p.word_weight[word]) : zero();
  }
  MMK_INLINE Vec of_logit(Vec y, i64 word) const {
    const Vec x = y - get(kBase), probability = exp_of(x);
    Vec g = probability * get(kOfProbability);
    if (p.entropy) {
      g += probability == zero() ? zero() : probability * x * get(kOfEntropy);
    }
    return g + of_words(word) + (is_target(word) ? get(kOfTarget) : zero());
  }
};

// The gradient of one word's logits in the working format to `to`; f(lanes, token): of kLanes tokens. Returns the sum.
template <typename F> MMK_INLINE Vec gradient_of_word(const LinearParams& p, char* to, const F& f) {
  Vec total = zero();
  for (i64 token = 0; token < p.tokens; token += kLanes) {
    const Vec g = f(GradientLanes{p, token}, token);
    total += g;
    store_working(to + token * (is_dot(p) ? 2 : 4), is_dot(p), g);
  }
  return total;
}

inline void gradient_of_kept(const LinearParams& p, Words words, i64 first_word, float* bias, bool add_bias,
                             char* scratch) {
  const LogitsScratch s{{scratch}, p};
  each_block(words.first, words.last, s.words, [&](i64 first, i64 rows) {
    if (p.keeps_exponentials) {
      const float* exponents = p.exponents + first / s.words * padded_tokens(p);
      for (i64 token = 0; token < p.tokens; token += kLanes) {
        const GradientLanes lanes{p, token};
        store(s.factors + token, exp_of(load(exponents + token) - lanes.get(kBase)) * lanes.get(kOfProbability));
      }
    }
    for (i64 word = first; word < first + rows; ++word) {
      const char* kept = p.kept + word * p.kept_row;
      char* to = p.logits + (word - first_word) * p.logits_row;
      const Vec total = gradient_of_word(p, to, [&](const GradientLanes& lanes, i64 token) {
        if (p.keeps_exponentials) {
          const Vec e = load_bf16((const std::uint16_t*)kept + token);
          const Vec g = fma(e, load(s.factors + token), lanes.of_words(word));
          // The target's: a bfloat16 near 1 less 1 would have few digits.
          return lanes.is_target(word) ? lanes.get(kOfTargetLogit) : g;
        }
        const Logit y = logit_of(p, load(kept + token * 4), word);
        return lanes.of_logit(y.value, word) * y.slope;
      });
      if (bias != nullptr) {
        bias[word] = (add_bias ? bias[word] : 0.0f) + sum(total);
      }
    }
  });
}

inline void gradient(const LinearParams& p, Words words, i64 first_word, float* bias, char* scratch) {
  const LogitsScratch s{{scratch}, p};
  each_block(words.first, words.last, s.words, [&](i64 word, i64 rows) {
    std::memset(s.bias, 0, rows * sizeof(Vec));
    each_tile(p, s, word, rows, [&](i64 panel) {
      const i64 vectors = vectors_of_panel(p, panel), size = is_dot(p) ? 2 : 4;
      for (i64 r = 0; r < rows; ++r) {
        Vec total = zero();
        char* to = p.logits + (word + r - first_word) * p.logits_row + panel * kPanel * size;
        for (i64 v = 0; v < vectors; ++v) {
          const Logit y = logit_of(p, load(s.tile + r * kPanel + v * kLanes), word + r);
          const Vec g = GradientLanes{p, panel * kPanel + v * kLanes}.of_logit(y.value, word + r) * y.slope;
          total += g;
          store_working(to + v * kLanes * size, is_dot(p), g);
        }
        if (bias != nullptr) {
          store(s.bias + r * kLanes, load(s.bias + r * kLanes) + total);
        }
      }
    });
    for (i64 r = 0; bias != nullptr && r < rows; ++r) {
      bias[word + r] = sum(load(s.bias + r * kLanes));
    }
  });
}

} // namespace mmkernels::MMK_ISA
