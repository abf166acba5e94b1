// Sizes of strips and blocks, and the tile of logits that all passes share.
#pragma once

#include "../common/rows.h"
#include "../common/tile_gemm.h"
#include "params.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kMaxLanes = 256; // images of a strip
constexpr i64 kMaxRows = 128;  // texts of a block

MMK_INLINE bool is_dot(const ContrastiveParams& p) {
  return uses_dot(p.image.type);
}
MMK_INLINE i64 depth_of(const ContrastiveParams& p) {
  return depth_of(is_dot(p), p.dim);
}
inline i64 columns_of(const ContrastiveParams& p) {
  return pad_lanes(p.dim);
}
// Images of a full strip: as many as keep its panels in cache.
inline i64 strip_lanes(const ContrastiveParams& p) {
  const i64 fit = (1 << 20) / (p.queries * depth_of(p) * 4) / kPanel * kPanel;
  return most<i64>(kPanel, least(least(fit, kMaxLanes), round_up(p.image.count, kPanel)));
}
inline i64 block_rows(const ContrastiveParams& p) {
  const i64 fit = (1 << 18) / (columns_of(p) * 4) / kLanes * kLanes;
  return most<i64>(kLanes, least(fit, kMaxRows));
}
// Groups of columns that a product of gradients computes together.
MMK_INLINE i64 groups_of(const ContrastiveParams& p) {
  return (columns_of(p) + kPanel - 1) / kPanel;
}
MMK_INLINE i64 vectors_of(const ContrastiveParams& p, i64 group) {
  return least<i64>(kVectors, columns_of(p) / kLanes - group * kVectors);
}
MMK_INLINE i64 padded_lanes(const Strip& strip) {
  return round_up(strip.count, kPanel);
}
MMK_INLINE i64 vectors_of_lanes(i64 lanes) {
  return (lanes + kLanes - 1) / kLanes;
}

// FLOP of this thread's products since the last take_multiplied().
inline i64& multiplied_here() {
  static thread_local i64 flops = 0;
  return flops;
}
inline i64 take_multiplied() {
  const i64 flops = multiplied_here();
  multiplied_here() = 0;
  return flops;
}
// A counted gemm.
template <bool kDot>
void product(Operand a, const void* b, float* c, i64 c_row, i64 rows, i64 vectors, i64 depth, bool add) {
  multiplied_here() += 2 * rows * vectors * kLanes * depth * (kDot ? 2 : 1);
  gemm<kDot>(a, b, kPanel * 4, c, c_row, rows, vectors, depth, add);
}

// Row r of query q.
MMK_INLINE Source source_of(const Features& x, i64 row, i64 query = 0) {
  return {x.data + (row * x.row + query * x.query) * bytes_of(x.type), x.type, x.row, x.column, nullptr};
}
MMK_INLINE const Features& texts_of(const ContrastiveParams& p, bool hard) {
  return !hard ? p.text : p.hard;
}

// The depth of a product that sums over so many rows of features.
MMK_INLINE i64 product_depth(const ContrastiveParams& p, i64 rows) {
  return is_dot(p) ? (rows + 1) / 2 : rows;
}

inline i64 panels_bytes(const ContrastiveParams& p) {
  return strip_lanes(p) * p.queries * depth_of(p) * 4;
}
// The rows of a strip for products: [groups, lanes (or pairs of lanes), kPanel]; with several queries [lanes, queries,
// columns] in float32.
inline i64 rows_bytes(const ContrastiveParams& p) {
  const i64 lanes = strip_lanes(p);
  if (p.queries > 1) {
    return lanes * p.queries * columns_of(p) * 4;
  }
  return groups_of(p) * product_depth(p, lanes) * kPanel * 4;
}

// Copies a group of columns of `count` rows to the right operand of a product over rows: [rows (or pairs of rows),
// kPanel], with zeros for the rows from `count` to `padded`.
inline void group_columns(const ContrastiveParams& p, Rows rows, i64 count, i64 padded, i64 group, float* to) {
  const i64 first = group * kPanel, cols = least<i64>(kPanel, p.dim - first);
  if (is_dot(p)) {
    for (i64 r = 0; r < padded; r += 2, to += kPanel) {
      if (r < count) {
        interleave_rows({rows.data + r * rows.stride + first * 2, rows.stride}, least<i64>(2, count - r), cols,
                        (char*)to);
      } else {
        std::memset(to, 0, kPanel * 4);
      }
    }
    return;
  }
  for (i64 r = 0; r < padded; ++r, to += kPanel) {
    const char* from = rows.data + r * rows.stride + first * 4;
    for (i64 c = 0; c < cols; c += kLanes) {
      store(to + c, r < count ? load_part(from + c * 4, cols - c) : zero());
    }
  }
}

// Transposes one panel of one query; returns its rows in the working format.
MMK_OUTLINE Rows pack_panel(const ContrastiveParams& p, i64 first, i64 count, i64 query, float* to, char* copy) {
  const Rows rows = fetch(source_of(p.image, first, query), count, p.dim, is_dot(p), copy);
  transpose_rows(rows, count, depth_of(p), kPanel, to);
  return rows;
}
MMK_INLINE i64 copy_bytes(const ContrastiveParams& p, i64 rows) {
  return rows * row_bytes(is_dot(p), p.dim);
}

// 2^logit as a fraction near 1 times 2^whole: dividing by 2^base, for a whole base, rounds nothing.
struct Power {
  Vec fraction, whole;

  MMK_INLINE Vec over(Vec base) const {
    const Vec n = whole - base;
    return times_exp2(fraction, n, n);
  }
};
MMK_INLINE Power power_of(const ContrastiveParams& p, Vec dot) {
  const Vec high = set1(p.high), n = round_to_whole(dot * high);
  const Vec f = fma(dot, set1(p.low), fma_exact(dot, high, -n));
  // |f| exceeds 1/2 only for logits of millions, which float32 rounds to whole numbers: there the rounded logit counts.
  return {exp2_of_fraction(f * f > 0.5625f ? zero() : f), n};
}

constexpr i64 kChain = 128; // products that are summed in one float32 chain; longer chains round more than a BLAS does

// Dots [rows, kPanel] of texts with a panel of `lanes` images; other lanes hold 0 or padding. Of several queries the
// largest dot, and if `winner` is given, the index of its query. `other` is a tile of scratch.
inline void panel_dots(const ContrastiveParams& p, Rows texts, i64 rows, const float* panel, i64 lanes, float* to,
                       float* other, std::int32_t* winner) {
  const i64 vectors = vectors_of_lanes(lanes);
  const i64 depth = depth_of(p);
  const auto multiply = [&](i64 query, float* tile) {
    const Operand a{texts.data, texts.stride, 4};
    const float* b = panel + query * depth * kPanel;
    if (is_dot(p)) {
      product<kHasDot>(a, b, tile, kPanel, rows, vectors, depth, false);
    } else {
      for (i64 k = 0; k < depth; k += kChain) {
        product<false>({a.data + k * 4, a.row, 4}, b + k * kPanel, tile, kPanel, rows, vectors,
                       least(kChain, depth - k), k > 0);
      }
    }
    for (i64 r = 0; vectors < kVectors && r < rows; ++r) {
      std::memset(tile + r * kPanel + vectors * kLanes, 0, (kVectors - vectors) * sizeof(Vec));
    }
  };
  multiply(0, to);
  if (p.queries == 1) {
    return;
  }
  if (winner != nullptr) {
    std::memset(winner, 0, rows * kPanel * sizeof(std::int32_t));
  }
  for (i64 query = 1; query < p.queries; ++query) {
    multiply(query, other);
    for (i64 n = 0; n < rows * kPanel; n += kLanes) {
      const Vec old = load(to + n), query_dots = load(other + n);
      const IVec larger = (query_dots > old) | (query_dots != query_dots);
      store(to + n, larger ? query_dots : old);
      if (winner != nullptr) {
        const IVec index = (std::int32_t)query - IVec{};
        store(winner + n, (Vec)(larger ? index : (IVec)load(winner + n)));
      }
    }
  }
}

// The labels of a panel's images, -1 past the last.
inline void panel_labels(const ContrastiveParams& p, i64 first, i64 count, std::int32_t* to) {
  for (i64 i = 0; i < kPanel; ++i) {
    to[i] = i >= count ? -1 : (p.image_label != nullptr ? p.image_label[first + i] : (std::int32_t)(first + i));
  }
}

constexpr std::uint32_t kAllLanes = (std::uint32_t)((1ull << kLanes) - 1);

// The tile of logits of a block of texts and a panel of images. Vector v of the panel: its images from v * kLanes on.
struct LogitTile {
  const ContrastiveParams& p;
  bool hard;                  // the texts are hard texts
  i64 row, rows;              // the first text, and how many there are
  i64 lane, lanes;            // the first image, and how many there are
  const std::int32_t* labels; // of the images, -1 past the last
  float* dots;                // [rows, kPanel]

  // Whether any pair may have the same label.
  MMK_INLINE bool may_match() const {
    return hard ? p.hard_label != nullptr : (p.image_label != nullptr || (row < lane + lanes && lane < row + rows));
  }
  // The images of vector v, as low bits.
  MMK_INLINE std::uint32_t live(i64 v) const {
    const i64 left = lanes - v * kLanes;
    return left <= 0 ? 0 : (left >= kLanes ? kAllLanes : (1u << left) - 1);
  }
  // The image of vector v that has text r's index, if it is there; none has a hard text's.
  MMK_INLINE std::uint32_t diagonal(i64 r, i64 v) const {
    const i64 i = row + r - lane - v * kLanes;
    return !hard && i >= 0 && i < kLanes ? 1u << i : 0;
  }
  // Text r's label; that of a hard text without one is -2, which no image has.
  MMK_INLINE std::int32_t label(i64 r) const {
    if (hard) {
      return p.hard_label != nullptr ? p.hard_label[row + r] : -2;
    }
    return p.text_label != nullptr ? p.text_label[row + r] : (std::int32_t)(row + r);
  }
  // The images of vector v that have text r's label or are its positive.
  MMK_INLINE std::uint32_t matches(i64 r, i64 v) const {
    return matches(r, v, label(r));
  }
  MMK_INLINE std::uint32_t matches(i64 r, i64 v, std::int32_t label) const {
    std::uint32_t bits = bits_of((IVec)load(labels + v * kLanes) == label - IVec{});
    if (p.ignore) { // the positive's label may be another
      bits |= diagonal(r, v) & live(v);
    }
    return bits;
  }
};

} // namespace mmkernels::MMK_ISA
