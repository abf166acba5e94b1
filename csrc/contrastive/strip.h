// Sizes of strips and blocks, and the tile of logits that all passes share.
#pragma once

#include "../common/product.h"
#include "params.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kMaxLanes = 256;  // images of a strip
constexpr i64 kMaxRows = 128;   // texts of a block
constexpr i64 kMaxDepth = 1024; // the depth of rows that are packed as a whole
constexpr i64 kDepthStep = 512; // the depth that is packed at a time of deeper ones: with a block it fits into a cache
constexpr i64 kFewRows = kLanes / 2; // with so few images or texts, channels are lanes: images would leave most empty

MMK_INLINE bool is_dot(const ContrastiveParams& p) {
  return uses_dot(p.image.type);
}
MMK_INLINE i64 depth_of(const ContrastiveParams& p) {
  return depth_of(is_dot(p), p.dim);
}
inline i64 columns_of(const ContrastiveParams& p) {
  return pad_lanes(p.dim);
}
MMK_INLINE bool has_few_rows(const ContrastiveParams& p) {
  return p.queries == 1 && depth_of(p) >= kLanes &&
         ((p.few_images && p.image.count <= kFewRows) || (p.few_texts && most(p.text.count, p.hard.count) <= kFewRows));
}
// Whether products go over their depth step by step. Rows that are too deep for the cache are packed then, each time
// that they are multiplied, which costs little beside the product with the texts of a block; few rows are not packed.
MMK_INLINE bool in_steps(const ContrastiveParams& p) {
  return has_few_rows(p) || (p.queries == 1 && depth_of(p) > kMaxDepth);
}
// Columns that are packed at a time.
MMK_INLINE i64 step_columns(const ContrastiveParams& p) {
  return in_steps(p) ? least(p.dim, kDepthStep * (is_dot(p) ? 2 : 1)) : p.dim;
}
// Images of a packed panel, in whole vectors: fewer where there are few.
MMK_INLINE i64 panel_lanes(const ContrastiveParams& p) {
  return least<i64>(kPanel, round_up(p.image.count, kLanes));
}
// Images of a full strip: as many as keep its panels in cache.
inline i64 strip_lanes(const ContrastiveParams& p) {
  const i64 fit = (1 << 20) / (p.queries * depth_of(p) * 4) / kPanel * kPanel;
  const i64 all = p.image.count < kPanel ? panel_lanes(p) : round_up(p.image.count, kPanel);
  return most(panel_lanes(p), least(least(fit, kMaxLanes), all));
}
inline i64 block_rows(const ContrastiveParams& p) {
  if (in_steps(p)) {
    return least(kMaxRows, round_up(most(p.text.count, p.hard.count), kLanes));
  }
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

// Panels are [depth, panel_lanes]; products in steps have none.
inline i64 panels_bytes(const ContrastiveParams& p) {
  return in_steps(p) ? 0 : strip_lanes(p) * p.queries * depth_of(p) * 4;
}
// The rows of a strip for products: [groups, images (or pairs of images), kPanel]; with several queries [images,
// queries, columns] in float32.
inline i64 rows_bytes(const ContrastiveParams& p) {
  const i64 lanes = strip_lanes(p);
  if (in_steps(p)) {
    return 0;
  }
  if (p.queries > 1) {
    return lanes * p.queries * columns_of(p) * 4;
  }
  return groups_of(p) * product_depth(p, least(lanes, p.image.count)) * kPanel * 4;
}

// Columns of a group.
MMK_INLINE i64 columns_of(const ContrastiveParams& p, i64 group) {
  return least<i64>(kPanel, p.dim - group * kPanel);
}
// `rows` from the first column of a group on.
MMK_INLINE Rows from_group(const ContrastiveParams& p, Rows rows, i64 group) {
  return {rows.data + group * kPanel * (is_dot(p) ? 2 : 4), rows.stride};
}
// Transposes `cols` columns of one panel of one query, whose rows are `lanes` long; returns the columns in the working
// format.
MMK_OUTLINE Rows pack_panel(const ContrastiveParams& p, Source images, i64 count, i64 cols, i64 lanes, float* to,
                            char* copy) {
  const Rows rows = fetch(images, count, cols, is_dot(p), copy);
  transpose_rows(rows, count, depth_of(is_dot(p), cols), lanes, to);
  return rows;
}
// Of a copy of rows in the working format: as many columns as are packed at a time.
MMK_INLINE i64 copy_bytes(const ContrastiveParams& p, i64 rows) {
  return rows * row_bytes(is_dot(p), step_columns(p));
}
// The rows of texts as a whole, in the working format; products in steps fetch theirs.
MMK_INLINE Rows fetch_whole(const ContrastiveParams& p, Source texts, i64 count, char* to) {
  return in_steps(p) ? Rows{nullptr, 0} : fetch(texts, count, p.dim, is_dot(p), to);
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

constexpr std::int32_t kNoImage = INT32_MIN; // the label past the last image, which no text has

// The labels of a panel's images.
inline void panel_labels(const ContrastiveParams& p, i64 first, i64 count, std::int32_t* to) {
  for (i64 i = 0; i < kPanel; ++i) {
    to[i] = i >= count ? kNoImage : (p.image_label != nullptr ? p.image_label[first + i] : (std::int32_t)(first + i));
  }
}

constexpr std::uint32_t kAllLanes = (std::uint32_t)((1ull << kLanes) - 1);

// The tile of logits of a block of texts and a panel of images. Vector v of the panel: its images from v * kLanes on.
struct LogitTile {
  const ContrastiveParams& p;
  bool hard;                        // the texts are hard texts
  i64 row, rows;                    // the first text, and how many there are
  i64 lane, lanes;                  // the first image, and how many there are
  const std::int32_t* labels;       // of the images, see `panel_labels`
  float* dots;                      // [rows, kPanel]
  i64 partner = p.first_text + row; // the first text's

  // Whether any pair may have the same label.
  MMK_INLINE bool may_match() const {
    return hard ? p.hard_label != nullptr
                : (p.image_label != nullptr || (partner < lane + lanes && lane < partner + rows));
  }
  // The images of vector v, as low bits.
  MMK_INLINE std::uint32_t live(i64 v) const {
    const i64 left = lanes - v * kLanes;
    return left <= 0 ? 0 : (left >= kLanes ? kAllLanes : (1u << left) - 1);
  }
  // The image of vector v that is text r's partner, if it is there; no hard text has one.
  MMK_INLINE std::uint32_t diagonal(i64 r, i64 v) const {
    const i64 i = partner + r - lane - v * kLanes;
    return !hard && i >= 0 && i < kLanes ? 1u << i : 0;
  }
  // Text r's label; that of a hard text without one is -2, which no image has.
  MMK_INLINE std::int32_t label(i64 r) const {
    if (hard) {
      return p.hard_label != nullptr ? p.hard_label[row + r] : -2;
    }
    return p.text_label != nullptr ? p.text_label[row + r] : (std::int32_t)(partner + r);
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
