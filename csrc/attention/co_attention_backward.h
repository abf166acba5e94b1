// co_attention backward, in seven products. For each panel of lanes and tile of rows, with P_l each lane's
// probabilities over the rows and P_r each row's over the lanes, both recomputed from the log-sum-exps:
//   dP_l = value_rows dO_lanes',  dP_r = dO_rows value_lanes',
//   dS = P_l o (K_l o dP_l - delta_l) + P_r o (K_r o dP_r - delta_r),
//   d lanes += dS' rows,  d rows += dS lanes  (both times the scale),
//   d value_rows += (K_l o P_l) dO_lanes,  d value_lanes += (K_r o P_r)' dO_rows,  dbias += dS,
// where K is a dropout mask with its scale and delta = rowsum(out o dO). The lanes' gradients are summed with the
// panel, transposed, and the rows' with the task, a slab of panels of one (b, h).
#pragma once

#include "backward.h"
#include "co_attention_tile.h"

namespace mmkernels::MMK_ISA {

// The sums of the rows' gradients of one slab.
struct RowGrads {
  float *key, *value; // [rows, dim padded], [rows, value_dim padded]; null where not needed
};
inline i64 backward_row_part(const CoAttentionParams& p) {
  const i64 key = p.grad_key.data != nullptr ? pad_lanes(p.dim) : 0;
  const i64 value = p.grad_value.data != nullptr ? pad_lanes(p.value_dim) : 0;
  return padded_rows(p) * (key + value);
}
inline RowGrads row_grads_at(const CoAttentionParams& p, float* part) {
  float* value = part + (p.grad_key.data != nullptr ? padded_rows(p) * pad_lanes(p.dim) : 0);
  return {p.grad_key.data != nullptr ? part : nullptr, p.grad_value.data != nullptr ? value : nullptr};
}

// Scratch of one task. Members are taken in the order of their declaration.
struct CoBackwardScratch : Arena {
  const CoAttentionParams& p;
  const bool is_dot = uses_dot(p.query.type);
  const i64 tile = kTileKeys * kPanel, dim = p.dim, value_dim = p.value_dim, lane_dim = p.lane_value_dim;
  float* scores = take<float>(tile);                   // then K_l o P_l, as bfloat16 rows with pairs
  float* lane_grads = take<float>(tile);               // dP_l, then dS, as pairs of rows with pairs
  float* row_grads = take<float>(tile);                // dP_r, then K_r o P_r, as pairs of rows with pairs
  char* grad_rows = take<char>(is_dot ? tile * 2 : 0); // dS as bfloat16 rows
  float* plain_grads = is_dot && p.grad_bias.data != nullptr ? take<float>(tile) : nullptr; // dS in float32
  Word* words = take<Word>(kTileKeys + 1, 1);
  Word* lane_words = take<Word>(kTileKeys);
  Word* row_words = take<Word>(kTileKeys);
  Word* below = take<Word>(kTileKeys);
  Word* lane_kept = take<Word>(kTileKeys);
  Word* row_kept = take<Word>(kTileKeys);
  // A panel's rows in the working format; one copy is in use at a time, except where its rows are not finite.
  char* query_copy = take<char>(kPanel * row_bytes(is_dot, dim));
  char* grad_copy = take<char>(kPanel * row_bytes(is_dot, value_dim));
  char* value_copy = take<char>(kPanel * row_bytes(is_dot, lane_dim));
  char* query_zeroed = take<char>(kPanel * row_bytes(is_dot, dim));
  char* grad_zeroed = take<char>(kPanel * row_bytes(is_dot, value_dim));
  // The same transposed, and grouped for the products that sum over lanes.
  float* query = take<float>(depth_of(is_dot, dim) * kPanel);
  float* grad = take<float>(depth_of(is_dot, value_dim) * kPanel);
  float* value = take<float>(depth_of(is_dot, lane_dim) * kPanel);
  float* query_groups = take<float>(grouped_floats(is_dot, dim));
  float* grad_groups = take<float>(grouped_floats(is_dot, value_dim));
  float* lse = take<float>(kPanel);
  float* delta = take<float>(kPanel);
  float* factor = take<float>(kPanel);
  // The panel's gradients, transposed.
  float* grad_query = take<float>(dim * kPanel);
  float* grad_value = take<float>(lane_dim * kPanel);
  // Of all rows.
  const RowsScratch keys = take_rows(*this, p, p.key, dim, true);
  const RowsScratch values = take_rows(*this, p, p.value, value_dim, false);
  const RowsScratch grads = take_rows(*this, p, p.row_grad_out, lane_dim, true);
  float* row_lse = take<float>(padded_rows(p));
  float* row_delta = take<float>(padded_rows(p));
  float* sums = p.slabs > 1 ? nullptr : take<float>(backward_row_part(p));
};

// One panel of lanes, and what its gradients are summed from.
struct CoBackwardLanes {
  Panel panel;
  PanelSpans spans;
  LaneBits bits;
  GroupedRows query, grad;
  bool query_begun, value_begun; // whether the panel's gradients hold sums
};

// The log-sum-exp in base 2, and delta, of one row of a side.
MMK_INLINE void load_row_state(const View& out, const View& grad, i64 dim, i64 b, i64 h, i64 i, float from, float& lse,
                               float& delta) {
  const char *x = row_at(out, b, h, i), *y = row_at(grad, b, h, i);
  Vec product = zero();
  if (grad.d == 1) {
    for (i64 c = 0; c < dim; c += kLanes) {
      product = fma(load_as_f32(x + c * bytes_of(out.type), out.type, dim - c),
                    load_as_f32(y + c * bytes_of(grad.type), grad.type, dim - c), product);
    }
  } else {
    for (i64 c = 0; c < dim; ++c) {
      product[c % kLanes] +=
          load_one(x + c * bytes_of(out.type), out.type) * load_one(y + c * grad.d * bytes_of(grad.type), grad.type);
    }
  }
  delta = sum(product);
  lse = from == -kInf ? 0.0f : from * kLog2e;
}

// Prepares a panel for the products.
MMK_OUTLINE void begin_backward_lanes(CoBackwardLanes& r, i64 bh, i64 index, const CoBackwardScratch& s) {
  const CoAttentionParams& p = s.p;
  r.panel = panel_at(p, bh, index);
  r.bits = lane_bits(p, r.panel);
  r.query_begun = r.value_begun = false;
  spans_of_panel(p, r.panel, all_rows(p), r.spans);
  const Panel& panel = r.panel;
  const bool is_dot = s.is_dot, may_hide = hides_any(p);
  const auto rows_of = [&](const View& x, i64 cols, char* copy, float* transposed) {
    const Rows rows = fetch(source_of(x, panel.b, panel.h, panel.i0), panel.count, cols, is_dot, copy);
    transpose_rows(rows, panel.count, depth_of(is_dot, cols), panel.lanes, transposed);
    return rows;
  };
  rows_of(p.lane_value, p.lane_value_dim, s.value_copy, s.value);
  const Rows query = rows_of(p.query, p.dim, s.query_copy, s.query);
  r.query = group_rows(query, panel.count, p.dim, is_dot, may_hide, s.query_zeroed, s.query_groups);
  r.query.finite = true; // a row that sees a query that is not finite has a NaN score already
  const Rows grad = rows_of(p.grad_out, p.value_dim, s.grad_copy, s.grad);
  r.grad = group_rows(grad, panel.count, p.value_dim, is_dot, may_hide, s.grad_zeroed, s.grad_groups);
  const float* lse = p.lse + bh * p.q_len;
  for (i64 q = 0; q < panel.lanes; ++q) {
    s.lse[q] = s.delta[q] = 0.0f;
    if (q < panel.count) {
      load_row_state(p.out, p.grad_out, p.value_dim, panel.b, panel.h, panel.i0 + q, lse[panel.i0 + q], s.lse[q],
                     s.delta[q]);
    }
  }
}

// The tile's words of what is visible and what dropout keeps; null where there is nothing to do.
struct CoTileWords {
  VisibleKeys pairs, lanes, rows;
  const Word *below, *lane_kept, *row_kept;
};

// Replaces scores, dP_l and dP_r of a tile by the products' operands.
template <bool kPairs>
inline void co_differentiate(const CoAttentionParams& p, const Panel& panel, float factor, const CoTileWords& w,
                             const CoBackwardScratch& s) {
  const i64 lanes = panel.lanes, a = w.pairs.a, count = w.pairs.b - a;
  const Vec scale = set1(factor);
  const bool partly = w.lanes.words != nullptr || w.rows.words != nullptr || panel.count < lanes;
  // Words of one direction may be null while the other's are not: then all of the panel's tokens count.
  const auto bits_of_row = [&](const VisibleKeys& visible, i64 r, i64 n) {
    return (std::uint32_t)((visible.any == 0           ? (Word)0
                            : visible.words != nullptr ? visible.words[r]
                                                       : panel.real) >>
                           n);
  };
  for (i64 n = 0; n < lanes; n += kLanes) {
    const Vec base = -load(s.lse + n), delta = load(s.delta + n);
    const auto at = [&](i64 r, Vec& of_lanes, Vec& of_rows, Vec& grad) {
      const Vec x = load(s.scores + r * lanes + n);
      of_lanes = probability(fma(x, scale, base));
      of_rows = probability(fma(x, scale, set1(-s.row_lse[a + r])));
      Vec lane_grad = load(s.lane_grads + r * lanes + n), row_grad = load(s.row_grads + r * lanes + n);
      const auto dropped = [&](const Word* kept, Vec& weight, Vec& gradient) {
        const std::uint32_t keeps = (std::uint32_t)(kept[r] >> n);
        weight = choose(keeps, weight * p.keep_scale, zero());
        gradient = choose(keeps, gradient * p.keep_scale, zero());
      };
      const Vec lane_p = of_lanes, row_p = of_rows;
      if (w.lane_kept != nullptr) {
        dropped(w.lane_kept, of_lanes, lane_grad);
        dropped(w.row_kept, of_rows, row_grad);
      }
      Vec lane_part = lane_p * (lane_grad - delta), row_part = row_p * (row_grad - set1(s.row_delta[a + r]));
      if (partly) { // what is hidden may be NaN
        const std::uint32_t lane_bits = bits_of_row(w.lanes, r, n), row_bits = bits_of_row(w.rows, r, n);
        of_lanes = choose(lane_bits, of_lanes, zero());
        lane_part = choose(lane_bits, lane_part, zero());
        of_rows = choose(row_bits, of_rows, zero());
        row_part = choose(row_bits, row_part, zero());
      }
      grad = lane_part + row_part;
      if (w.below != nullptr) {
        grad = choose((std::uint32_t)(w.below[r] >> n), zero(), grad);
      }
      if (s.plain_grads != nullptr) {
        store(s.plain_grads + r * lanes + n, grad);
      }
    };
    if constexpr (!kPairs) {
      for (i64 r = 0; r < count; ++r) {
        Vec of_lanes, of_rows, grad;
        at(r, of_lanes, of_rows, grad);
        store(s.scores + r * lanes + n, of_lanes);
        store(s.row_grads + r * lanes + n, of_rows);
        store(s.lane_grads + r * lanes + n, grad);
      }
    } else {
      for (i64 r = 0; r < count; r += 2) {
        Vec of_lanes, of_rows[2] = {zero(), zero()}, grad[2] = {zero(), zero()};
        for (i64 i = 0; i < least<i64>(2, count - r); ++i) {
          at(r + i, of_lanes, of_rows[i], grad[i]);
          store_bf16((std::uint16_t*)s.grad_rows + (r + i) * lanes + n, grad[i]);
          // Into the first half of its float32 row: the stride of rows stays `lanes` float32.
          store_bf16((std::uint16_t*)(s.scores + (r + i) * lanes) + n, of_lanes);
        }
        store(s.row_grads + r / 2 * lanes + n, pair_bf16(of_rows[0], of_rows[1]));
        store(s.lane_grads + r / 2 * lanes + n, pair_bf16(grad[0], grad[1]));
      }
    }
  }
}

// dbias += dS [rows, lanes], summed over the dims that the bias broadcasts.
inline void add_co_bias_grads(const CoAttentionParams& p, const Panel& panel, i64 a, i64 count, const float* grads) {
  const View& x = p.grad_bias;
  if (x.l != 1 || x.d == 0) {
    add_bias_grads(p, panel, all_rows(p), 0, a, count, grads);
    return;
  }
  float* base = (float*)x.data + panel.b * x.b + panel.h * x.h + panel.i0;
  for (i64 r = 0; r < count; ++r) {
    for (i64 q = 0; q < panel.count; q += kLanes) {
      float* to = base + (a + r) * x.d + q;
      const i64 n = panel.count - q;
      store_part(to, load_part(to, n) + load(grads + r * panel.lanes + q), n);
    }
  }
}

struct CoTiles {
  Tile keys, values, grads;
};

// Computes scores and both dP of a tile, and from them the products' operands. Returns false where nothing is visible.
inline bool begin_tile(const CoAttentionParams& p, const CoBackwardLanes& rows, CoTiles& tiles, i64 a, i64 b,
                       CoTileWords& w, const CoBackwardScratch& s) {
  const Panel& panel = rows.panel;
  const i64 n = b - a, lanes = panel.lanes;
  w.pairs = visible_pairs(p, panel, rows.spans, rows.bits, a, b, s.words);
  if (w.pairs.any == 0) {
    return false;
  }
  w.below = p.floor > -kInf ? s.below : nullptr;
  const float factor = co_score_tile(p, panel, s.query, tiles.keys, w.pairs, s.scores, s.words, s.below);
  w.lanes = narrow(panel, w.pairs, panel.real, p.row_valid, false, s.lane_words);
  w.rows = narrow(panel, w.pairs, rows.bits.rows, {}, false, s.row_words);
  if (w.lanes.any == 0 && w.rows.any == 0) {
    return false;
  }
  const auto multiply = [&](const VisibleKeys& visible, Tile& tile, const float* transposed, i64 dim, float* to) {
    if (visible.any != 0) {
      multiply_rows(s.is_dot, tile.rows_from(a), transposed, lanes, n, depth_of(s.is_dot, dim), to);
    } else { // nothing in this direction
      std::memset(to, 0, n * lanes * 4);
    }
  };
  multiply(w.lanes, tiles.values, s.grad, p.value_dim, s.lane_grads);
  multiply(w.rows, tiles.grads, s.value, p.lane_value_dim, s.row_grads);
  w.lane_kept = co_kept_words(p, {p.seed_low, p.seed_high}, panel, a, b, s.lane_kept);
  w.row_kept = co_kept_words(p, {p.row_seed_low, p.row_seed_high}, panel, a, b, s.row_kept);
  with_pairs(s.is_dot, [&](auto pairs) { co_differentiate<pairs()>(p, panel, factor, w, s); });
  return true;
}

inline void backward_tile(const CoAttentionParams& p, CoBackwardLanes& rows, CoTiles& tiles, i64 a, i64 b,
                          const RowGrads& sums, const CoBackwardScratch& s) {
  CoTileWords w;
  if (!begin_tile(p, rows, tiles, a, b, w, s)) {
    return;
  }
  const Panel& panel = rows.panel;
  const i64 lanes = panel.lanes;
  if (p.grad_bias.data != nullptr) {
    add_co_bias_grads(p, panel, a, b - a, s.is_dot ? s.plain_grads : s.lane_grads);
  }
  if (sums.value != nullptr && w.lanes.any != 0) {
    add_product_of_rows(panel, rows.grad, s.scores, lanes * 4, w.lanes, p.value_dim, s.is_dot,
                        sums.value + a * pad_lanes(p.value_dim));
  }
  if (sums.key != nullptr) {
    add_product_of_rows(panel, rows.query, s.is_dot ? (const void*)s.grad_rows : s.lane_grads,
                        s.is_dot ? lanes * 2 : lanes * 4, w.pairs, p.dim, s.is_dot, sums.key + a * pad_lanes(p.dim));
  }
  if (p.grad_lane_value.data != nullptr && w.rows.any != 0) {
    add_product_of_columns(panel, tiles.grads, w.rows, s.row_grads, p.lane_value_dim, rows.value_begun, true,
                           s.grad_value);
    rows.value_begun = true;
  }
  if (p.grad_query.data != nullptr) {
    const VisibleKeys& either = w.lanes.words == nullptr ? w.lanes : w.rows; // words only if both directions hide
    add_product_of_columns(panel, tiles.keys, either, s.lane_grads, p.dim, rows.query_begun, false, s.grad_query);
    rows.query_begun = true;
  }
}

// Writes the gradients of a panel's own tensors.
inline void finish_backward_lanes(const CoAttentionParams& p, const CoBackwardLanes& rows, const CoBackwardScratch& s) {
  const auto write = [&](float* sums, bool begun, i64 cols, float scale, const View& to) {
    if (to.data == nullptr) {
      return;
    }
    if (!begun) {
      std::memset(sums, 0, cols * rows.panel.lanes * 4);
    }
    for (i64 q = 0; q < kPanel; ++q) {
      s.factor[q] = scale;
    }
    write_rows(sums, cols, s.factor, to, rows.panel);
  };
  write(s.grad_query, rows.query_begun, p.dim, p.scale, p.grad_query);
  write(s.grad_value, rows.value_begun, p.lane_value_dim, 1.0f, p.grad_lane_value);
}

// Writes the rows' gradients, summed over the slabs, of rows [begin, end).
inline void finish_row_grads(const CoAttentionParams& p, i64 bh, const RowGrads& sums, i64 begin, i64 end) {
  if (sums.key != nullptr) {
    write_key_rows(sums.key + begin * pad_lanes(p.dim), p.dim, p.scale, p.grad_key, all_rows(p), bh, p.heads, begin,
                   end - begin);
  }
  if (sums.value != nullptr) {
    write_key_rows(sums.value + begin * pad_lanes(p.value_dim), p.value_dim, 1.0f, p.grad_value, all_rows(p), bh,
                   p.heads, begin, end - begin);
  }
}

inline void co_backward(const CoAttentionParams& p, i64 bh, i64 slab, char* memory) {
  const CoBackwardScratch s{{memory}, p};
  float* part = p.slabs > 1 ? p.row_parts + (bh * p.slabs + slab) * p.row_part : s.sums;
  const RowGrads sums = row_grads_at(p, part);
  std::memset(part, 0, backward_row_part(p) * 4);
  for (i64 r = 0; r < p.k_len; ++r) {
    load_row_state(p.row_out, p.row_grad_out, p.lane_value_dim, bh / p.heads, bh % p.heads, r,
                   p.row_lse[bh * p.k_len + r], s.row_lse[r], s.row_delta[r]);
  }
  CoTiles tiles{tile_of_rows(p, p.key, bh, p.dim, s.keys), tile_of_rows(p, p.value, bh, p.value_dim, s.values),
                tile_of_rows(p, p.row_grad_out, bh, p.lane_value_dim, s.grads)};
  const i64 end = least((slab + 1) * p.slab_panels, panels_of(p));
  for (i64 index = slab * p.slab_panels; index < end; ++index) {
    CoBackwardLanes rows;
    begin_backward_lanes(rows, bh, index, s);
    if (index + 1 < end) {
      const Panel next = panel_at(p, bh, index + 1);
      prefetch_rows<false>(p.query, next, p.dim);
      prefetch_rows<false>(p.lane_value, next, p.lane_value_dim);
      prefetch_rows<false>(p.grad_out, next, p.value_dim);
      prefetch_rows<false>(p.out, next, p.value_dim);
    }
    each_tile_of_rows(p, index % 2 != 0, [&](i64 a, i64 b) { backward_tile(p, rows, tiles, a, b, sums, s); });
    finish_backward_lanes(p, rows, s);
  }
  if (p.slabs == 1) {
    finish_row_grads(p, bh, sums, 0, p.k_len);
  }
}

// Sums the slabs' gradients of rows [begin, end) of one (b, h) into the first slab's, in their order, and writes them.
inline void co_backward_merge(const CoAttentionParams& p, i64 bh, i64 begin, i64 end) {
  float* first = p.row_parts + bh * p.slabs * p.row_part;
  const RowGrads into = row_grads_at(p, first);
  for (i64 slab = 1; slab < p.slabs; ++slab) {
    const RowGrads from = row_grads_at(p, first + slab * p.row_part);
    const auto add = [&](float* to, const float* x, i64 padded) {
      for (i64 c = begin * padded; to != nullptr && c < end * padded; c += kLanes) {
        store(to + c, load(to + c) + load(x + c));
      }
    };
    add(into.key, from.key, pad_lanes(p.dim));
    add(into.value, from.value, pad_lanes(p.value_dim));
  }
  finish_row_grads(p, bh, into, begin, end);
}

} // namespace mmkernels::MMK_ISA
