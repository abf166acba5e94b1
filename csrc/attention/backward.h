// Backward: for each panel of queries, tile by tile over the keys, five products. Probabilities P are recomputed from
// the log-sum-exp; with dO the gradient of the output, f the gate, K the dropout mask with its scale:
//   dP = dO V',  dS = P o (f K o dP - delta),  delta = rowsum(dO o out) - grad_lse,
//   dV += (f K o P)' dO,  dK += dS' Q,  dQ += dS K   (dK, dQ times the scale),  dbias += dS,  dgate ~ sum(K o P o dP).
// Each task has its keys of its heads, so that no two tasks add to the same element. Where there are too few tasks,
// keys or queries are split, and the parts of dQ, or of dK and dV, are summed in a fixed order. A task processes its
// keys in chunks that stay in the second-level cache, with their gradients, for all queries.
#pragma once

#include "forward.h"

namespace mmkernels::MMK_ISA {

// The panels of one row split of a key head.
MMK_INLINE i64 panels_of_split(const AttentionParams& p) {
  return (batches_sharing_keys(p) * group_of(p) * panels_of(p) + p.row_splits - 1) / p.row_splits;
}

// Places of one split: whole tiles, so that pairs of keys begin at even places.
MMK_INLINE i64 split_places(const AttentionParams& p) {
  return round_up((p.k_len + p.splits - 1) / p.splits, kTileKeys);
}

// Places of one chunk: whole tiles whose keys, values and gradients take half a mebibyte.
MMK_INLINE i64 chunk_places(const AttentionParams& p) {
  const i64 tiles = (1 << 19) / (kTileKeys * 8 * (pad_lanes(p.dim) + pad_lanes(p.value_dim)));
  return least(most<i64>(tiles, 1) * kTileKeys, split_places(p));
}

// Scratch of one task. Members are taken in the order of their declaration.
struct BackwardScratch : Arena {
  const AttentionParams& p;
  const bool is_dot = uses_dot(p.query.type);
  const i64 tile = kTileKeys * kPanel, dim = p.dim, value_dim = p.value_dim;
  float* scores = take<float>(tile);
  float* grads = take<float>(tile);
  // dS in float32, where `grads` is overwritten by pairs.
  float* plain_grads = is_dot && p.grad_bias.data != nullptr ? take<float>(tile) : nullptr;
  char* grad_rows = take<char>(is_dot ? tile * 2 : 0); // dS as bfloat16 [keys, lanes]
  Word* words = take<Word>(kTileKeys + 1, 1);
  Word* kept = take<Word>(kTileKeys);
  // A panel's rows in the working format.
  char* query_copy = take<char>(kPanel * row_bytes(is_dot, dim));
  char* grad_copy = take<char>(kPanel * row_bytes(is_dot, value_dim));
  char* query_zeroed = take<char>(kPanel * row_bytes(is_dot, dim));
  char* grad_zeroed = take<char>(kPanel * row_bytes(is_dot, value_dim));
  // The same transposed, and as pairs of rows.
  float* query = take<float>(depth_of(is_dot, dim) * kPanel);
  float* grad = take<float>(depth_of(is_dot, value_dim) * kPanel);
  char* query_pairs = take<char>(is_dot ? kPanel / 2 * pad_lanes(dim) * 4 : 0);
  char* grad_pairs = take<char>(is_dot ? kPanel / 2 * pad_lanes(value_dim) * 4 : 0);
  float* lse = take<float>(kPanel);
  float* delta = take<float>(kPanel);
  float* gate = take<float>(kPanel);
  float* scale = take<float>(kPanel);
  const Tile::Scratch keys = {take<char>(Tile::copy_bytes(is_dot, dim)), take<char>(Tile::pairs_bytes(is_dot, dim)),
                              take<char>(Tile::copy_bytes(is_dot, dim)), take<char>(Tile::pairs_bytes(is_dot, dim))};
  const Tile::Scratch values = {take<char>(Tile::copy_bytes(is_dot, value_dim))};
  // Of a chunk: [places, channels padded].
  const i64 places = chunk_places(p), panels = panels_of_split(p);
  float* grad_key = take<float>(p.grad_key.data != nullptr ? places * pad_lanes(dim) : 0);
  float* grad_value = take<float>(p.grad_value.data != nullptr ? places * pad_lanes(value_dim) : 0);
  // For each panel: dQ transposed, [dim, kPanel], and whether it has been written.
  float* grad_query = take<float>(p.grad_query.data != nullptr ? panels * dim * kPanel : 0);
  bool* begun = take<bool>(panels);
};

// The right operand of a product that sums over queries: rows, or pairs of rows.
struct Summed {
  const char* data;
  i64 step;
};

// One panel, prepared for the products with tiles of keys.
struct BackwardRows {
  Panel panel;
  PanelSpans spans;
  Summed query, grad;
  Rows grad_rows; // unchanged, for the non-finite path
  bool grad_finite;
  float* grad_query;
  bool* begun;
};

MMK_INLINE bool hides_anything(const AttentionParams& p) {
  return p.start.data != nullptr || p.words != nullptr || p.key_valid.data != nullptr || p.bias.data != nullptr;
}

// Loads each row's log-sum-exp in base 2 and delta; `grad` holds the rows of dO. Begins the sums of dgate.
inline void load_lse_and_delta(const Panel& panel, Rows grad, const BackwardScratch& s) {
  const AttentionParams& p = s.p;
  const Type type = s.is_dot ? Type::bf16 : Type::f32;
  const i64 first = (panel.b * p.heads + panel.h) * p.q_len + panel.i0;
  for (i64 q = 0; q < panel.lanes; ++q) {
    s.lse[q] = 0.0f;
    s.delta[q] = 0.0f;
    s.gate[q] = 0.0f;
    if (q >= panel.count) {
      continue;
    }
    const char* row = row_at(p.out, panel.b, panel.h, panel.i0 + q);
    Vec product = zero();
    for (i64 c = 0; c < p.value_dim; c += kLanes) {
      product = fma(load_as_f32(row + c * bytes_of(p.out.type), p.out.type, p.value_dim - c),
                    load_as_f32(grad.data + q * grad.stride + c * bytes_of(type), type, p.value_dim - c), product);
    }
    s.delta[q] = sum(product) - (p.grad_lse != nullptr ? p.grad_lse[first + q] : 0.0f);
    const float lse = p.lse[first + q];
    s.lse[q] = lse == -kInf ? 0.0f : lse * kLog2e;
  }
}

// Prepares a panel's rows for the products.
MMK_OUTLINE void begin_backward(BackwardRows& r, const BackwardScratch& s) {
  const AttentionParams& p = s.p;
  const Panel& panel = r.panel;
  const bool is_dot = s.is_dot;
  const auto rows_of = [&](const View& x, i64 cols, char* copy) {
    return fetch(source_of(x, panel.b, panel.h, panel.i0), panel.count, cols, is_dot, copy, !is_dot);
  };
  const Rows query = rows_of(p.query, p.dim, s.query_copy), grad = rows_of(p.grad_out, p.value_dim, s.grad_copy);
  transpose_rows(query, panel.count, depth_of(is_dot, p.dim), panel.lanes, s.query);
  transpose_rows(grad, panel.count, depth_of(is_dot, p.value_dim), panel.lanes, s.grad);
  load_lse_and_delta(panel, grad, s);

  // Non-finite rows must not reach keys that they do not see: the products use a copy with zeros in their place. dK of
  // a visible key is NaN anyway, through its scores; for dV see `add_value_grads`.
  const bool may_hide = hides_anything(p);
  const auto summed = [&](Rows rows, i64 cols, bool finite, char* zeroed, char* pairs) -> Summed {
    const Rows used = finite ? rows : zero_non_finite(rows, panel.count, cols, is_dot, zeroed);
    if (!is_dot) {
      return {used.data, used.stride};
    }
    interleave_rows(used, panel.count, cols, pairs);
    return {pairs, pad_lanes(cols) * 4};
  };
  const bool query_finite = !may_hide || all_finite(query, panel.count, p.dim, is_dot);
  r.grad_finite = !may_hide || all_finite(grad, panel.count, p.value_dim, is_dot);
  r.grad_rows = grad;
  r.query = summed(query, p.dim, query_finite, s.query_zeroed, s.query_pairs);
  r.grad = summed(grad, p.value_dim, r.grad_finite, s.grad_zeroed, s.grad_pairs);
}

// Replaces scores and dP of a tile by the products' operands: f K o P (kPairs: rows of bfloat16) and dS (kPairs: pairs
// of rows, and rows in `grad_rows`).
template <bool kPairs>
inline void differentiate(const AttentionParams& p, const Panel& panel, i64 count, float factor, const Word* words,
                          const Word* kept, const BackwardScratch& s) {
  const Vec scale = set1(factor), gate = set1(p.gate != nullptr ? p.gate[panel.h] : 1.0f);
  const i64 lanes = panel.lanes;
  const bool partly = words != nullptr || panel.count < lanes; // lanes past the last query are hidden too
  for (i64 n = 0; n < lanes; n += kLanes) {
    const Vec base = -load(s.lse + n), delta = load(s.delta + n);
    Vec gate_sum = zero();
    const auto at = [&](i64 r, Vec& weight, Vec& grad) {
      Vec w = probability(fma(load(s.scores + r * lanes + n), scale, base)), g = load(s.grads + r * lanes + n);
      const std::uint32_t bits = (std::uint32_t)((words != nullptr ? words[r] : panel.real) >> n);
      if (partly) { // before any product: the other factor may be NaN
        w = choose(bits, w, zero());
        g = choose(bits, g, zero());
      }
      Vec kept_w = w, kept_g = g;
      if (kept != nullptr) {
        const std::uint32_t keeps = (std::uint32_t)(kept[r] >> n);
        kept_w = choose(keeps, w * p.keep_scale, zero());
        kept_g = choose(keeps, g * p.keep_scale, zero());
      }
      gate_sum = fma(kept_w, g, gate_sum);
      weight = kept_w * gate;
      grad = w * fma(kept_g, gate, -delta);
      if (partly) {
        grad = choose(bits, grad, zero());
      }
      if (s.plain_grads != nullptr) {
        store(s.plain_grads + r * lanes + n, grad);
      }
    };
    if constexpr (!kPairs) {
      for (i64 r = 0; r < count; ++r) {
        Vec weight, grad;
        at(r, weight, grad);
        store(s.scores + r * lanes + n, weight);
        store(s.grads + r * lanes + n, grad);
      }
    } else {
      for (i64 r = 0; r < count; r += 2) {
        Vec weight[2], grad[2] = {zero(), zero()};
        for (i64 i = 0; i < least<i64>(2, count - r); ++i) {
          at(r + i, weight[i], grad[i]);
          std::uint16_t* rows = (std::uint16_t*)s.grad_rows + (r + i) * lanes + n;
          store_bf16(rows, grad[i]);
          // Into the first half of its float32 row: the stride of rows stays `lanes` float32.
          store_bf16((std::uint16_t*)(s.scores + (r + i) * lanes) + n, weight[i]);
        }
        store(s.grads + r / 2 * lanes + n, pair_bf16(grad[0], grad[1]));
      }
    }
    store(s.gate + n, load(s.gate + n) + gate_sum);
  }
}

// dbias += dS [places, lanes], summed over the dims that the bias broadcasts.
inline void add_bias_grads(const AttentionParams& p, const Panel& panel, const KeyList& list, i64 split, i64 a,
                           i64 count, const float* grads) {
  const View& x = p.grad_bias;
  float* base = (float*)x.data + split * p.grad_bias_split + panel.b * x.b + panel.h * x.h + panel.i0 * x.l;
  const i64 lanes = panel.lanes;
  if (x.l == 0 || x.d == 0) {
    for (i64 r = 0; r < count; ++r) {
      float* to = base + key_at(list, a + r) * x.d;
      for (i64 q = 0; q < panel.count; ++q) {
        to[q * x.l] += grads[r * lanes + q];
      }
    }
    return;
  }
  View to = x;
  to.data = (char*)base;
  each_transposed_block(panel, list, a, count, grads, to, [](float* at, Vec block, i64 n) {
    store_part(at, load_part(at, n) + block, n);
    __builtin_prefetch(at + kTileKeys, 1);
  });
}

inline void add_value_grads(const AttentionParams& p, const BackwardRows& rows, const VisibleKeys& visible,
                            const BackwardScratch& s, float* to) {
  const bool is_dot = uses_dot(p.query.type);
  const Panel& panel = rows.panel;
  const i64 n = visible.b - visible.a, padded = pad_lanes(p.value_dim);
  gemm(is_dot, {(const char*)s.scores, panel.lanes * 4, 4}, rows.grad.data, rows.grad.step, to, padded, n,
       padded / kLanes, is_dot ? (panel.count + 1) / 2 : panel.count, true);
  if (rows.grad_finite) {
    return;
  }
  each_non_finite(rows.grad_rows, panel.count, p.value_dim, is_dot, [&](i64 q, i64 c, float x) {
    for (i64 r = 0; r < n; ++r) {
      if (visible.words == nullptr || (visible.words[r] >> q & 1)) {
        to[r * padded + c] += x;
      }
    }
  });
}

inline void add_query_grads(const AttentionParams& p, BackwardRows& rows, Tile& keys, const VisibleKeys& visible,
                            const BackwardScratch& s) {
  const bool is_dot = keys.dot();
  const i64 n = visible.b - visible.a, lanes = rows.panel.lanes;
  const Operand columns = keys.is_safe(visible) ? keys.columns_from(visible.a) : keys.zeroed_columns_from(visible.a, n);
  gemm(is_dot, columns, s.grads, lanes * 4, rows.grad_query, lanes, p.dim, lanes / kLanes, is_dot ? (n + 1) / 2 : n,
       *rows.begun);
  *rows.begun = true;
}

// One panel against the places [first, last) of a chunk.
inline void backward_panel(const AttentionParams& p, const KeyList& list, BackwardRows& rows, Tile& keys, Tile& values,
                           i64 split, i64 first, i64 last, const BackwardScratch& s) {
  const bool is_dot = keys.dot();
  const Panel& panel = rows.panel;
  const i64 lanes = panel.lanes, key_cols = pad_lanes(p.dim), value_cols = pad_lanes(p.value_dim);
  const bool of_scores = p.grad_query.data != nullptr || p.grad_key.data != nullptr || p.grad_bias.data != nullptr ||
                         p.gate_rows != nullptr;
  for (i64 a = first; a < last; a += kTileKeys) {
    const i64 b = least(a + kTileKeys, last);
    VisibleKeys visible = find_visible(p, panel, list, rows.spans, a, b, s.words);
    if (is_dot) {
      visible = align_to_pairs(visible, a, panel, s.words);
    }
    const i64 n = visible.b - visible.a;
    if (n == 0) {
      continue;
    }
    keys.move(a, b - a);
    values.move(a, b - a);
    const float factor = score_tile(p, panel, list, s.query, keys, visible, s.scores, s.words);
    if (of_scores) {
      multiply_rows(is_dot, values.rows_from(visible.a), s.grad, lanes, n, depth_of(is_dot, p.value_dim), s.grads);
    } else {
      std::memset(s.grads, 0, n * lanes * 4);
    }
    const Word* kept = kept_words(p, panel, list, visible, s.kept);
    float* plain = p.grad_bias.data == nullptr ? nullptr : (is_dot ? s.plain_grads : s.grads);
    with_pairs(is_dot, [&](auto pairs) { differentiate<pairs()>(p, panel, n, factor, visible.words, kept, s); });
    if (plain != nullptr) {
      add_bias_grads(p, panel, list, split, visible.a, n, plain);
    }
    if (p.grad_value.data != nullptr) {
      add_value_grads(p, rows, visible, s, s.grad_value + (visible.a - first) * value_cols);
    }
    if (p.grad_key.data != nullptr) {
      const Operand left = is_dot ? Operand{s.grad_rows, lanes * 2, 4} : Operand{(const char*)s.grads, lanes * 4, 4};
      gemm(is_dot, left, rows.query.data, rows.query.step, s.grad_key + (visible.a - first) * key_cols, key_cols, n,
           key_cols / kLanes, is_dot ? (panel.count + 1) / 2 : panel.count, true);
    }
    if (p.grad_query.data != nullptr) {
      add_query_grads(p, rows, keys, visible, s);
    }
  }
}

// Writes dQ of all panels.
inline void write_query_grads(const AttentionParams& p, i64 kv, i64 first, i64 count, i64 split,
                              const BackwardScratch& s) {
  View to = p.grad_query;
  if (p.splits > 1) {
    const i64 of_head = p.q_len * p.dim, of_batch = p.heads * of_head;
    to = {(char*)(p.query_parts + split * p.batch * of_batch), Type::f32, of_batch, of_head, p.dim, 1};
  }
  for (i64 q = 0; q < kPanel; ++q) {
    s.scale[q] = p.scale;
  }
  for (i64 i = 0; i < count; ++i) {
    const Panel panel = panel_at(p, kv, first + i);
    float* sums = s.grad_query + i * p.dim * kPanel;
    if (!s.begun[i]) {
      std::memset(sums, 0, p.dim * panel.lanes * 4);
    }
    write_rows(sums, p.dim, s.scale, to, panel);
  }
}

// All panels of a row split, from `first_panel` on, against the places [first, last) of a chunk.
inline void backward_chunk(const BackwardScratch& s, const KeyList& list, i64 kv, i64 first_panel, i64 panels,
                           Tile& keys, Tile& values, i64 split, i64 first, i64 last) {
  const AttentionParams& p = s.p;
  if (p.grad_key.data != nullptr) {
    std::memset(s.grad_key, 0, (last - first) * pad_lanes(p.dim) * 4);
  }
  if (p.grad_value.data != nullptr) {
    std::memset(s.grad_value, 0, (last - first) * pad_lanes(p.value_dim) * 4);
  }
  for (i64 i = 0; i < panels; ++i) {
    BackwardRows rows;
    rows.panel = panel_at(p, kv, first_panel + i);
    rows.grad_query = s.grad_query + i * p.dim * kPanel;
    rows.begun = s.begun + i;
    const Panel& panel = rows.panel;
    spans_of_panel(p, panel, list, rows.spans);
    if (rows.spans.first >= last || rows.spans.last <= first) {
      continue;
    }
    begin_backward(rows, s);
    backward_panel(p, list, rows, keys, values, split, first, last, s);
    if (p.gate_rows != nullptr) {
      float* sums = p.gate_rows + ((split * p.batch + panel.b) * p.heads + panel.h) * p.q_len + panel.i0;
      for (i64 q = 0; q < panel.count; ++q) {
        sums[q] += s.gate[q];
      }
    }
  }
}

inline void backward(const AttentionParams& p, i64 kv, i64 row_split, i64 split, char* memory) {
  const BackwardScratch s{{memory}, p};
  const KeyList list = list_of(p, kv);
  const i64 begin = least(split * split_places(p), list.count), end = least(begin + split_places(p), list.count);
  const i64 first_panel = row_split * s.panels;
  const i64 panels = least(s.panels, batches_sharing_keys(p) * group_of(p) * panels_of(p) - first_panel);
  if (panels <= 0) {
    return;
  }
  View grad_key = p.grad_key, grad_value = p.grad_value;
  if (p.row_splits > 1) {
    grad_key.data += grad_key.data != nullptr ? row_split * p.key_part * 4 : 0;
    grad_value.data += grad_value.data != nullptr ? row_split * p.value_part * 4 : 0;
  }
  Tile keys(p, p.key, list, kv, p.dim, s.keys);
  Tile values(p, p.value, list, kv, p.value_dim, s.values);
  std::memset(s.begun, 0, panels * sizeof(bool));
  for (i64 first = begin; first < end; first += s.places) {
    const i64 last = least(first + s.places, end);
    backward_chunk(s, list, kv, first_panel, panels, keys, values, split, first, last);
    if (p.grad_key.data != nullptr) {
      write_key_rows(s.grad_key, p.dim, p.scale, grad_key, list, kv, p.key_heads, first, last - first);
    }
    if (p.grad_value.data != nullptr) {
      write_key_rows(s.grad_value, p.value_dim, 1.0f, grad_value, list, kv, p.key_heads, first, last - first);
    }
  }
  if (p.grad_query.data != nullptr) {
    write_query_grads(p, kv, first_panel, panels, split, s);
  }
}

// Rows [begin, end) of dQ [B, Hq, Lq]: the sum over the splits, in their order.
inline void backward_merge(const AttentionParams& p, i64 begin, i64 end) {
  const View grad = p.grad_query;
  const i64 rows = p.batch * p.heads * p.q_len;
  for (i64 r = begin; r < end; ++r) {
    char* to = row_at(grad, r / (p.heads * p.q_len), r / p.q_len % p.heads, r % p.q_len);
    for (i64 c = 0; c < p.dim; c += kLanes) {
      Vec total = zero();
      for (i64 s = 0; s < p.splits; ++s) {
        total += load_part(p.query_parts + (s * rows + r) * p.dim + c, p.dim - c);
      }
      store_columns(grad, to, c, p.dim, total);
    }
  }
}

} // namespace mmkernels::MMK_ISA
