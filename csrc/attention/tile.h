// What all passes over a tile of scores share: operands, scores, mask, bias, dropout. A tile is transposed, [keys,
// lanes], with a panel's queries side by side. So keys and values are read in place, and no sum or maximum crosses
// lanes.
#pragma once

#include "../common/philox.h"
#include "../common/tile_gemm.h"
#include "mask.h"

namespace mmkernels::MMK_ISA {

// Keys of a tile: its scores stay in the first-level cache beside the operands in use.
constexpr i64 kTileKeys = 96;

// Chooses between products of float32 and of bfloat16 pairs.
MMK_INLINE void gemm(bool is_dot, Operand a, const void* b, i64 b_step, float* c, i64 c_row, i64 rows, i64 vectors,
                     i64 depth, bool add) {
  with_pairs(is_dot, [&](auto pairs) { gemm<pairs()>(a, b, b_step, c, c_row, rows, vectors, depth, add); });
}

// Products [count, lanes] of rows in the working format with the transposed queries.
MMK_INLINE void multiply_rows(bool is_dot, Rows rows, const float* transposed, i64 lanes, i64 count, i64 depth,
                              float* to) {
  gemm(is_dot, {rows.data, rows.stride, 4}, transposed, lanes * 4, to, lanes, count, lanes / kLanes, depth, false);
}

// A lower bias counts as this one, which stays finite in base 2: models hide keys by the lowest finite number.
constexpr float kLowestBias = -2.3e38f;

// Replaces scores by scores * scale + bias. Scale first, then subtract the maximum: fusing the scale into the exponent
// would lose the difference of two huge scores to rounding. A bias of -inf hides the key whatever its score is, so that
// it clears bits of the words. The bias is read along its keys and transposed in registers.
inline void add_bias(const AttentionParams& p, const Panel& panel, const KeyList& list, VisibleKeys& visible,
                     float* scores, Word* words) {
  const View& x = p.bias;
  const i64 size = bytes_of(x.type), count = visible.b - visible.a;
  const char* base = row_at(x, panel.b, panel.h, panel.i0);
  const Vec scale = set1(p.scale), hidden = set1(-kInf), floor = set1(kLowestBias);
  for (i64 q = 0; q < panel.lanes; q += kLanes) {
    for (i64 r = 0; r < count; r += kLanes) {
      const i64 n = least<i64>(kLanes, count - r), key = key_at(list, visible.a + r);
      const bool neighbours = x.d == 1 && key_at(list, visible.a + r + n - 1) - key == n - 1;
      Vec block[kLanes];
      Vec lowest = zero();
      for (i64 i = 0; i < kLanes; ++i) {
        if (q + i >= panel.count) {
          block[i] = zero();
          continue;
        }
        const char* row = base + (q + i) * x.l * size;
        if (neighbours) {
          block[i] = load_as_f32(row + key * size, x.type, n);
          __builtin_prefetch(row + (key + kTileKeys) * size); // more rows at once than the hardware prefetches
        } else {
          float few[kLanes] = {};
          for (i64 j = 0; j < n; ++j) {
            few[j] = load_one(row + key_at(list, visible.a + r + j) * x.d * size, x.type);
          }
          block[i] = load(few);
        }
        lowest = block[i] < lowest ? block[i] : lowest;
      }
      transpose(block);
      for (i64 j = 0; j < n; ++j) {
        float* at = scores + (r + j) * panel.lanes + q;
        const Vec bias = block[j] < floor ? floor : block[j];
        store(at, fma(load(at), scale, bias));
      }
      if (bits_of(lowest == hidden) != 0) {
        write_words(visible, panel, words);
        for (i64 j = 0; j < n; ++j) {
          const Word hides = (Word)((Word)bits_of(block[j] == hidden) << q);
          visible.words[r + j] &= (Word)~hides;
        }
      }
    }
  }
  if (visible.words != nullptr) {
    visible.any = 0;
    for (i64 r = 0; r < count; ++r) {
      visible.any |= visible.words[r];
    }
  }
}

// Whether scores are converted to base 2 only after the maximum is subtracted. With a huge bias that difference is
// exact, while the difference of two products with log2(e) would be only rounding.
MMK_INLINE bool is_natural(const AttentionParams& p) {
  return p.bias.data != nullptr || p.floor > -kInf;
}

// A probability from its logarithm. Rounding may leave the logarithm above 0, far above where scores are huge.
MMK_INLINE Vec probability(Vec x) {
  return exp2(x > zero() ? zero() : x);
}

MMK_INLINE void hide(const Panel& panel, const Word* words, i64 count, float* scores) {
  const Vec hidden = set1(-kInf);
  for (i64 r = 0; r < count; ++r) {
    if (words[r] == panel.real && panel.count == panel.lanes) {
      continue;
    }
    for (i64 n = 0; n < panel.vectors; ++n) {
      float* at = scores + r * panel.lanes + n * kLanes;
      store(at, choose((std::uint32_t)(words[r] >> (n * kLanes)), load(at), hidden));
    }
  }
}

// A key of Philox.
struct Seed {
  std::uint32_t low, high;
};

// For each of the places [a, b), the bits of the queries whose probability dropout keeps.
inline void draw_kept(const AttentionParams& p, Seed seed, const Panel& panel, const KeyList& list, i64 a, i64 b,
                      Word* kept) {
  UVec lane;
  for (int i = 0; i < kLanes; ++i) {
    lane[i] = (std::uint32_t)i;
  }
  std::memset(kept, 0, (b - a) * sizeof(Word));
  if (p.threshold >> 32 != 0) { // every probability is dropped
    return;
  }
  const UVec threshold = UVec{} + (std::uint32_t)p.threshold;
  for (i64 n = 0; n < panel.vectors; ++n) {
    i64 last = -1; // `words` are those of keys 4 last to 4 last + 3
    UVec words[4];
    for (i64 r = a; r < b; ++r) {
      const i64 key = key_at(list, r);
      if (key / 4 != last) {
        last = key / 4;
        const UVec none{};
        words[0] = none + (std::uint32_t)last;
        words[1] = lane + (std::uint32_t)(panel.i0 + n * kLanes);
        words[2] = none + (std::uint32_t)panel.h;
        words[3] = none + (std::uint32_t)panel.b;
        philox(words[0], words[1], words[2], words[3], seed.low, seed.high);
      }
      kept[r - a] |= (Word)((Word)bits_of(words[key % 4] >= threshold) << (n * kLanes));
    }
  }
}

// The same for the visible places; null without dropout.
inline const Word* kept_words(const AttentionParams& p, const Panel& panel, const KeyList& list,
                              const VisibleKeys& visible, Word* kept) {
  if (!p.dropout) {
    return nullptr;
  }
  draw_kept(p, {p.seed_low, p.seed_high}, panel, list, visible.a, visible.b, kept);
  return kept;
}

// Transposes a tile [count, lanes] of places from `a` on to rows of queries: calls f(address, elements, count) for
// contiguous keys. `to` is float32; its first row is the panel's first query.
template <typename F>
MMK_INLINE void each_transposed_block(const Panel& panel, const KeyList& list, i64 a, i64 count, const float* tile,
                                      const View& to, const F& f) {
  for (i64 q = 0; q < panel.count; q += kLanes) {
    for (i64 r = 0; r < count; r += kLanes) {
      const i64 n = least<i64>(kLanes, count - r), key = key_at(list, a + r);
      const bool neighbours = to.d == 1 && key_at(list, a + r + n - 1) - key == n - 1;
      Vec block[kLanes];
      for (i64 i = 0; i < kLanes; ++i) {
        block[i] = i < n ? load(tile + (r + i) * panel.lanes + q) : zero();
      }
      transpose(block);
      for (i64 i = 0; i < least<i64>(kLanes, panel.count - q); ++i) {
        float* row = (float*)to.data + (q + i) * to.l;
        if (neighbours) {
          f(row + key, block[i], n);
        } else {
          for (i64 j = 0; j < n; ++j) {
            f(row + key_at(list, a + r + j) * to.d, set1(block[i][j]), 1);
          }
        }
      }
    }
  }
}

// Keys or values of one tile, converted to the working format at the first use.
class Tile {
public:
  // Scratch; null where what it is for is not called.
  struct Scratch {
    char* copy;             // rows in the working format
    char* pairs = nullptr;  // `columns_from`
    char* zeroed = nullptr; // `zeroed_columns_from`
    char* zeroed_pairs = nullptr;
  };

  Tile(const AttentionParams& p, const View& x, const KeyList& list, i64 kv, i64 cols, const Scratch& scratch)
      : source_(source_of(x, kv / p.key_heads, kv % p.key_heads)), list_(list), cols_(cols), dot_(uses_dot(x.type)),
        scratch_(scratch) {}

  // Moves to the places [first, first + count).
  void move(i64 first, i64 count) {
    first_ = first;
    count_ = count;
    rows_.data = nullptr;
    paired_ = false;
    finite_ = -1;
  }
  Rows rows() {
    if (rows_.data == nullptr) {
      rows_ = fetch(at_keys(source_, list_, first_, count_), count_, cols_, dot_, scratch_.copy);
    }
    return rows_;
  }
  // Rows from place `a` of the list on.
  Rows rows_from(i64 a) {
    const Rows all = rows();
    return {all.data + (a - first_) * all.stride, all.stride};
  }
  // The left operand of a product that sums over this tile's rows: element (channel, row), or (channel, pair of rows).
  // With pairs, `a - first` is even.
  Operand columns_from(i64 a) {
    if (!dot_) {
      const Rows all = rows_from(a);
      if (all.stride % 1024 != 0) {
        return {all.data, 4, all.stride};
      }
      // A column of rows with such a stride falls into few sets of the first-level cache: copy with another stride.
      const i64 apart = padded_row(cols_);
      if (!paired_) {
        const Rows whole = rows();
        for (i64 r = 0; r < count_; ++r) {
          std::memcpy(scratch_.pairs + r * apart, whole.data + r * whole.stride, cols_ * 4);
        }
        paired_ = true;
      }
      return {scratch_.pairs + (a - first_) * apart, 4, apart};
    }
    if (!paired_) {
      interleave_rows(rows(), count_, cols_, scratch_.pairs);
      paired_ = true;
    }
    const i64 stride = pad_lanes(cols_) * 4;
    return {scratch_.pairs + (a - first_) / 2 * stride, 4, stride};
  }
  // The same for `count` rows, with 0 in place of NaN and inf.
  Operand zeroed_columns_from(i64 a, i64 count) {
    const Rows zeroed = zero_non_finite(rows_from(a), count, cols_, dot_, scratch_.zeroed);
    if (!dot_) {
      return {zeroed.data, 4, zeroed.stride};
    }
    interleave_rows(zeroed, count, cols_, scratch_.zeroed_pairs);
    return {scratch_.zeroed_pairs, 4, pad_lanes(cols_) * 4};
  }
  // Whether a product that sums over the visible rows may use them all. A hidden row that is not finite must not reach
  // it: NaN times a weight of 0 is NaN.
  bool is_safe(const VisibleKeys& visible) {
    // The last of an odd number of rows is paired with one that may be hidden.
    const bool all_visible = visible.words == nullptr && !(dot_ && (visible.b - visible.a) % 2 != 0);
    if (!all_visible && finite_ < 0) {
      finite_ = all_finite(rows(), count_, cols_, dot_);
    }
    return all_visible || finite_ != 0;
  }
  bool dot() const {
    return dot_;
  }

  static i64 copy_bytes(bool is_dot, i64 cols, i64 rows = kTileKeys) {
    return rows * row_bytes(is_dot, cols);
  }
  static i64 pairs_bytes(bool is_dot, i64 cols, i64 rows = kTileKeys) {
    return is_dot ? (rows + 1) / 2 * pad_lanes(cols) * 4 : rows * padded_row(cols);
  }

  // Bytes from one copied row of float32 to the next, where columns are read.
  static i64 padded_row(i64 cols) {
    const i64 bytes = round_up(cols * 4, 64) + 64;
    return bytes % 1024 == 0 ? bytes + 64 : bytes;
  }

private:
  Source source_;
  KeyList list_;
  i64 cols_;
  bool dot_;
  Scratch scratch_;
  i64 first_ = 0, count_ = 0;
  Rows rows_{nullptr, 0};
  bool paired_ = false; // `scratch_.pairs` holds pairs of rows, or rows with another stride
  int finite_ = -1;     // -1: not computed yet
};

} // namespace mmkernels::MMK_ISA
