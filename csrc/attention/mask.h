// Which keys the queries of a panel see. Spans, `key_valid` and dense masks all become one word for each key, with a
// bit for each query. A tile of keys whose words are all 0 is skipped; one whose words are all ones needs no mask.
#pragma once

#include "panel.h"

namespace mmkernels::MMK_ISA {

// The part [a, b) of a tile that at least one query of the panel sees. `words` is null where every query sees all of
// it.
struct VisibleKeys {
  i64 a, b;
  Word* words; // of the places a, a + 1, ...
  Word any;    // the queries that see any of them
};

// The words of the places from `a` on: the queries whose span holds each.
inline void write_span_words(const Panel& panel, const PanelSpans& spans, i64 a, i64 count, Word* words) {
  std::memset(words, 0, (count + 1) * sizeof(Word));
  for (i64 q = 0; q < panel.count; ++q) { // a bit turns on where its span starts and off where it ends
    const i64 from = most<i64>(spans.start[q] - a, 0), to = least<i64>(spans.end[q] - a, count);
    if (from < to) {
      words[from] ^= (Word)((Word)1 << q);
      words[to] ^= (Word)((Word)1 << q);
    }
  }
  Word on = 0;
  for (i64 r = 0; r < count; ++r) {
    on ^= words[r];
    words[r] = on;
  }
}

// Clears the bits of the places from `a` on that the dense mask or `key_valid` hides.
inline void apply_masks(const AttentionParams& p, const Panel& panel, const KeyList& list, i64 a, i64 count,
                        Word* words) {
  if (p.words != nullptr) {
    const Word* dense = (const Word*)p.words + panel.b * p.words_b + panel.h * p.words_h + panel.number * p.words_panel;
    if (list.index == nullptr) {
      for (i64 r = 0; r < count; ++r) {
        words[r] &= dense[a + r];
      }
    } else {
      for (i64 r = 0; r < count; ++r) {
        words[r] &= dense[list.index[a + r]];
      }
    }
  }
  if (p.key_valid.data != nullptr) {
    for (i64 r = 0; r < count; ++r) {
      if (!p.key_valid.data[panel.b * p.key_valid.b + key_at(list, a + r) * p.key_valid.i]) {
        words[r] = 0;
      }
    }
  }
}

// words: room for b - a + 1 words; `align_to_pairs` may write one word in front of it.
inline VisibleKeys find_visible(const AttentionParams& p, const Panel& panel, const KeyList& list,
                                const PanelSpans& spans, i64 a, i64 b, Word* words) {
  a = most(a, spans.first);
  b = least(b, spans.last);
  if (a >= b) {
    return {a, a, nullptr, 0};
  }
  const bool partial = a < spans.full_first || b > spans.full_last;
  if (!partial && p.words == nullptr && p.key_valid.data == nullptr) {
    return {a, b, nullptr, panel.real};
  }
  const i64 n = b - a;
  if (partial) {
    write_span_words(panel, spans, a, n, words);
  } else {
    std::memset(words, 0xff, n * sizeof(Word));
  }
  apply_masks(p, panel, list, a, n, words);
  Word all = panel.real, any = 0;
  for (i64 r = 0; r < n; ++r) {
    words[r] &= panel.real;
    all &= words[r];
    any |= words[r];
  }
  if (all == panel.real) {
    return {a, b, nullptr, any};
  }
  i64 first = 0, last = n;
  while (first < last && words[first] == 0) {
    ++first;
  }
  while (first < last && words[last - 1] == 0) {
    --last;
  }
  return {a + first, a + last, words + first, any};
}

// Writes words of ones where there are none yet.
inline void write_words(VisibleKeys& visible, const Panel& panel, Word* words) {
  if (visible.words == nullptr) {
    for (i64 r = 0; r < visible.b - visible.a; ++r) {
      words[r] = panel.real;
    }
    visible.words = words;
  }
}

// Makes the part begin an even number of places after `first`, by one more place in front, which is hidden.
inline VisibleKeys align_to_pairs(VisibleKeys visible, i64 first, const Panel& panel, Word* words) {
  if (visible.a == visible.b || (visible.a - first) % 2 == 0) {
    return visible;
  }
  write_words(visible, panel, words);
  visible.words -= 1;
  visible.words[0] = 0;
  visible.a -= 1;
  return visible;
}

// Packs one panel of `dense` into words: the bytes of eight queries become the bits of one byte, for many keys at once.
inline void mask_words(const AttentionParams& p, i64 b, i64 h, i64 number) {
  const std::uint8_t* mask = p.dense + b * p.dense_b + h * p.dense_h;
  char* to = p.words + (b * p.words_b + h * p.words_h + number * p.words_panel) * sizeof(Word);
  const i64 i0 = number * kPanel;
  constexpr i64 kBlock = 256;
  for (i64 j0 = 0; j0 < p.k_len; j0 += kBlock) {
    const i64 n = least(kBlock, p.k_len - j0);
    for (i64 part = 0; part < (i64)sizeof(Word); ++part) {
      std::uint8_t bits[kBlock] = {};
      for (int q = 7; q >= 0; --q) {
        const i64 i = i0 + part * 8 + q;
        if (i >= p.q_len) {
          continue;
        }
        const std::uint8_t* row = mask + i * p.dense_i + j0 * p.dense_j;
        if (p.dense_j == 1) {
          for (i64 j = 0; j < n; ++j) {
            bits[j] = (std::uint8_t)(bits[j] + bits[j] + (row[j] != 0));
          }
        } else {
          for (i64 j = 0; j < n; ++j) {
            bits[j] = (std::uint8_t)(bits[j] + bits[j] + (row[j * p.dense_j] != 0));
          }
        }
      }
      for (i64 j = 0; j < n; ++j) {
        to[(j0 + j) * sizeof(Word) + part] = (char)bits[j];
      }
    }
  }
}

} // namespace mmkernels::MMK_ISA
