// What both passes of co_attention share: which pairs of a tile are visible in which direction, its scores, its
// dropout, and a panel's rows as operands of the products that sum over lanes.
#pragma once

#include "../common/product.h"
#include "co_attention_params.h"
#include "forward.h"

namespace mmkernels::MMK_ISA {

MMK_INLINE KeyList all_rows(const CoAttentionParams& p) {
  return {nullptr, p.k_len};
}
// Row sums are kept in whole vectors of rows.
MMK_INLINE i64 padded_rows(const CoAttentionParams& p) {
  return pad_lanes(p.k_len);
}
MMK_INLINE bool hides_pairs(const CoAttentionParams& p) {
  return p.start.data != nullptr || p.row_start.data != nullptr || p.words != nullptr || p.key_valid.data != nullptr ||
         p.lane_pair_valid.data != nullptr;
}
// Whether a lane or a row may be hidden from any of the other side.
MMK_INLINE bool hides_any(const CoAttentionParams& p) {
  return hides_pairs(p) || p.bias.data != nullptr || p.lane_valid.data != nullptr || p.row_valid.data != nullptr;
}

// All rows of one (b, h), converted once for all panels. Columns of rows that lie an unlucky stride apart (see
// `Tile::columns_from`) are copied with another one.
struct RowsScratch {
  bool copied; // to `rows`; else they are used in place, or as bfloat16
  char* rows;  // float32, `Tile::padded_row` apart
  Tile::Scratch tile;
};
inline RowsScratch take_rows(Arena& arena, const CoAttentionParams& p, const View& x, i64 cols, bool columns) {
  const bool is_dot = uses_dot(x.type), in_place = usable_in_place(source_of(x, 0, 0), cols, is_dot);
  RowsScratch s;
  s.copied = !is_dot && (!in_place || (columns && x.l * 4 % 1024 == 0));
  s.rows = arena.take<char>(s.copied ? p.k_len * Tile::padded_row(cols) : 0);
  s.tile.copy = arena.take<char>(is_dot && !in_place ? Tile::copy_bytes(is_dot, cols, p.k_len) : 0);
  s.tile.pairs = arena.take<char>(columns && is_dot ? Tile::pairs_bytes(is_dot, cols, p.k_len) : 0);
  s.tile.zeroed = arena.take<char>(columns ? Tile::copy_bytes(is_dot, cols) : 0);
  s.tile.zeroed_pairs = arena.take<char>(columns ? Tile::pairs_bytes(is_dot, cols) : 0);
  return s;
}
// Copies one row to float32.
inline void copy_row(const View& x, const char* from, i64 cols, char* to) {
  for (i64 c = 0; x.d == 1 && c < cols; c += kLanes) {
    store(to + c * 4, load_as_f32(from + c * bytes_of(x.type), x.type, cols - c));
  }
  for (i64 c = 0; x.d != 1 && c < cols; ++c) {
    store_one(to + c * 4, Type::f32, load_one(from + c * x.d * bytes_of(x.type), x.type));
  }
}
inline Tile tile_of_rows(const CoAttentionParams& p, const View& x, i64 bh, i64 cols, const RowsScratch& s) {
  View view = x;
  if (s.copied) {
    const i64 stride = Tile::padded_row(cols);
    for (i64 r = 0; r < p.k_len; ++r) {
      copy_row(x, row_at(x, bh / p.heads, bh % p.heads, r), cols, s.rows + r * stride);
    }
    view = {s.rows, Type::f32, 0, 0, stride / 4, 1};
  }
  Tile tile(p, view, all_rows(p), bh, cols, s.tile);
  tile.move(0, p.k_len);
  return tile;
}

// Calls f(a, b) for each tile of rows, from the last one on where `back` is true: every other turn, so that the rows
// that are still in cache from the turn before come first.
template <typename F> MMK_INLINE void each_tile_of_rows(const CoAttentionParams& p, bool back, const F& f) {
  const i64 count = (p.k_len + p.tile_rows - 1) / p.tile_rows;
  for (i64 i = 0; i < count; ++i) {
    const i64 a = (back ? count - 1 - i : i) * p.tile_rows;
    f(a, least(a + p.tile_rows, p.k_len));
  }
}

// The bits of a panel's lanes that are valid.
inline Word valid_bits(const Panel& panel, const Lines<std::uint8_t>& valid) {
  if (valid.data == nullptr) {
    return panel.real;
  }
  Word bits = 0;
  for (i64 q = 0; q < panel.count; ++q) {
    bits |= (Word)((Word)(valid.data[panel.b * valid.b + (panel.i0 + q) * valid.i] != 0) << q);
  }
  return bits;
}

// The lanes of a panel that the mask lets through: in any pair, and in the rows' direction.
struct LaneBits {
  Word pairs, rows;
};
inline LaneBits lane_bits(const CoAttentionParams& p, const Panel& panel) {
  return {valid_bits(panel, p.lane_pair_valid), valid_bits(panel, p.lane_valid)};
}

// The words of rows whose spans run over the lanes.
inline void apply_row_spans(const CoAttentionParams& p, const Panel& panel, i64 a, i64 count, Word* words) {
  for (i64 r = 0; r < count; ++r) {
    const i64 start = p.row_start.data[panel.b * p.row_start.b + (a + r) * p.row_start.i] - panel.i0;
    const i64 end = p.row_end.data[panel.b * p.row_end.b + (a + r) * p.row_end.i] - panel.i0;
    const i64 first = most<i64>(start, 0), last = least<i64>(end, kPanel);
    words[r] &= first < last ? (Word)((Word)((Word) ~(Word)0 >> (kPanel - (last - first))) << first) : (Word)0;
  }
}

// The pairs of the rows [a, b) and a panel that the mask shows, in both directions.
inline VisibleKeys visible_pairs(const CoAttentionParams& p, const Panel& panel, const PanelSpans& spans, LaneBits bits,
                                 i64 a, i64 b, Word* words) {
  const i64 n = b - a;
  const bool partial = p.start.data != nullptr && (a < spans.full_first || b > spans.full_last);
  if (!hides_pairs(p) || (!partial && p.row_start.data == nullptr && p.words == nullptr &&
                          p.key_valid.data == nullptr && bits.pairs == panel.real)) {
    return {a, b, nullptr, panel.real};
  }
  if (partial) {
    write_span_words(panel, spans, a, n, words);
  } else {
    std::memset(words, 0xff, n * sizeof(Word));
  }
  if (p.row_start.data != nullptr) {
    apply_row_spans(p, panel, a, n, words);
  }
  apply_masks(p, panel, all_rows(p), a, n, words);
  Word all = panel.real, any = 0;
  for (i64 r = 0; r < n; ++r) {
    words[r] &= bits.pairs;
    all &= words[r];
    any |= words[r];
  }
  return {a, b, all == panel.real ? nullptr : words, any};
}

// The pairs that count in one direction: those of `pairs` whose lane is in `bits` and whose row is valid. With `whole`
// words are null only where every lane of the tile counts, the ones past the panel's last token included.
inline VisibleKeys narrow(const Panel& panel, const VisibleKeys& pairs, Word bits, const Lines<std::uint8_t>& row_valid,
                          bool whole, Word* words) {
  const bool all_lanes = bits == panel.real && !(whole && pairs.words == nullptr && panel.count < panel.lanes);
  if (all_lanes && row_valid.data == nullptr) {
    return pairs;
  }
  Word all = panel.real, any = 0;
  for (i64 r = 0; r < pairs.b - pairs.a; ++r) {
    const bool valid =
        row_valid.data == nullptr || row_valid.data[panel.b * row_valid.b + (pairs.a + r) * row_valid.i] != 0;
    words[r] = valid ? (Word)((pairs.words != nullptr ? pairs.words[r] : panel.real) & bits) : (Word)0;
    all &= words[r];
    any |= words[r];
  }
  const bool complete = all == panel.real && !(whole && panel.count < panel.lanes);
  return {pairs.a, pairs.b, complete ? nullptr : words, any};
}

// add_bias where the lanes' elements of the bias are neighbours.
inline void add_bias_of_lanes(const CoAttentionParams& p, const Panel& panel, VisibleKeys& visible, float* scores,
                              Word* words) {
  const View& x = p.bias;
  const Vec scale = set1(p.scale), hidden = set1(-kInf), floor = set1(kLowestBias);
  for (i64 r = 0; r < visible.b - visible.a; ++r) {
    const char* row = row_at(x, panel.b, panel.h, panel.i0) + (visible.a + r) * x.d * bytes_of(x.type);
    for (i64 q = 0; q < panel.lanes; q += kLanes) {
      const Vec given = load_as_f32(row + q * bytes_of(x.type), x.type, most<i64>(0, panel.count - q));
      float* at = scores + r * panel.lanes + q;
      store(at, fma(load(at), scale, given < floor ? floor : given));
      const std::uint32_t hides = bits_of(given == hidden);
      if (hides != 0) {
        write_words(visible, panel, words);
        visible.words[r] &= (Word) ~(Word)((Word)hides << q);
      }
    }
  }
  if (visible.words != nullptr) {
    visible.any = 0;
    for (i64 r = 0; r < visible.b - visible.a; ++r) {
      visible.any |= visible.words[r];
    }
  }
}

// Raises scores to the floor. `below`, if not null, gets a word for each row: the lanes whose score was lower.
inline void raise_to_floor(const CoAttentionParams& p, const Panel& panel, i64 count, float* scores, Word* below) {
  const Vec floor = set1(p.floor);
  for (i64 r = 0; r < count; ++r) {
    Word bits = 0;
    for (i64 q = 0; q < panel.lanes; q += kLanes) {
      float* at = scores + r * panel.lanes + q;
      const Vec x = load(at);
      bits |= (Word)((Word)bits_of(x < floor) << q);
      store(at, x < floor ? floor : x); // NaN stays
    }
    if (below != nullptr) {
      below[r] = bits;
    }
  }
}

// Computes the scores of a tile, hidden ones too, and returns the factor that makes them logarithms in base 2. A bias
// of -inf hides pairs of `visible`.
inline float co_score_tile(const CoAttentionParams& p, const Panel& panel, const float* query, Tile& keys,
                           VisibleKeys& visible, float* scores, Word* words, Word* below = nullptr) {
  const i64 n = visible.b - visible.a;
  multiply_rows(keys.dot(), keys.rows_from(visible.a), query, panel.lanes, n, depth_of(keys.dot(), p.dim), scores);
  if (p.bias.data != nullptr && p.bias.l == 1) {
    add_bias_of_lanes(p, panel, visible, scores, words);
  } else if (p.bias.data != nullptr) {
    add_bias(p, panel, all_rows(p), visible, scores, words);
  } else if (p.scale > 0.0f && !(p.floor > -kInf)) {
    return p.scale * kLog2e;
  } else {
    for (i64 i = 0; i < n * panel.lanes; i += kLanes) {
      store(scores + i, load(scores + i) * p.scale);
    }
  }
  if (p.floor > -kInf) {
    raise_to_floor(p, panel, n, scores, below);
  }
  return kLog2e;
}

// Moves bit i of `bits`, 16 at most, to bit 4 i.
MMK_INLINE std::uint64_t spread_by_four(std::uint64_t bits) {
  bits = (bits | bits << 24) & 0x000000FF000000FFu;
  bits = (bits | bits << 12) & 0x000F000F000F000Fu;
  bits = (bits | bits << 6) & 0x0303030303030303u;
  return (bits | bits << 3) & 0x1111111111111111u;
}
// draw_kept where lanes are side b, whose elements share the words of Philox in fours.
inline void draw_kept_of_lanes(const CoAttentionParams& p, Seed seed, const Panel& panel, i64 a, i64 b, Word* kept) {
  const UVec none{}, threshold = none + (std::uint32_t)p.threshold;
  UVec fours;
  for (int i = 0; i < kLanes; ++i) {
    fours[i] = (std::uint32_t)(panel.i0 / 4 + i);
  }
  for (i64 r = a; r < b; ++r) {
    kept[r - a] = 0;
    if (p.threshold >> 32 != 0) { // every probability is dropped
      continue;
    }
    UVec words[4] = {fours, none + (std::uint32_t)r, none + (std::uint32_t)panel.h, none + (std::uint32_t)panel.b};
    philox(words[0], words[1], words[2], words[3], seed.low, seed.high);
    for (int i = 0; i < 4; ++i) {
      kept[r - a] |= (Word)(spread_by_four(bits_of(words[i] >= threshold)) << i);
    }
  }
}
static_assert(kPanel <= 4 * kLanes, "one vector of counters covers a panel");

// For each row of a tile, the bits of the lanes whose probability dropout keeps; null without dropout.
inline const Word* co_kept_words(const CoAttentionParams& p, Seed seed, const Panel& panel, i64 a, i64 b, Word* kept) {
  if (!p.dropout) {
    return nullptr;
  }
  if (p.swapped) {
    draw_kept_of_lanes(p, seed, panel, a, b, kept);
  } else {
    draw_kept(p, seed, panel, all_rows(p), a, b, kept);
  }
  return kept;
}

// A panel's rows of a tensor as the right operand of products that sum over lanes: groups of kPanel columns, each
// [lanes (or pairs of lanes), kPanel], so that a group is read in order.
struct GroupedRows {
  const float* data = nullptr;
  Rows rows{nullptr, 0}; // unchanged, for the non-finite path
  bool finite = true;    // else `data` has zeros in place of what is not
};
MMK_INLINE i64 group_depth(bool is_dot, i64 lanes) {
  return is_dot ? (lanes + 1) / 2 : lanes;
}
inline i64 grouped_floats(bool is_dot, i64 cols) {
  return (cols + kPanel - 1) / kPanel * group_depth(is_dot, kPanel) * kPanel;
}
inline GroupedRows group_rows(Rows rows, i64 count, i64 cols, bool is_dot, bool may_hide, char* zeroed, float* to) {
  GroupedRows grouped{to, rows, !may_hide || all_finite(rows, count, cols, is_dot)};
  const Rows used = grouped.finite ? rows : zero_non_finite(rows, count, cols, is_dot, zeroed);
  for (i64 c = 0; c < cols; c += kPanel, to += group_depth(is_dot, kPanel) * kPanel) {
    group_columns(is_dot, {used.data + c * (is_dot ? 2 : 4), used.stride}, count, least<i64>(kPanel, cols - c), to);
  }
  return grouped;
}

// to [rows, padded columns] += weights [rows, lanes] times a panel's rows. `weights` are float32, or bfloat16 rows of a
// stride of `lanes` float32 unless `stride` (bytes) says otherwise.
inline void add_product_of_rows(const Panel& panel, const GroupedRows& values, const void* weights, i64 stride,
                                const VisibleKeys& visible, i64 cols, bool is_dot, float* to) {
  const i64 n = visible.b - visible.a, padded = pad_lanes(cols);
  const float* group = values.data;
  for (i64 c = 0; c < padded; c += kPanel, group += group_depth(is_dot, kPanel) * kPanel) {
    gemm(is_dot, {(const char*)weights, stride, 4}, group, kPanel * 4, to + c, padded, n,
         least<i64>(kPanel, padded - c) / kLanes, group_depth(is_dot, panel.count), true);
  }
  if (values.finite) {
    return;
  }
  each_non_finite(values.rows, panel.count, cols, is_dot, [&](i64 q, i64 c, float x) {
    for (i64 r = 0; r < n; ++r) {
      if (visible.words == nullptr || (visible.words[r] >> q & 1)) {
        to[r * padded + c] += x;
      }
    }
  });
}

// to [columns, lanes] += a tile's columns times weights [rows, lanes] (or pairs of rows). On the non-finite path a
// value that is not finite is multiplied as 0, and then, where `spread`, added to the lanes that see it.
inline void add_product_of_columns(const Panel& panel, Tile& tile, const VisibleKeys& visible, const float* weights,
                                   i64 cols, bool add, bool spread, float* to) {
  const i64 n = visible.b - visible.a, lanes = panel.lanes;
  const bool is_dot = tile.dot(), safe = tile.is_safe(visible);
  const Operand columns = safe ? tile.columns_from(visible.a) : tile.zeroed_columns_from(visible.a, n);
  gemm(is_dot, columns, weights, lanes * 4, to, lanes, cols, lanes / kLanes, group_depth(is_dot, n), add);
  if (safe || !spread) {
    return;
  }
  each_non_finite(tile.rows_from(visible.a), n, cols, is_dot, [&](i64 r, i64 c, float x) {
    for (i64 q = 0; q < panel.count; ++q) {
      if (visible.words == nullptr || (visible.words[r] >> q & 1)) {
        to[c * lanes + q] += x;
      }
    }
  });
}

} // namespace mmkernels::MMK_ISA
