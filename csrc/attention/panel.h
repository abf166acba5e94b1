// Panels of queries: which queries one holds, which span of keys each sees, and their rows of a tensor.
#pragma once

#include <type_traits>

#include "tensor_rows.h"

namespace mmkernels::MMK_ISA {

// A bit for each query of a panel.
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
  if (p.start.data == nullptr) {
    return {0, list.count};
  }
  const i64 start = p.start.data[b * p.start.b + i * p.start.i], end = p.end.data[b * p.end.b + i * p.end.i];
  const Span span{place_of(list, start), place_of(list, end)};
  return span.first < span.last ? span : Span{0, 0};
}

// How many queries from `i` on have the same span, at most a panel of them.
inline i64 count_same_span(const AttentionParams& p, const KeyList& list, i64 b, i64 i) {
  const Span span = span_of(p, list, b, i);
  i64 count = 1;
  for (; i + count < p.q_len && count < kPanel; ++count) {
    const Span next = span_of(p, list, b, i + count);
    if (next.first != span.first || next.last != span.last) {
      break;
    }
  }
  return count;
}

// Cuts the queries of one batch entry into panels: a query joins the panel before it unless two panels are less work.
// The work of a panel: the keys that any of its queries sees, times its vectors of queries plus one for the panel's
// cost.
inline i64 plan_panels(const AttentionParams& p, i64 b, PanelRange* ranges) {
  const KeyList all{nullptr, p.k_len};
  const auto work = [](i64 queries, i64 keys) { return ((queries + kLanes - 1) / kLanes + 1) * keys; };
  const auto length = [](const Span& r) { return r.last - r.first; };
  i64 panels = 0, visible = 0; // visible: keys that the last panel sees, all of them in `hull`
  Span hull{0, 0};
  for (i64 i = 0, taken = 0; i < p.q_len; i += taken) {
    const Span span = span_of(p, all, b, i);
    const i64 same = count_same_span(p, all, b, i);
    PanelRange* last = panels > 0 ? ranges + panels - 1 : nullptr;
    taken = last != nullptr ? least<i64>(same, kPanel - last->count) : 0;
    const i64 shared = most<i64>(0, least(hull.last, span.last) - most(hull.first, span.first));
    const i64 together = visible + length(span) - least(shared, visible);
    if (taken > 0 && work(last->count + taken, together) <= work(last->count, visible) + work(taken, length(span))) {
      last->count += (std::int32_t)taken;
      visible = together;
      if (length(span) > 0) {
        hull = length(hull) == 0 ? span : Span{least(hull.first, span.first), most(hull.last, span.last)};
      }
    } else {
      taken = same;
      ranges[panels++] = {(std::int32_t)i, (std::int32_t)taken};
      hull = span;
      visible = length(span);
    }
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
  const bool same = p.start.i == 0 && p.end.i == 0;
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

// Prefetches a panel's rows of a tensor: they lie so far apart that the hardware does not.
template <bool kToWrite> MMK_INLINE void prefetch_rows(const View& x, const Panel& panel, i64 cols) {
  const i64 size = bytes_of(x.type);
  const char* base = row_at(x, panel.b, panel.h, panel.i0);
  for (i64 r = 0; r < panel.count && x.d == 1; ++r) {
    for (i64 byte = 0; byte < cols * size; byte += 64) {
      __builtin_prefetch(base + r * x.l * size + byte, kToWrite ? 1 : 0, 2);
    }
  }
}

// Writes [channels, lanes] to a panel's rows of a tensor, each lane times its factor.
inline void write_rows(const float* tile, i64 channels, const float* factor, const View x, const Panel& panel) {
  char* base = row_at(x, panel.b, panel.h, panel.i0);
  for (i64 q = 0; q < panel.count; q += kLanes) {
    const Vec scale = load(factor + q);
    for (i64 c = 0; c < channels; c += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = c + i < channels ? load(tile + (c + i) * panel.lanes + q) * scale : zero();
      }
      transpose(block);
      for (i64 i = 0; i < least<i64>(kLanes, panel.count - q); ++i) {
        store_columns(x, base + (q + i) * x.l * bytes_of(x.type), c, channels, block[i]);
      }
    }
  }
}

} // namespace mmkernels::MMK_ISA
