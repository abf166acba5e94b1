// Attention without values: the rows' log-sum-exp first, then the probabilities, summed by columns (attention_received)
// or written (attention_weights).
#pragma once

#include "decode.h"

namespace mmkernels::MMK_ISA {

inline i64 scores_scratch(const AttentionParams& p) {
  return ForwardScratch{{nullptr}, p, false}.used + panel_bytes(p, 0);
}

// Panel `index` of kv, and its passes over the keys.
struct ScoresPanel {
  const AttentionParams& p;
  ForwardScratch scratch;
  KeyList list;
  Tile keys;
  RowState s;

  ScoresPanel(const AttentionParams& p, i64 kv, i64 index, char* memory)
      : p(p), scratch{{memory}, p, false}, list(list_of(p, kv)), keys(p, p.key, list, kv, p.dim, {scratch.key_copy}) {
    begin_rows(p, list, kv, index, s, scratch);
  }

  // Calls f(visible, factor, scores) for each tile of the scores of places [first, last).
  template <typename F> void each_tile(i64 first, i64 last, const F& f) {
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
};

inline void scores_lse(const AttentionParams& p, i64 kv, i64 index, char* memory) {
  ScoresPanel panel(p, kv, index, memory);
  RowState& s = panel.s;
  panel.each_tile(0, panel.list.count, [&](const VisibleKeys& visible, float factor, float* scores) {
    const i64 n = visible.b - visible.a, lanes = s.panel.lanes;
    s.sees |= visible.any;
    update_maximum(scores, n, lanes, is_natural(p), factor, s.maximum, s.total, panel.scratch.rescale);
    exponentiate<false>(scores, n, lanes, is_natural(p), factor, s.maximum, s.total, nullptr, 1.0f);
  });
  write_lse(p, s);
}

// Replaces logarithms by probabilities, 0 where hidden, each query's times its weight.
inline void normalise(const Panel& panel, const VisibleKeys& visible, float factor, const float* lse,
                      const float* weights_of_queries, float* scores) {
  const i64 lanes = panel.lanes;
  for (i64 q = 0; q < lanes; q += kLanes) {
    const Vec base = -load(lse + q), count = load(weights_of_queries + q);
    for (i64 r = 0; r < visible.b - visible.a; ++r) {
      float* at = scores + r * lanes + q;
      Vec w = probability(fma(load(at), set1(factor), base)) * count;
      const Word bits = visible.words != nullptr ? visible.words[r] : panel.real;
      store(at, choose((std::uint32_t)(bits >> q), w, zero()));
    }
  }
}

// Loads the panel's log-sum-exp in base 2 and each query's weight (1 where none are given, 0 past the last query).
inline void load_lse_and_weights(const AttentionParams& p, const Panel& panel, float* lse, float* weights_of_queries) {
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

// Calls f(panel, visible, probabilities) for each tile of the places [first, last) of panel `index` of kv.
template <typename F>
void each_probability_tile(const AttentionParams& p, i64 kv, i64 index, i64 first, i64 last, char* memory, const F& f) {
  ScoresPanel scores_panel(p, kv, index, memory);
  const RowState& s = scores_panel.s;
  load_lse_and_weights(p, s.panel, s.maximum, s.total);
  scores_panel.each_tile(first, last, [&](const VisibleKeys& visible, float factor, float* scores) {
    normalise(s.panel, visible, factor, s.maximum, s.total, scores);
    f(s.panel, visible, scores);
  });
}

// Split `split` of the keys, for query head `head` of those that attend to kv.
inline void received(const AttentionParams& p, i64 kv, i64 head, i64 split, char* memory) {
  const KeyList list = list_of(p, kv);
  const i64 share = (list.count + p.splits - 1) / p.splits, first = split * share;
  const i64 last = least(first + share, list.count), panels = panels_of(p);
  const auto add_columns = [&](const Panel& panel, const VisibleKeys& visible, const float* probabilities) {
    float* to = p.received + (panel.b * p.heads + panel.h) * p.k_len;
    for (i64 r = 0; r < visible.b - visible.a; ++r) {
      Vec total = load(probabilities + r * panel.lanes);
      for (i64 q = kLanes; q < panel.lanes; q += kLanes) {
        total += load(probabilities + r * panel.lanes + q);
      }
      to[key_at(list, visible.a + r)] += sum(total);
    }
  };
  for (i64 number = 0; number < panels; ++number) {
    each_probability_tile(p, kv, head * panels + number, first, last, memory, add_columns);
  }
}

inline void weights(const AttentionParams& p, i64 kv, i64 index, char* memory) {
  const KeyList list = list_of(p, kv);
  const auto write = [&](const Panel& panel, const VisibleKeys& visible, const float* probabilities) {
    float* base = p.weights + ((panel.b * p.heads + panel.h) * p.q_len + panel.i0) * p.k_len;
    const View to{(char*)base, Type::f32, 0, 0, p.k_len, 1};
    each_transposed_block(panel, list, visible.a, visible.b - visible.a, probabilities, to,
                          [](float* at, Vec block, i64 n) { store_part(at, block, n); });
  };
  each_probability_tile(p, kv, index, 0, list.count, memory, write);
}

// Few queries, as in decode.h: rows of logarithms are written where their probabilities belong, and replaced there once
// the whole row is known.

inline bool sees_place(const AttentionParams& p, const KeyList& list, const DecodeRow& row, i64 place) {
  const i64 j = key_at(list, place);
  if (place < row.span.first || place >= row.span.last) {
    return false;
  }
  if (p.dense != nullptr && p.dense[row.b * p.dense_b + row.h * p.dense_h + row.i * p.dense_i + j * p.dense_j] == 0) {
    return false;
  }
  if (p.key_valid.data != nullptr && p.key_valid.data[row.b * p.key_valid.b + j * p.key_valid.i] == 0) {
    return false;
  }
  const View& bias = p.bias;
  return bias.data == nullptr ||
         load_one(row_at(bias, row.b, row.h, row.i) + j * bias.d * bytes_of(bias.type), bias.type) != -kInf;
}

// Writes one row's logarithms of places [a, a + n) at their keys; keys between them that are in no list are hidden.
inline void write_logarithms(const KeyList& list, i64 a, i64 n, const float* scores, float* to) {
  if (list.index == nullptr) {
    std::memcpy(to + a, scores, n * 4);
    return;
  }
  for (i64 j = 0; j < n; ++j) {
    const i64 key = key_at(list, a + j);
    for (i64 hidden = a + j == 0 ? key : key_at(list, a + j - 1) + 1; hidden < key; ++hidden) {
      to[hidden] = -kInf;
    }
    to[key] = scores[j];
  }
}

// Calls f(vector) for each vector of from[0, n), the last one filled with -inf, and stores what f returns.
template <typename F> MMK_INLINE void each_vector(float* from, i64 n, const F& f) {
  i64 j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    store(from + j, f(load(from + j)));
  }
  if (j < n) {
    float rest[kLanes];
    store(rest, set1(-kInf));
    std::memcpy(rest, from + j, (n - j) * 4);
    store_part(from + j, f(load(rest)), n - j);
  }
}

// Replaces the logarithms at the keys of places [hull.first, hull.last) by probabilities times the query's weight.
inline void normalise_row(const AttentionParams& p, const KeyList& list, const DecodeRow& row, Span hull, float* to) {
  const View& x = p.query_weights;
  const float weight = x.data == nullptr ? 1.0f : ((const float*)x.data)[row.b * x.b + row.h * x.h + row.i * x.l];
  const i64 first = key_at(list, hull.first), n = key_at(list, hull.last - 1) + 1 - first;
  const Vec base = set1(row.maximum == -kInf ? 0.0f : row.maximum);
  Vec sums = zero();
  each_vector(to + first, n, [&](Vec logarithms) {
    const Vec w = exp2(logarithms - base);
    sums += w;
    return w;
  });
  const float total = sum(sums);
  if (total > 0.0f && total < kInf) {
    const Vec factor = set1(weight / total);
    each_vector(to + first, n, [&](Vec w) { return w * factor; });
  } else if (row.sees) { // a score is NaN or inf, or all are -inf
    std::memset(to + first, 0, n * 4);
    for (i64 place = hull.first; place < hull.last; ++place) {
      to[key_at(list, place)] = sees_place(p, list, row, place) ? __builtin_nanf("") : 0.0f;
    }
  }
}

// Rows [first, first + count) of kv, of `weights`, which has zeros before.
inline void few_weights(const AttentionParams& p, i64 kv, i64 first, i64 count, char* memory) {
  const DecodeScratch s{{memory}, p};
  const KeyList list = list_of(p, kv);
  const Span hull = begin_decode(s, list, kv, first, count);
  const auto result = [&](const DecodeRow& row) {
    return p.weights + ((row.b * p.heads + row.h) * p.q_len + row.i) * p.k_len;
  };
  const i64 tile = decode_keys(p);
  for (i64 a = hull.first; a < hull.last; a += tile) {
    const i64 n = least(tile, hull.last - a);
    score_keys(s, decode_key_rows(s, list, kv, a, n), n, count);
    for (i64 r = 0; r < count; ++r) {
      DecodeRow& row = s.rows[r];
      float* scores = s.scores + r * kDecodeKeys;
      mask_row(p, list, row, a, a + n, scores);
      Vec maximum = set1(row.maximum);
      for (i64 j = 0; j < pad_lanes(n); j += kLanes) {
        maximum = max_skip_nan(maximum, load(scores + j));
      }
      row.maximum = largest(maximum);
      write_logarithms(list, a, n, scores, result(row));
    }
  }
  for (i64 r = 0; r < count && hull.first < hull.last; ++r) {
    normalise_row(p, list, s.rows[r], hull, result(s.rows[r]));
  }
}

} // namespace mmkernels::MMK_ISA
