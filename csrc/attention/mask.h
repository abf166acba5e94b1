// Which keys the queries of a panel see. Spans, `key_valid` and dense masks all become one word for each key, with a
// bit for each query. A tile of keys whose words are all 0 is skipped; one whose words are all ones needs no mask.
#pragma once

#include <type_traits>

#include "tensor_rows.h"

namespace mmkernels {
namespace MMK_ISA {

using Word =
    std::conditional_t<kPanel == 64, std::uint64_t, std::conditional_t<kPanel == 16, std::uint16_t, std::uint8_t>>;
static_assert(sizeof(Word) * 8 == kPanel);

// The queries i0 to i0 + count of one (b, h).
struct Panel {
  i64 b, h, i0, count, number; // number: its index among the panels of (b, h)
  i64 vectors, lanes;
  Word real; // a bit for each query
};

MMK_INLINE i64 panels_of(const AttentionParams& p) { // of one (b, h)
  return p.panels != nullptr ? p.panel_count : (p.q_len + kPanel - 1) / kPanel;
}
MMK_INLINE i64 batches_sharing_keys(const AttentionParams& p) { // how many share one batch entry of the keys
  return p.key_batch == p.batch ? 1 : p.batch;
}
MMK_INLINE i64 group_of(const AttentionParams& p) {
  return p.heads / p.key_heads;
}
// Panel `index` of those that attend to key head `kv`, which are ordered by batch entry, query head, panel.
inline Panel panel_at(const AttentionParams& p, i64 kv, i64 index) {
  const i64 of_head = panels_of(p), group = group_of(p);
  Panel panel;
  panel.number = index % of_head;
  const i64 row = index / of_head;
  panel.b = kv / p.key_heads + row / group;
  panel.h = kv % p.key_heads * group + row % group;
  if (p.panels != nullptr) {
    const PanelRange range = p.panels[panel.b * p.panel_count + panel.number];
    panel.i0 = range.first;
    panel.count = range.count;
  } else {
    panel.i0 = panel.number * kPanel;
    panel.count = least<i64>(kPanel, p.q_len - panel.i0);
  }
  panel.vectors = (panel.count + kLanes - 1) / kLanes;
  panel.lanes = panel.vectors * kLanes;
  panel.real = panel.count == 0 ? (Word)0 : (Word)((Word) ~(Word)0 >> (kPanel - panel.count));
  return panel;
}

MMK_INLINE KeyList list_of(const AttentionParams& p, i64 kv) {
  return p.lists != nullptr ? p.lists[kv / p.key_heads] : KeyList{nullptr, p.k_len};
}
MMK_INLINE i64 key_at(const KeyList& list, i64 place) {
  return list.index != nullptr ? list.index[place] : place;
}
// The first place whose key is not below `key`.
MMK_INLINE i64 place_of(const KeyList& list, i64 key) {
  if (list.index == nullptr) {
    return key < 0 ? 0 : least(key, list.count);
  }
  i64 low = 0, high = list.count;
  while (low < high) {
    const i64 middle = (low + high) / 2;
    if (list.index[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The span of one query, in places of the key list.
struct Span {
  i64 first, last;
};
MMK_INLINE Span span_of(const AttentionParams& p, const KeyList& list, i64 b, i64 i) {
  if (p.start == nullptr) {
    return {0, list.count};
  }
  const i64 start = p.start[b * p.start_b + i * p.start_i], end = p.end[b * p.end_b + i * p.end_i];
  const Span span{place_of(list, start), place_of(list, end)};
  return span.first < span.last ? span : Span{0, 0};
}

// Cuts the queries of one batch entry into panels: a query joins the panel before it unless two panels are less work.
// The work of a panel: the keys that any of its queries sees, times its vectors of queries plus one for the panel's
// cost.
inline i64 plan_panels(const AttentionParams& p, i64 b, PanelRange* ranges) {
  const KeyList all{nullptr, p.k_len};
  const auto work = [](i64 queries, i64 keys) { return ((queries + kLanes - 1) / kLanes + 1) * keys; };
  const auto length = [](const Span& r) { return r.last - r.first; };
  i64 panels = 0;
  Span hull{0, 0};
  i64 seen = 0; // keys that the panel sees
  for (i64 i = 0; i < p.q_len;) {
    const Span span = span_of(p, all, b, i);
    i64 same = 1; // queries with the same span
    while (i + same < p.q_len && same < kPanel) {
      const Span next = span_of(p, all, b, i + same);
      if (next.first != span.first || next.last != span.last) {
        break;
      }
      ++same;
    }
    bool joins = false;
    i64 taken = same;
    if (panels > 0 && ranges[panels - 1].count < kPanel) {
      PanelRange* last = ranges + panels - 1;
      taken = least<i64>(same, kPanel - last->count);
      const i64 shared = most<i64>(0, least(hull.last, span.last) - most(hull.first, span.first));
      const i64 together = seen + length(span) - least(shared, seen);
      joins = work(last->count + taken, together) <= work(last->count, seen) + work(taken, length(span));
      if (joins) {
        last->count += (std::int32_t)taken;
        seen = together;
        if (length(span) > 0) {
          hull = length(hull) == 0 ? span : Span{least(hull.first, span.first), most(hull.last, span.last)};
        }
      }
    }
    if (!joins) {
      taken = same;
      ranges[panels++] = {(std::int32_t)i, (std::int32_t)taken};
      hull = span;
      seen = length(span);
    }
    i += taken;
  }
  return panels;
}

struct PanelSpans {
  std::int32_t start[kPanel], end[kPanel];
  i64 first, last;           // no query sees a place outside [first, last)
  i64 full_first, full_last; // every query's span holds [full_first, full_last)
};

inline void spans_of_panel(const AttentionParams& p, const Panel& panel, const KeyList& list, PanelSpans& spans) {
  spans.first = list.count;
  spans.last = 0;
  spans.full_first = 0;
  spans.full_last = list.count;
  const bool same = p.start == nullptr || (p.start_i == 0 && p.end_i == 0);
  Span span{0, 0};
  for (i64 q = 0; q < panel.count; ++q) {
    if (q == 0 || !same) {
      span = span_of(p, list, panel.b, panel.i0 + q);
    }
    spans.start[q] = (std::int32_t)span.first;
    spans.end[q] = (std::int32_t)span.last;
    if (span.first < span.last) {
      spans.first = least(spans.first, span.first);
      spans.last = most(spans.last, span.last);
    }
    spans.full_first = most(spans.full_first, span.first);
    spans.full_last = least(spans.full_last, span.last);
  }
}

// The part [a, b) of a tile that at least one query of the panel sees. `words` is null where every query sees all of
// it.
struct VisibleKeys {
  i64 a, b;
  Word* words; // of the places a, a + 1, ...
  Word any;    // the queries that see any of them
};

// words: room for b - a + 1 words; `align_to_pairs` may write one word in front of it.
inline VisibleKeys find_visible(const AttentionParams& p, const Panel& panel, const KeyList& list,
                                const PanelSpans& spans, i64 a, i64 b, Word* words) {
  a = most(a, spans.first);
  b = least(b, spans.last);
  if (a >= b) {
    return {a, a, nullptr, 0};
  }
  const bool partial = a < spans.full_first || b > spans.full_last;
  if (!partial && p.words == nullptr && p.key_valid == nullptr) {
    return {a, b, nullptr, panel.real};
  }
  const i64 n = b - a;
  if (partial) { // a bit turns on where its span starts and off where it ends
    std::memset(words, 0, (n + 1) * sizeof(Word));
    for (i64 q = 0; q < panel.count; ++q) {
      const i64 from = most<i64>(spans.start[q] - a, 0), to = least<i64>(spans.end[q] - a, n);
      if (from < to) {
        words[from] ^= (Word)((Word)1 << q);
        words[to] ^= (Word)((Word)1 << q);
      }
    }
    Word on = 0;
    for (i64 r = 0; r < n; ++r) {
      on ^= words[r];
      words[r] = on;
    }
  } else {
    std::memset(words, 0xff, n * sizeof(Word));
  }
  if (p.words != nullptr) {
    const Word* dense = (const Word*)p.words + panel.b * p.words_b + panel.h * p.words_h + panel.number * p.words_panel;
    if (list.index == nullptr) {
      for (i64 r = 0; r < n; ++r) {
        words[r] &= dense[a + r];
      }
    } else {
      for (i64 r = 0; r < n; ++r) {
        words[r] &= dense[list.index[a + r]];
      }
    }
  }
  if (p.key_valid != nullptr) {
    for (i64 r = 0; r < n; ++r) {
      if (!p.key_valid[panel.b * p.valid_b + key_at(list, a + r) * p.valid_j]) {
        words[r] = 0;
      }
    }
  }
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

} // namespace MMK_ISA
} // namespace mmkernels
