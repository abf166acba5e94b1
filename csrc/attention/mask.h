// Which keys the queries of a panel see. Spans, `key_valid` and dense masks all become one word for each key, with a
// bit for each query; a tile of keys whose words are all 0 is skipped, one whose words are all ones needs no mask.
#pragma once

#include <type_traits>

#include "tensor_rows.h"

namespace mmkernels {
namespace MMK_ISA {

using Word =
    std::conditional_t<kPanel == 64, std::uint64_t, std::conditional_t<kPanel == 16, std::uint16_t, std::uint8_t>>;
static_assert(sizeof(Word) * 8 == kPanel);

// Queries i0 to i0 + count of one (b, h).
struct Panel {
  i64 b, h, i0, count, number; // number: which of its (b, h)
  i64 vectors, lanes;
  Word real; // a bit for each query
};

MMK_INLINE i64 panels_of(const AttentionParams& p) { // of one (b, h)
  return p.panels != nullptr ? p.panel_count : (p.q_len + kPanel - 1) / kPanel;
}
MMK_INLINE i64 sharers(const AttentionParams& p) { // batch entries that share one batch entry of the keys
  return p.key_batch == p.batch ? 1 : p.batch;
}
MMK_INLINE i64 group_of(const AttentionParams& p) {
  return p.heads / p.key_heads;
}
// Panel `index` of those that look at key head `kv`: by batch entry, query head, place.
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

// The run of places that one query's span shows.
struct Run {
  i64 first, last;
};
MMK_INLINE Run run_of(const AttentionParams& p, const KeyList& list, i64 b, i64 i) {
  if (p.start == nullptr) {
    return {0, list.count};
  }
  const i64 start = p.start[b * p.start_b + i * p.start_i], end = p.end[b * p.end_b + i * p.end_i];
  const Run run{place_of(list, start), place_of(list, end)};
  return run.first < run.last ? run : Run{0, 0};
}

// Cuts the queries of one batch entry into panels: a query joins the panel before it unless computing the two apart is
// less work. Work: keys that somebody of the panel sees, times vectors of queries, one more for what a panel costs by
// itself.
inline i64 plan_panels(const AttentionParams& p, i64 b, PanelRange* ranges) {
  const KeyList all{nullptr, p.k_len};
  const auto work = [](i64 queries, i64 keys) { return ((queries + kLanes - 1) / kLanes + 1) * keys; };
  const auto length = [](const Run& r) { return r.last - r.first; };
  i64 panels = 0;
  Run hull{0, 0};
  i64 seen = 0; // keys that the panel sees
  for (i64 i = 0; i < p.q_len;) {
    const Run run = run_of(p, all, b, i);
    i64 same = 1; // queries that see just the same
    while (i + same < p.q_len && same < kPanel) {
      const Run next = run_of(p, all, b, i + same);
      if (next.first != run.first || next.last != run.last) {
        break;
      }
      ++same;
    }
    bool joins = false;
    i64 taken = same;
    if (panels > 0 && ranges[panels - 1].count < kPanel) {
      PanelRange* last = ranges + panels - 1;
      taken = least<i64>(same, kPanel - last->count);
      const i64 shared = most<i64>(0, least(hull.last, run.last) - most(hull.first, run.first));
      const i64 together = seen + length(run) - least(shared, seen);
      joins = work(last->count + taken, together) <= work(last->count, seen) + work(taken, length(run));
      if (joins) {
        last->count += (std::int32_t)taken;
        seen = together;
        if (length(run) > 0) {
          hull = length(hull) == 0 ? run : Run{least(hull.first, run.first), most(hull.last, run.last)};
        }
      }
    }
    if (!joins) {
      taken = same;
      ranges[panels++] = {(std::int32_t)i, (std::int32_t)taken};
      hull = run;
      seen = length(run);
    }
    i += taken;
  }
  return panels;
}

struct Spans {
  std::int32_t start[kPanel], end[kPanel];
  i64 first, last;           // no query sees a place outside these
  i64 full_first, full_last; // every query's span shows all of these
};

inline void spans_of(const AttentionParams& p, const Panel& panel, const KeyList& list, Spans& spans) {
  spans.first = list.count;
  spans.last = 0;
  spans.full_first = 0;
  spans.full_last = list.count;
  const bool same = p.start == nullptr || (p.start_i == 0 && p.end_i == 0);
  Run run{0, 0};
  for (i64 q = 0; q < panel.count; ++q) {
    if (q == 0 || !same) {
      run = run_of(p, list, panel.b, panel.i0 + q);
    }
    spans.start[q] = (std::int32_t)run.first;
    spans.end[q] = (std::int32_t)run.last;
    if (run.first < run.last) {
      spans.first = least(spans.first, run.first);
      spans.last = most(spans.last, run.last);
    }
    spans.full_first = most(spans.full_first, run.first);
    spans.full_last = least(spans.full_last, run.last);
  }
}

// Places a to b, as far as a query of the panel sees any of them. `words` is null where all see all.
struct Sight {
  i64 a, b;
  Word* words; // of place a, a + 1, ...
  Word any;    // the queries that see something here
};

//   words: room for b - a + 1; one word in front of it may be written later (`from_even`).
inline Sight see(const AttentionParams& p, const Panel& panel, const KeyList& list, const Spans& spans, i64 a, i64 b,
                 Word* words) {
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

// Gives a sight that shows everything words that say so.
inline void write_out(Sight& sight, const Panel& panel, Word* words) {
  if (sight.words == nullptr) {
    for (i64 r = 0; r < sight.b - sight.a; ++r) {
      words[r] = panel.real;
    }
    sight.words = words;
  }
}

// The same, beginning an even number of places after `first`: by one more place, which nobody sees.
inline Sight from_even(Sight sight, i64 first, const Panel& panel, Word* words) {
  if (sight.a == sight.b || (sight.a - first) % 2 == 0) {
    return sight;
  }
  write_out(sight, panel, words);
  sight.words -= 1;
  sight.words[0] = 0;
  sight.a -= 1;
  return sight;
}

// One panel of `dense` as words: the bytes of eight queries become the bits of one byte, for many keys at once.
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
