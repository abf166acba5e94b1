// Products of the logits' gradient: with tokens for the weight's gradient, with words for that of the hidden states.
#pragma once

#include "blocks.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kTileRows = kVectors == 4 || kLanes < 16 ? 6 : 8; // of a whole tile of the GEMM

struct ProductScratch : Arena {
  const LinearParams& p;
  char* copy = take<char>(product_words(p) * row_bytes(is_dot(p), kPanel));
  float* words = take<float>(depth_of_block(p) * kPanel);
  char* pairs = take<char>(is_dot(p) ? depth_of_block(p) * pad_lanes(p.tokens) * 4 : 0);
  float* by_token = take<float>(pad_lanes(p.tokens) * depth_of_block(p)); // [tokens, words (or pairs)]
  float* tile = take<float>(product_words(p) * kPanel);
};

// A block of words of a task.
struct ProductBlock {
  const LinearParams& p;
  const ProductScratch& s;
  i64 word, rows;
  Rows gradient; // of the logits

  // Transposes the logits' gradient, so that words are its depth.
  void turn() const {
    const i64 depth = product_depth(p, rows);
    if (is_dot(p)) {
      interleave_rows(gradient, rows, p.tokens, s.pairs);
      transpose_rows({s.pairs, pad_lanes(p.tokens) * 4}, depth, p.tokens, depth_of_block(p), s.by_token);
    } else {
      transpose_rows(gradient, depth, p.tokens, depth_of_block(p), s.by_token);
    }
  }

  // A group of columns of these words as the right operand, [rows (or pairs), kPanel].
  struct Right {
    const float* data;
    i64 row;
  };
  Right words_of_group(i64 group) const {
    const i64 cols = columns_of(p, group);
    const Rows some = fetch(from_column(words_from(p, word), group * kPanel), rows, cols, is_dot(p), s.copy);
    if (!is_dot(p) && some.data == s.copy) {
      return {(const float*)s.copy, some.stride / 4};
    }
    group_columns(is_dot(p), some, rows, cols, s.words);
    return {s.words, kPanel};
  }

  template <bool kDot> void hidden_product(i64 group, float* sums, bool add) const {
    const Right right = words_of_group(group);
    product<kDot>({(const char*)s.by_token, depth_of_block(p) * 4, 4}, right.data, right.row,
                  sums + group * p.tokens * kPanel, kPanel, p.tokens, vectors_of_lanes(columns_of(p, group)),
                  product_depth(p, rows), add);
  }

  // Rows of the next group's words, or of the first group's of the next block.
  MMK_INLINE void read_ahead(i64 group, i64 r, i64 count) const {
    const bool last = group + 1 == groups_of(p);
    const i64 first = word + r + (last ? rows : 0), column = last ? 0 : (group + 1) * kPanel;
    for (i64 n = first; n < least(first + count, p.words); ++n) {
      const char* at = from_column(words_from(p, n), column).data;
      for (i64 byte = 0; byte < kPanel * bytes_of(p.weight.type); byte += 64) {
        __builtin_prefetch(at + byte);
      }
    }
  }

  template <bool kDot> void weight_product(i64 group, const WeightSums& w) const {
    const i64 cols = columns_of(p, group), depth = product_depth(p, p.tokens), at = word * p.dim + group * kPanel;
    // A whole vector would pass the end of the row.
    const bool direct = w.sums != nullptr && cols % kLanes == 0;
    float* to = direct ? w.sums + at : s.tile;
    const i64 to_row = direct ? p.dim : kPanel;
    for (i64 r = 0; r < rows; r += kTileRows) { // a tile at a time, beside which the words that come next are read
      const i64 some = least(kTileRows, rows - r);
      read_ahead(group, r, some);
      for (i64 k = 0; k < depth; k += kChain) {
        product<kDot>({gradient.data + r * gradient.stride + k * 4, gradient.stride, 4},
                      p.groups + (group * depth + k) * kPanel, kPanel, to + r * to_row, to_row, some,
                      vectors_of_lanes(cols), least(kChain, depth - k), k > 0 || (direct && w.add));
      }
    }
    for (i64 r = 0; r < rows && (!direct || w.to != nullptr); ++r) {
      for (i64 c = 0; c < cols; c += kLanes) {
        const i64 element = at + r * p.dim + c;
        Vec x = load_part(to + r * to_row + c, cols - c);
        if (w.sums != nullptr && !direct) {
          x = w.add ? load_part(w.sums + element, cols - c) + x : x;
          store_part(w.sums + element, x, cols - c);
        }
        if (w.to != nullptr) {
          store_from_f32(w.to + element * bytes_of(w.type), w.type, x, cols - c);
        }
      }
    }
  }
};

inline void products(const LinearParams& p, const ProductTask& task, i64 first_word, const WeightSums& weight,
                     char* scratch) {
  const ProductScratch s{{scratch}, p};
  each_block(task.words.first, task.words.last, product_words(p), [&](i64 word, i64 rows) {
    const ProductBlock block{p, s, word, rows, {p.logits + (word - first_word) * p.logits_row, p.logits_row}};
    if (task.hidden != nullptr) {
      block.turn();
    }
    with_pairs(is_dot(p), [&](auto pairs) {
      for (i64 group = task.first_group; group < task.last_group; ++group) {
        if (weight.need) {
          block.template weight_product<pairs()>(group, weight);
        }
        if (task.hidden != nullptr) {
          block.template hidden_product<pairs()>(group, task.hidden, task.add_hidden || word > task.words.first);
        }
      }
    });
  });
}

inline void hidden_rows(const LinearParams& p, const float* sums, i64 parts, i64 apart, Words tokens, Type type,
                        char* to) {
  for (i64 token = tokens.first; token < tokens.last; ++token) {
    char* row = to + p.live[token] * p.dim * bytes_of(type);
    for (i64 c = 0; c < p.dim; c += kLanes) {
      const float* at = sums + (c / kPanel * p.tokens + token) * kPanel + c % kPanel;
      Vec total = load(at);
      for (i64 part = 1; part < parts; ++part) {
        total += load(at + part * apart);
      }
      store_from_f32(row + c * bytes_of(type), type, total, p.dim - c);
    }
  }
}

} // namespace mmkernels::MMK_ISA
