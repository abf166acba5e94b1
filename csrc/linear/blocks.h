// Sizes of blocks, packed tokens, and a block's logits: what all passes share.
#pragma once

#include "../common/product.h"
#include "params.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kMaxBlockWords = 96;     // of logits: whole tiles of 6 and of 8 rows
constexpr i64 kMinBlockWords = 48;     // of deep rows, which do not fit into a cache
constexpr i64 kPairChain = 512;        // pairs of channels that are multiplied before sums go to memory
constexpr i64 kWordDepth = 96;         // words that products sum over before sums go to memory
constexpr i64 kPairDepth = 192;        // pairs of words that they do
constexpr i64 kPackedColumns = 512;    // tokens are copied so many channels at a time
constexpr i64 kBlockBytes = 512 << 10; // of a block's words, which all panels multiply

MMK_INLINE bool is_dot(const LinearParams& p) {
  return uses_dot(p.weight.type);
}
MMK_INLINE i64 depth_of(const LinearParams& p) {
  return depth_of(is_dot(p), p.dim);
}
inline i64 block_words(const LinearParams& p) {
  const i64 fit = kBlockBytes / row_bytes(is_dot(p), p.dim) / kMinBlockWords * kMinBlockWords;
  return most(kMinBlockWords, least(fit, kMaxBlockWords));
}
inline i64 product_words(const LinearParams& p) {
  return is_dot(p) ? 2 * kPairDepth : kWordDepth;
}
MMK_INLINE i64 depth_of_block(const LinearParams& p) {
  return is_dot(p) ? kPairDepth : kWordDepth;
}
inline i64 panel_tokens() {
  return kPanel;
}
MMK_INLINE i64 panels_of(const LinearParams& p) {
  return (p.tokens + kPanel - 1) / kPanel;
}
MMK_INLINE i64 vectors_of_panel(const LinearParams& p, i64 panel) {
  return vectors_of_lanes(least<i64>(kPanel, p.tokens - panel * kPanel));
}
MMK_INLINE i64 groups_of(const LinearParams& p) {
  return (p.dim + kPanel - 1) / kPanel;
}
MMK_INLINE i64 columns_of(const LinearParams& p, i64 group) {
  return least<i64>(kPanel, p.dim - group * kPanel);
}
// The depth of a product that sums over so many rows.
MMK_INLINE i64 product_depth(const LinearParams& p, i64 rows) {
  return is_dot(p) ? (rows + 1) / 2 : rows;
}
// Floats, or pairs, from one token to the next of arrays over tokens.
MMK_INLINE i64 padded_tokens(const LinearParams& p) {
  return round_up(p.tokens, kTokenAlign);
}

MMK_INLINE Source words_from(const LinearParams& p, i64 word) {
  return {p.weight.data + word * p.weight.row * bytes_of(p.weight.type), p.weight.type, p.weight.row, p.weight.column,
          nullptr};
}
MMK_INLINE Source tokens_from(const LinearParams& p, i64 token) {
  return {p.hidden.data, p.hidden.type, p.hidden.row, p.hidden.column, p.live + token};
}
MMK_INLINE bool words_in_place(const LinearParams& p) {
  return usable_in_place(words_from(p, 0), p.dim, is_dot(p));
}

inline i64 panels_floats(const LinearParams& p) {
  return panels_of(p) * depth_of(p) * kPanel;
}
inline i64 groups_floats(const LinearParams& p) {
  return groups_of(p) * product_depth(p, p.tokens) * kPanel;
}
inline i64 pack_scratch(const LinearParams& p) {
  return kPanel * row_bytes(is_dot(p), least(p.dim, kPackedColumns));
}
// Transposes a panel of tokens: [depth, lanes].
inline void pack_panel(const LinearParams& p, i64 panel, float* panels, char* scratch) {
  const i64 first = panel * kPanel, count = least<i64>(kPanel, p.tokens - first);
  const i64 lanes = vectors_of_panel(p, panel) * kLanes;
  float* to = panels + panel * depth_of(p) * kPanel;
  for (i64 column = 0; column < p.dim; column += kPackedColumns) {
    const i64 cols = least(kPackedColumns, p.dim - column), depth = depth_of(is_dot(p), cols);
    const Rows rows = fetch(from_column(tokens_from(p, first), column), count, cols, is_dot(p), scratch);
    transpose_rows(rows, count, depth, lanes, to);
    to += depth * lanes;
  }
}
// Copies a group of columns of all tokens.
inline void pack_group(const LinearParams& p, i64 group, float* groups, char* scratch) {
  float* to = groups + group * product_depth(p, p.tokens) * kPanel;
  for (i64 first = 0; first < p.tokens; first += kPanel) {
    const i64 count = least<i64>(kPanel, p.tokens - first), cols = columns_of(p, group);
    const Rows rows = fetch(from_column(tokens_from(p, first), group * kPanel), count, cols, is_dot(p), scratch);
    group_columns(is_dot(p), rows, count, cols, to + product_depth(p, first) * kPanel);
  }
}

// Products of words with a panel of tokens, [rows, kPanel].
inline void panel_products(const LinearParams& p, Rows words, i64 rows, i64 panel, float* to) {
  const i64 depth = depth_of(p), vectors = vectors_of_panel(p, panel);
  const float* packed = p.panels + panel * depth * kPanel;
  with_pairs(is_dot(p), [&](auto pairs) {
    constexpr i64 kStep = pairs() ? kPairChain : kChain;
    for (i64 k = 0; k < depth; k += kStep) {
      product<pairs()>({words.data + k * 4, words.stride, 4}, packed + k * vectors * kLanes, vectors * kLanes, to,
                       kPanel, rows, vectors, least(kStep, depth - k), k > 0);
    }
  });
}

// e^x: exactly 0 for -inf and where it would be below 2^-126, NaN for NaN. Relative error below 2e-7 + 2e-8 |x|.
MMK_INLINE Vec exp_of(Vec x) {
  const Vec n = round_to_whole(x * set1(kLog2e));
  return times_exp2(exp2_of_fraction(fma(x, set1(kLog2e), -n)), n, n);
}

// tanh x, and its derivative 1 - tanh^2 x without a difference of what is nearly equal.
struct Tanh {
  Vec value, slope;
};
MMK_INLINE Tanh tanh_of(Vec x) {
  const Vec size = x < zero() ? -x : x, u = exp_of(set1(-2.0f) * size), more = set1(1.0f) + u;
  const Vec large = (set1(1.0f) - u) / more, squared = x * x;
  // The polynomial with the least relative error up to 0.63, below 5e-9.
  Vec small = fma(set1(-5.666976257e-3f), squared, set1(2.060617576e-2f));
  small = fma(small, squared, set1(-5.373000682e-2f));
  small = fma(small, squared, set1(1.333133100e-1f));
  small = fma(small, squared, set1(-3.333327806e-1f));
  small = fma(small * squared, x, x);
  return {size < 0.625f ? small : (x < zero() ? -large : large), set1(4.0f) * u / (more * more)};
}

// Whether logits are the products themselves.
MMK_INLINE bool are_products(const LinearParams& p) {
  return p.bias == nullptr && p.softcap == 0.0f && p.temperature == 1.0f;
}

struct Logit {
  Vec value, slope; // by the product that it is made of
};
// Of a product with a word.
MMK_INLINE Logit logit_of(const LinearParams& p, Vec product, i64 word) {
  Logit y{p.bias != nullptr ? product + set1(p.bias[word]) : product, set1(1.0f)};
  if (p.softcap != 0.0f) {
    const Tanh cap = tanh_of(y.value / set1(p.softcap));
    y = {cap.value * set1(p.softcap), cap.slope};
  }
  if (p.temperature != 1.0f) {
    y = {y.value / set1(p.temperature), y.slope / set1(p.temperature)};
  }
  return y;
}

// Scratch of a task. Members are taken in the order of their declaration.
struct LogitsScratch : Arena {
  const LinearParams& p;
  const i64 words = block_words(p);
  float* tile = take<float>(words * kPanel);
  char* copy = take<char>(words_in_place(p) ? 0 : words * row_bytes(is_dot(p), p.dim));
  float* bias = take<float>(words * kLanes); // sums of a block's rows
  float* factors = take<float>(padded_tokens(p));
};

// Calls f(word, rows) for each block of some words.
template <typename F> MMK_INLINE void each_block(i64 first, i64 last, i64 step, const F& f) {
  for (i64 word = first; word < last; word += step) {
    f(word, least(step, last - word));
  }
}
// Calls f(panel) for each panel of a block, whose products are in the tile.
template <typename F> void each_tile(const LinearParams& p, const LogitsScratch& s, i64 word, i64 rows, const F& f) {
  const Rows words = fetch(words_from(p, word), rows, p.dim, is_dot(p), s.copy);
  for (i64 panel = 0; panel < panels_of(p); ++panel) {
    panel_products(p, words, rows, panel, s.tile);
    f(panel);
  }
}

} // namespace mmkernels::MMK_ISA
