// Forward: online softmax over tiles of keys (Milakov and Gimelshein, 2018). Several panels of queries use a tile while
// it is in cache. Exponentials are of base 2. A row's maximum is updated only when a score exceeds it by more than 8 in
// base 2, so that partial results are rarely rescaled.
#pragma once

#include "tile.h"

namespace mmkernels::MMK_ISA {

constexpr float kSlack = 8.0f; // log2 of the largest weight: by so much a score may exceed the stored maximum

// The running softmax of one panel: `maximum` and `total`, the sum of exponentials, of each lane.
struct RowState {
  Panel panel;
  PanelSpans spans;
  float* query; // transposed, [depth, lanes]
  float* out;   // transposed, [value_dim, lanes]
  float *maximum, *total;
  Word sees;
  bool begun;
};

// Raises stored maxima that the largest score exceeds by more than the slack. unit: log2 of the base of the scores.
// `rescale` gets what earlier sums must be multiplied by. Returns whether any of it is not 1.
MMK_INLINE bool raise_maximum(Vec largest, float unit, float* maximum, float* total, float* rescale) {
  const Vec old = load(maximum);
  const IVec grows = largest > old + kSlack;
  if (bits_of(grows) == 0) {
    store(rescale, set1(1.0f));
    return false;
  }
  const Vec now = grows != 0 ? largest : old;
  const Vec by = grows != 0 ? exp2((old - now) * unit) : set1(1.0f);
  store(maximum, now);
  store(total, load(total) * by);
  store(rescale, by);
  return true;
}

// Updates the rows' maxima for a tile of scores, which are natural logarithms, or `scores * factor` in base 2.
// `rescale` gets what earlier sums must be multiplied by. Returns whether any of it is not 1.
inline bool update_maximum(const float* scores, i64 count, i64 lanes, bool natural, float factor, float* maximum,
                           float* total, float* rescale) {
  const float unit = natural ? kLog2e : 1.0f;
  factor = natural ? 1.0f : factor;
  bool moved = false;
  for (i64 n = 0; n < lanes; n += kLanes) {
    Vec maxima[4];
    for (auto& x : maxima) {
      x = set1(-kInf);
    }
    const float* at = scores + n;
    i64 r = 0;
    for (; r + 4 <= count; r += 4) {
      for (int i = 0; i < 4; ++i) {
        maxima[i] = max_skip_nan(maxima[i], load(at + (r + i) * lanes));
      }
    }
    for (; r < count; ++r) {
      maxima[0] = max_skip_nan(maxima[0], load(at + r * lanes));
    }
    for (int i = 1; i < 4; ++i) {
      maxima[0] = max_skip_nan(maxima[0], maxima[i]);
    }
    moved |= raise_maximum(maxima[0] * factor, unit, maximum + n, total + n, rescale + n);
  }
  return moved;
}

// Replaces scores by weights, exponentials relative to `maximum` (kPairs: bfloat16 pairs of neighbouring rows), and
// adds their sums to `total`.
template <bool kPairs, bool kNatural>
MMK_INLINE void exponentiate(float* scores, i64 count, i64 lanes, float factor, const float* maximum, float* total,
                             const Word* kept, float keep_scale) {
  const Vec scale = set1(factor);
  for (i64 n = 0; n < lanes; n += kLanes) {
    const Vec point = load(maximum + n);
    const Vec base = point == set1(-kInf) ? zero() : -point;
    Vec sum[2] = {zero(), zero()};
    float* at = scores + n;
    i64 r = 0;
    const auto weight = [&](i64 row, Vec& into) {
      const Vec x = load(at + row * lanes);
      Vec w = exp2(kNatural ? (x + base) * kLog2e : fma(x, scale, base));
      into += w;
      if (kept != nullptr) {
        w = choose((std::uint32_t)(kept[row] >> n), w * keep_scale, zero());
      }
      return w;
    };
    for (; r + 2 <= count; r += 2) {
      const Vec a = weight(r, sum[0]), b = weight(r + 1, sum[1]);
      if constexpr (kPairs) {
        store(at + r / 2 * lanes, pair_bf16(a, b));
      } else {
        store(at + r * lanes, a);
        store(at + (r + 1) * lanes, b);
      }
    }
    if (r < count) {
      const Vec a = weight(r, sum[0]);
      store(at + (kPairs ? r / 2 : r) * lanes, kPairs ? pair_bf16(a, zero()) : a);
    }
    store(total + n, load(total + n) + (sum[0] + sum[1]));
  }
}

template <bool kPairs>
MMK_INLINE void exponentiate(float* scores, i64 count, i64 lanes, bool natural, float factor, const float* maximum,
                             float* total, const Word* kept, float keep_scale) {
  if (natural) {
    exponentiate<kPairs, true>(scores, count, lanes, factor, maximum, total, kept, keep_scale);
  } else {
    exponentiate<kPairs, false>(scores, count, lanes, factor, maximum, total, kept, keep_scale);
  }
}

// Scratch of one task, beside its rows' state. Members are taken in the order of their declaration.
struct ForwardScratch : Arena {
  const AttentionParams& p;
  const bool with_values;
  const bool is_dot = uses_dot(p.query.type);
  float* scores = take<float>(kTileKeys * kPanel);
  float* rescale = take<float>(kPanel);
  Word* words = take<Word>(kTileKeys + 1, 1);
  Word* kept = take<Word>(kTileKeys);
  char* row_copy = take<char>(kPanel * row_bytes(is_dot, p.dim));
  char* key_copy = take<char>(Tile::copy_bytes(is_dot, p.dim));
  const i64 value_copy = with_values ? Tile::copy_bytes(is_dot, p.value_dim) : 0;
  const i64 value_pairs = with_values ? Tile::pairs_bytes(is_dot, p.value_dim) : 0;
  const Tile::Scratch values = {take<char>(value_copy), take<char>(value_pairs), take<char>(value_copy),
                                take<char>(value_pairs)};
};

// Adds the tile's weighted values to the output. On the non-finite path a value that is not finite is multiplied as 0,
// and then added to the rows that see it.
inline void add_values(const RowState& s, Tile& values, const VisibleKeys& visible, const float* weights,
                       i64 value_dim) {
  const i64 n = visible.b - visible.a, lanes = s.panel.lanes;
  const bool is_dot = values.dot(), safe = values.is_safe(visible);
  const Operand columns = safe ? values.columns_from(visible.a) : values.zeroed_columns_from(visible.a, n);
  gemm(is_dot, columns, weights, lanes * 4, s.out, lanes, value_dim, lanes / kLanes, is_dot ? (n + 1) / 2 : n, s.begun);
  if (safe) {
    return;
  }
  each_non_finite(values.rows_from(visible.a), n, value_dim, is_dot, [&](i64 r, i64 c, float x) {
    for (i64 q = 0; q < s.panel.count; ++q) {
      if (visible.words == nullptr || (visible.words[r] >> q & 1)) {
        s.out[c * lanes + q] += x;
      }
    }
  });
}

// Computes the scores of the visible places, and returns the factor that makes them logarithms in base 2. Without it
// they are natural logarithms where `is_natural` is true.
inline float score_tile(const AttentionParams& p, const Panel& panel, const KeyList& list, const float* query,
                        Tile& keys, VisibleKeys& visible, float* scores, Word* words) {
  const i64 n = visible.b - visible.a;
  multiply_rows(keys.dot(), keys.rows_from(visible.a), query, panel.lanes, n, depth_of(keys.dot(), p.dim), scores);
  float factor = p.scale * kLog2e;
  if (p.bias.data != nullptr) {
    factor = kLog2e;
    add_bias(p, panel, list, visible, scores, words);
  } else if (!(p.scale > 0.0f)) { // a factor that is not positive would change which score is the largest
    factor = kLog2e;
    for (i64 i = 0; i < n * panel.lanes; i += kLanes) {
      store(scores + i, load(scores + i) * p.scale);
    }
  }
  if (visible.words != nullptr) {
    hide(panel, visible.words, n, scores);
  }
  return factor;
}

inline void attend(const AttentionParams& p, const KeyList& list, RowState& s, Tile& keys, Tile& values,
                   VisibleKeys visible, const ForwardScratch& scratch) {
  const i64 n = visible.b - visible.a, lanes = s.panel.lanes;
  const float factor = score_tile(p, s.panel, list, s.query, keys, visible, scratch.scores, scratch.words);
  const bool natural = is_natural(p);
  s.sees |= visible.any;
  if (update_maximum(scratch.scores, n, lanes, natural, factor, s.maximum, s.total, scratch.rescale) && s.begun) {
    for (i64 c = 0; c < p.value_dim; ++c) {
      for (i64 q = 0; q < lanes; q += kLanes) {
        float* at = s.out + c * lanes + q;
        store(at, load(at) * load(scratch.rescale + q));
      }
    }
  }
  const Word* kept = kept_words(p, s.panel, list, visible, scratch.kept);
  with_pairs(values.dot(), [&](auto pairs) {
    exponentiate<pairs()>(scratch.scores, n, lanes, natural, factor, s.maximum, s.total, kept, p.keep_scale);
  });
  add_values(s, values, visible, scratch.scores, p.value_dim);
  s.begun = true;
}

// Writes the panel's log-sum-exp: -inf for a row that sees nothing, NaN for one that sees only scores of -inf (as
// softmax gives).
inline void write_lse(const AttentionParams& p, const RowState& s) {
  float* lse = p.lse + (s.panel.b * p.heads + s.panel.h) * p.q_len + s.panel.i0;
  for (i64 q = 0; q < s.panel.count; ++q) {
    const bool sees = s.sees >> q & 1;
    const float maximum = is_natural(p) ? s.maximum[q] : s.maximum[q] * kLn2;
    lse[q] = s.total[q] != 0.0f ? maximum + __builtin_log2f(s.total[q]) * kLn2 : (sees ? __builtin_nanf("") : -kInf);
  }
}

// Writes the panel's output and log-sum-exp.
inline void finish(const AttentionParams& p, const RowState& s, float* factor) {
  const Panel& panel = s.panel;
  const float gate = p.gate != nullptr ? p.gate[panel.h] : 1.0f;
  for (i64 q = 0; q < panel.lanes; ++q) {
    const bool sees = s.sees >> q & 1;
    factor[q] = s.total[q] != 0.0f ? gate / s.total[q] : (sees ? __builtin_nanf("") : 0.0f);
  }
  if (!s.begun) {
    std::memset(s.out, 0, p.value_dim * panel.lanes * 4);
  }
  write_rows(s.out, p.value_dim, factor, p.out, panel);
  write_lse(p, s);
}

// Begins the state of panel `index` of kv.
MMK_OUTLINE void begin_rows(const AttentionParams& p, const KeyList& list, i64 kv, i64 index, RowState& s,
                            ForwardScratch& scratch) {
  s.panel = panel_at(p, kv, index);
  spans_of_panel(p, s.panel, list, s.spans);
  const bool is_dot = scratch.is_dot;
  const i64 depth = depth_of(is_dot, p.dim), lanes = s.panel.lanes;
  s.query = scratch.take<float>(depth * lanes);
  s.out = scratch.take<float>(scratch.with_values ? p.value_dim * lanes : 0);
  s.maximum = scratch.take<float>(lanes);
  s.total = scratch.take<float>(lanes);
  s.sees = 0;
  s.begun = false;
  for (i64 q = 0; q < lanes; ++q) {
    s.maximum[q] = -kInf;
    s.total[q] = 0.0f;
  }
  const Source source = source_of(p.query, s.panel.b, s.panel.h, s.panel.i0);
  const Rows query = fetch(source, s.panel.count, p.dim, is_dot, scratch.row_copy);
  transpose_rows(query, s.panel.count, depth, lanes, s.query);
}

inline i64 panel_bytes(const AttentionParams& p, i64 out_rows) {
  return round_up(sizeof(RowState), 64) + (depth_of(uses_dot(p.query.type), p.dim) + out_rows + 2) * kPanel * 4 + 256;
}

inline i64 forward_scratch(const AttentionParams& p, i64 panels) {
  return ForwardScratch{{nullptr}, p, true}.used + panels * panel_bytes(p, p.value_dim);
}

inline void forward(const AttentionParams& p, i64 kv, i64 first, i64 last, char* memory) {
  ForwardScratch scratch{{memory}, p, true};
  const KeyList list = list_of(p, kv);
  const i64 count = last - first;
  RowState* rows = scratch.take<RowState>(count);
  i64 begin = list.count, end = 0;
  const auto prefetch_query = [&](i64 index) { prefetch_rows<false>(p.query, panel_at(p, kv, index), p.dim); };
  prefetch_query(first);
  for (i64 i = 0; i < count; ++i) {
    if (i + 1 < count) {
      prefetch_query(first + i + 1);
    }
    begin_rows(p, list, kv, first + i, rows[i], scratch);
    prefetch_rows<true>(p.out, rows[i].panel, p.value_dim);
    begin = least(begin, rows[i].spans.first);
    end = most(end, rows[i].spans.last);
  }
  Tile keys(p, p.key, list, kv, p.dim, {scratch.key_copy});
  Tile values(p, p.value, list, kv, p.value_dim, scratch.values);
  for (i64 a = begin, b = 0; a < end; a = b) {
    b = least(a + kTileKeys, end);
    for (i64 i = 0; i < count; ++i) { // a panel that sees at most two tiles gets tiles that begin where its span does
      const PanelSpans& spans = rows[i].spans;
      if (spans.first > a && spans.first < b && spans.last - spans.first <= 2 * kTileKeys) {
        b = spans.first;
      }
    }
    keys.move(a, b - a);
    values.move(a, b - a);
    for (i64 i = 0; i < count; ++i) {
      VisibleKeys visible = find_visible(p, rows[i].panel, list, rows[i].spans, a, b, scratch.words);
      if (values.dot()) {
        visible = align_to_pairs(visible, a, rows[i].panel, scratch.words);
      }
      if (visible.a < visible.b) {
        attend(p, list, rows[i], keys, values, visible, scratch);
      }
    }
  }
  for (i64 i = 0; i < count; ++i) {
    finish(p, rows[i], scratch.rescale);
  }
}

} // namespace mmkernels::MMK_ISA
