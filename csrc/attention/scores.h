// Attention without values: the rows' log-sum-exp first, then the probabilities, summed by columns (attention_received)
// or written (attention_weights).
#pragma once

#include "forward.h"

namespace mmkernels {
namespace MMK_ISA {

inline i64 scores_scratch(const AttentionParams& p) {
  Arena arena{nullptr};
  take_scratch(p, arena, false);
  return arena.used + panel_bytes(p, 0);
}

// Calls f(visible, factor, scores) for each tile of one panel's scores of places [first, last).
template <typename F>
void each_score_tile(const AttentionParams& p, const KeyList& list, const RowState& s, i64 kv, i64 first, i64 last,
                     const ForwardScratch& scratch, const F& f) {
  Tile keys(p, p.key, list, kv, p.dim, scratch.key_copy, nullptr);
  first = most(first, s.spans.first);
  last = least(last, s.spans.last);
  for (i64 a = first; a < last; a += kTileKeys) {
    const i64 b = least(a + kTileKeys, last);
    VisibleKeys visible = find_visible(p, s.panel, list, s.spans, a, b, scratch.words);
    if (visible.a < visible.b) {
      keys.move(a, b - a);
      const float factor = score_tile(p, s.panel, list, s.query, keys, visible, scratch.scores, scratch.words);
      f(visible, factor, scratch.scores);
    }
  }
}

inline void scores_lse(const AttentionParams& p, i64 kv, i64 panel, char* memory) {
  Arena arena{memory};
  const ForwardScratch scratch = take_scratch(p, arena, false);
  const KeyList list = list_of(p, kv);
  RowState s;
  begin_rows(p, list, kv, panel, s, arena, scratch.row_copy, 0);
  const i64 lanes = s.panel.lanes;
  each_score_tile(p, list, s, kv, 0, list.count, scratch, [&](const VisibleKeys& visible, float factor, float* scores) {
    const i64 n = visible.b - visible.a;
    s.sees |= visible.any;
    update_maximum(scores, n, lanes, is_natural(p), factor, s.maximum, s.total, scratch.rescale);
    exponentiate<false>(scores, n, lanes, is_natural(p), factor, s.maximum, s.total, nullptr, 1.0f);
  });
  write_lse(p, s);
}

// Replaces logarithms by probabilities, 0 where hidden, each query's times its weight.
inline void normalise(const RowState& s, const VisibleKeys& visible, float factor, const float* lse,
                      const float* weights_of_queries, float* scores) {
  const i64 lanes = s.panel.lanes;
  for (i64 q = 0; q < lanes; q += kLanes) {
    const Vec base = -load(lse + q), count = load(weights_of_queries + q);
    for (i64 r = 0; r < visible.b - visible.a; ++r) {
      float* at = scores + r * lanes + q;
      Vec w = probability(fma(load(at), set1(factor), base)) * count;
      const Word bits = visible.words != nullptr ? visible.words[r] : s.panel.real;
      w = choose((std::uint32_t)(bits >> q), w, zero());
      store(at, w);
    }
  }
}

// Loads the panel's log-sum-exp in base 2 and each query's weight (1 where none are given, 0 past the last query).
inline void load_lse_and_weights(const AttentionParams& p, const RowState& s, float* lse, float* weights_of_queries) {
  const Panel& panel = s.panel;
  const float* from = p.lse + (panel.b * p.heads + panel.h) * p.q_len + panel.i0;
  const View& x = p.query_weights;
  for (i64 q = 0; q < panel.lanes; ++q) {
    const bool real = q < panel.count;
    lse[q] = real && from[q] != -kInf ? from[q] * kLog2e : 0.0f;
    weights_of_queries[q] = real ? 1.0f : 0.0f;
    if (real && x.data != nullptr) {
      weights_of_queries[q] = ((const float*)x.data)[panel.b * x.b + panel.h * x.h + (panel.i0 + q) * x.l];
    }
  }
}

// Split `split` of the keys, for query head `head` of those that attend to kv.
inline void received(const AttentionParams& p, i64 kv, i64 head, i64 split, char* memory) {
  const KeyList list = list_of(p, kv);
  const i64 share = (list.count + p.splits - 1) / p.splits, first = split * share;
  for (i64 number = 0; number < panels_of(p); ++number) {
    Arena arena{memory};
    const ForwardScratch scratch = take_scratch(p, arena, false);
    RowState s;
    begin_rows(p, list, kv, head * panels_of(p) + number, s, arena, scratch.row_copy, 0);
    load_lse_and_weights(p, s, s.maximum, s.total);
    const i64 lanes = s.panel.lanes;
    float* to = p.received + (s.panel.b * p.heads + s.panel.h) * p.k_len;
    each_score_tile(p, list, s, kv, first, least(first + share, list.count), scratch,
                    [&](const VisibleKeys& visible, float factor, float* scores) {
                      normalise(s, visible, factor, s.maximum, s.total, scores);
                      for (i64 r = 0; r < visible.b - visible.a; ++r) {
                        Vec total = load(scores + r * lanes);
                        for (i64 q = kLanes; q < lanes; q += kLanes) {
                          total += load(scores + r * lanes + q);
                        }
                        to[key_at(list, visible.a + r)] += sum(total);
                      }
                    });
  }
}

inline void weights(const AttentionParams& p, i64 kv, i64 panel, char* memory) {
  Arena arena{memory};
  const ForwardScratch scratch = take_scratch(p, arena, false);
  const KeyList list = list_of(p, kv);
  RowState s;
  begin_rows(p, list, kv, panel, s, arena, scratch.row_copy, 0);
  load_lse_and_weights(p, s, s.maximum, s.total);
  float* base = p.weights + ((s.panel.b * p.heads + s.panel.h) * p.q_len + s.panel.i0) * p.k_len;
  each_score_tile(p, list, s, kv, 0, list.count, scratch, [&](const VisibleKeys& visible, float factor, float* scores) {
    normalise(s, visible, factor, s.maximum, s.total, scores);
    const View to{(char*)base, Type::f32, 0, 0, p.k_len, 1};
    each_transposed_block(s.panel, list, visible.a, visible.b - visible.a, scores, to,
                          [](float* at, Vec block, i64 n) { store_part(at, block, n); });
  });
}

} // namespace MMK_ISA
} // namespace mmkernels
