// co_attention forward, in three products. For each panel of lanes and tile of rows there is one tile of scores S
// [rows, lanes], and two online softmaxes over it: each lane's over the rows, as in forward.h, whose sums live with the
// panel, and each row's over the lanes, whose sums live with the rows of a task and are rescaled only where a row's
// maximum rises by more than 8 in base 2. A task is a slab of panels of one (b, h). Where there are several slabs,
// their row sums are merged in a fixed order.
#pragma once

#include "co_attention_tile.h"

namespace mmkernels::MMK_ISA {

// The running softmax of the rows of one slab.
struct RowSums {
  float* out; // [rows, lane_value_dim padded]
  float *maximum, *total;
  float* sees; // not 0 where the row sees any lane
};
inline i64 row_part(const CoAttentionParams& p) {
  return padded_rows(p) * (pad_lanes(p.lane_value_dim) + 3);
}
inline RowSums row_sums_at(const CoAttentionParams& p, float* part) {
  const i64 rows = padded_rows(p);
  float* state = part + rows * pad_lanes(p.lane_value_dim);
  return {part, state, state + rows, state + 2 * rows};
}
MMK_INLINE float* part_of_slab(const CoAttentionParams& p, i64 bh, i64 slab) {
  return p.row_parts + (bh * p.slabs + slab) * p.row_part;
}

// Scratch of one task, beside its panels' state.
struct CoForwardScratch : ForwardScratch {
  const CoAttentionParams& co;
  float* row_weights = take<float>(kTileKeys * kPanel);
  float* row_rescale = take<float>(kTileKeys);
  Word* lane_words = take<Word>(kTileKeys);
  Word* row_words = take<Word>(kTileKeys);
  char* value_zeroed = take<char>(kPanel * row_bytes(is_dot, co.lane_value_dim));
  const RowsScratch keys = take_rows(*this, co, co.key, co.dim, false);
  const RowsScratch all_values = take_rows(*this, co, co.value, co.value_dim, true);
  float* sums = co.slabs > 1 ? nullptr : take<float>(row_part(co));
};

// One panel of lanes.
struct CoLanes : RowState {
  LaneBits bits;
  GroupedRows values;
};

// Updates the maxima of `count` rows of scores; as update_maximum, which does so for lanes.
inline bool update_row_maximum(const float* scores, i64 count, i64 lanes, const Word* words, bool natural, float factor,
                               float* maximum, float* total, float* rescale) {
  const float unit = natural ? kLog2e : 1.0f;
  factor = natural ? 1.0f : factor;
  bool moved = false;
  for (i64 r = 0; r < count; r += kLanes) {
    Vec tops[kLanes];
    for (i64 i = 0; i < kLanes; ++i) {
      Vec top = set1(-kInf);
      for (i64 n = 0; n < lanes && r + i < count; n += kLanes) {
        const Vec x = load(scores + (r + i) * lanes + n);
        top = max_skip_nan(top, words == nullptr ? x : choose((std::uint32_t)(words[r + i] >> n), x, set1(-kInf)));
      }
      tops[i] = top;
    }
    transpose(tops);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        tops[i] = max_skip_nan(tops[i], tops[i + half]);
      }
    }
    moved |= raise_maximum(tops[0] * factor, unit, maximum + r, total + r, rescale + r);
  }
  return moved;
}

// Writes the rows' weights [rows, lanes], exponentials relative to each row's maximum, and adds their sums to `total`.
// kPairs: as bfloat16, into the first half of each row.
template <bool kPairs, bool kNatural>
inline void exponentiate_rows(const float* scores, i64 count, i64 lanes, const Word* words, float factor,
                              const float* maximum, float* total, const Word* kept, float keep_scale, float* weights) {
  const Vec scale = set1(factor);
  for (i64 r = 0; r < count; r += kLanes) {
    Vec sums[kLanes];
    for (i64 i = 0; i < kLanes; ++i) {
      Vec sum = zero();
      const float point = r + i < count ? maximum[r + i] : 0.0f;
      const Vec base = set1(point == -kInf ? 0.0f : -point);
      for (i64 n = 0; n < lanes && r + i < count; n += kLanes) {
        const i64 at = (r + i) * lanes;
        const Vec x = load(scores + at + n);
        Vec w = exp2(kNatural ? (x + base) * kLog2e : fma(x, scale, base));
        if (words != nullptr) {
          w = choose((std::uint32_t)(words[r + i] >> n), w, zero());
        }
        sum += w;
        if (kept != nullptr) {
          w = choose((std::uint32_t)(kept[r + i] >> n), w * keep_scale, zero());
        }
        if constexpr (kPairs) {
          store_bf16((std::uint16_t*)(weights + at) + n, w);
        } else {
          store(weights + at + n, w);
        }
      }
      sums[i] = sum;
    }
    store(total + r, load(total + r) + sum_each(sums));
  }
}

// The rows' direction: adds a tile to the sums of its rows.
inline void attend_rows(const CoAttentionParams& p, const CoLanes& s, const VisibleKeys& visible, float factor,
                        const RowSums& sums, const CoForwardScratch& scratch) {
  const i64 n = visible.b - visible.a, lanes = s.panel.lanes, padded = pad_lanes(p.lane_value_dim);
  const bool natural = is_natural(p), is_dot = scratch.is_dot;
  float* maximum = sums.maximum + visible.a;
  float* total = sums.total + visible.a;
  float* out = sums.out + visible.a * padded;
  for (i64 r = 0; r < n; ++r) {
    sums.sees[visible.a + r] += visible.words == nullptr || visible.words[r] != 0 ? 1.0f : 0.0f;
  }
  if (update_row_maximum(scratch.scores, n, lanes, visible.words, natural, factor, maximum, total,
                         scratch.row_rescale)) {
    for (i64 r = 0; r < n; ++r) {
      if (scratch.row_rescale[r] != 1.0f) {
        for (i64 c = 0; c < padded; c += kLanes) {
          store(out + r * padded + c, load(out + r * padded + c) * scratch.row_rescale[r]);
        }
      }
    }
  }
  const Word* kept = co_kept_words(p, {p.row_seed_low, p.row_seed_high}, s.panel, visible.a, visible.b, scratch.kept);
  with_pairs(is_dot, [&](auto pairs) {
    const auto run = natural ? exponentiate_rows<pairs(), true> : exponentiate_rows<pairs(), false>;
    run(scratch.scores, n, lanes, visible.words, factor, maximum, total, kept, p.keep_scale, scratch.row_weights);
  });
  add_product_of_rows(s.panel, s.values, scratch.row_weights, lanes * 4, visible, p.lane_value_dim, is_dot, out);
}

// The lanes' direction: adds a tile to the sums of its lanes. Overwrites the scores.
inline void attend_lanes(const CoAttentionParams& p, CoLanes& s, Tile& values, const VisibleKeys& visible, float factor,
                         const CoForwardScratch& scratch) {
  const i64 n = visible.b - visible.a, lanes = s.panel.lanes;
  const bool natural = is_natural(p);
  if (visible.words != nullptr) {
    hide(s.panel, visible.words, n, scratch.scores);
  }
  s.sees |= visible.any;
  if (update_maximum(scratch.scores, n, lanes, natural, factor, s.maximum, s.total, scratch.rescale) && s.begun) {
    for (i64 c = 0; c < p.value_dim; ++c) {
      for (i64 q = 0; q < lanes; q += kLanes) {
        float* at = s.out + c * lanes + q;
        store(at, load(at) * load(scratch.rescale + q));
      }
    }
  }
  const Word* kept = co_kept_words(p, {p.seed_low, p.seed_high}, s.panel, visible.a, visible.b, scratch.kept);
  with_pairs(values.dot(), [&](auto pairs) {
    exponentiate<pairs()>(scratch.scores, n, lanes, natural, factor, s.maximum, s.total, kept, p.keep_scale);
  });
  add_product_of_columns(s.panel, values, visible, scratch.scores, p.value_dim, s.begun, true, s.out);
  s.begun = true;
}

inline void attend_both(const CoAttentionParams& p, CoLanes& s, Tile& keys, Tile& values, i64 a, i64 b,
                        const RowSums& sums, const CoForwardScratch& scratch) {
  VisibleKeys pairs = visible_pairs(p, s.panel, s.spans, s.bits, a, b, scratch.words);
  if (pairs.any == 0) {
    return;
  }
  const float factor = co_score_tile(p, s.panel, s.query, keys, pairs, scratch.scores, scratch.words);
  const VisibleKeys of_rows = narrow(s.panel, pairs, s.bits.rows, {}, true, scratch.row_words);
  if (of_rows.any != 0) {
    attend_rows(p, s, of_rows, factor, sums, scratch);
  }
  const VisibleKeys of_lanes = narrow(s.panel, pairs, s.panel.real, p.row_valid, false, scratch.lane_words);
  if (of_lanes.any != 0) {
    attend_lanes(p, s, values, of_lanes, factor, scratch);
  }
}

inline i64 co_panel_bytes(const CoAttentionParams& p) {
  const bool is_dot = uses_dot(p.query.type);
  return panel_bytes(p, p.value_dim) + round_up(sizeof(CoLanes), 64) + grouped_floats(is_dot, p.lane_value_dim) * 4 +
         kPanel * row_bytes(is_dot, p.lane_value_dim) + 128;
}

inline i64 co_forward_scratch(const CoAttentionParams& p) {
  return CoForwardScratch{{{nullptr}, p, true}, p}.used + p.panels_together * co_panel_bytes(p);
}

// Begins panel `index` of a (b, h).
MMK_OUTLINE void begin_lanes(const CoAttentionParams& p, i64 bh, i64 index, CoLanes& s, CoForwardScratch& scratch) {
  begin_rows(p, all_rows(p), bh, index, s, scratch);
  s.bits = lane_bits(p, s.panel);
  const bool is_dot = scratch.is_dot;
  const Source source = source_of(p.lane_value, s.panel.b, s.panel.h, s.panel.i0);
  char* copy = scratch.take<char>(kPanel * row_bytes(is_dot, p.lane_value_dim));
  const Rows rows = fetch(source, s.panel.count, p.lane_value_dim, is_dot, copy);
  float* grouped = scratch.take<float>(grouped_floats(is_dot, p.lane_value_dim));
  s.values = group_rows(rows, s.panel.count, p.lane_value_dim, is_dot, hides_any(p), scratch.value_zeroed, grouped);
}

// What one slab's sums of a row, times `factor`, are as its output, with its log-sum-exp.
inline void finish_row(const CoAttentionParams& p, i64 bh, i64 row, const RowSums& sums, i64 at) {
  const float total = sums.total[at], maximum = is_natural(p) ? sums.maximum[at] : sums.maximum[at] * kLn2;
  const bool sees = sums.sees[at] != 0.0f;
  const float nothing = sees ? __builtin_nanf("") : 0.0f, factor = total != 0.0f ? 1.0f / total : nothing;
  p.row_lse[bh * p.k_len + row] =
      total != 0.0f ? maximum + __builtin_log2f(total) * kLn2 : (sees ? __builtin_nanf("") : -kInf);
  char* to = row_at(p.row_out, bh / p.heads, bh % p.heads, row);
  for (i64 c = 0; c < p.lane_value_dim; c += kLanes) {
    const Vec out = load(sums.out + at * pad_lanes(p.lane_value_dim) + c);
    store_columns(p.row_out, to, c, p.lane_value_dim, out * factor);
  }
}

inline void co_forward(const CoAttentionParams& p, i64 bh, i64 slab, char* memory) {
  CoForwardScratch scratch{{{memory}, p, true}, p};
  float* part = p.slabs > 1 ? part_of_slab(p, bh, slab) : scratch.sums;
  const RowSums sums = row_sums_at(p, part);
  std::memset(part, 0, row_part(p) * 4);
  for (i64 r = 0; r < padded_rows(p); ++r) {
    sums.maximum[r] = -kInf;
  }
  Tile keys = tile_of_rows(p, p.key, bh, p.dim, scratch.keys);
  Tile values = tile_of_rows(p, p.value, bh, p.value_dim, scratch.all_values);
  const i64 end = least((slab + 1) * p.slab_panels, panels_of(p)), used = scratch.used;
  bool back = false;
  for (i64 first = slab * p.slab_panels; first < end; first += p.panels_together) {
    const i64 count = least(p.panels_together, end - first);
    scratch.used = used; // the panels before are finished
    CoLanes* panels = scratch.take<CoLanes>(count);
    for (i64 i = 0; i < count; ++i) {
      begin_lanes(p, bh, first + i, panels[i], scratch);
      prefetch_rows<true>(p.out, panels[i].panel, p.value_dim);
    }
    for (i64 i = first + count; i < least(end, first + count + p.panels_together); ++i) {
      prefetch_rows<false>(p.query, panel_at(p, bh, i), p.dim);
      prefetch_rows<false>(p.lane_value, panel_at(p, bh, i), p.lane_value_dim);
    }
    each_tile_of_rows(p, back, [&](i64 a, i64 b) {
      for (i64 i = 0; i < count; ++i) {
        attend_both(p, panels[i], keys, values, a, b, sums, scratch);
      }
    });
    back = !back;
    for (i64 i = 0; i < count; ++i) {
      finish(p, panels[i], scratch.rescale);
    }
  }
  for (i64 r = 0; p.slabs == 1 && r < p.k_len; ++r) {
    finish_row(p, bh, r, sums, r);
  }
}

// Merges the slabs' sums of rows [begin, end) of one (b, h) into the first slab's, and writes their output.
inline void co_forward_merge(const CoAttentionParams& p, i64 bh, i64 begin, i64 end) {
  const RowSums into = row_sums_at(p, part_of_slab(p, bh, 0));
  const i64 padded = pad_lanes(p.lane_value_dim);
  const float unit = is_natural(p) ? kLog2e : 1.0f;
  for (i64 r = begin; r < end; ++r) {
    for (i64 slab = 1; slab < p.slabs; ++slab) {
      const RowSums from = row_sums_at(p, part_of_slab(p, bh, slab));
      into.sees[r] += from.sees[r];
      if (from.total[r] == 0.0f) {
        continue;
      }
      const float now = most(into.maximum[r], from.maximum[r]), base = now == -kInf ? 0.0f : now;
      const float mine = exp2(set1((into.maximum[r] - base) * unit))[0];
      const float other = exp2(set1((from.maximum[r] - base) * unit))[0];
      into.maximum[r] = now;
      into.total[r] = into.total[r] * mine + from.total[r] * other;
      for (i64 c = r * padded; c < (r + 1) * padded; c += kLanes) {
        store(into.out + c, load(into.out + c) * mine + load(from.out + c) * other);
      }
    }
    finish_row(p, bh, r, into, r);
  }
}

} // namespace mmkernels::MMK_ISA
