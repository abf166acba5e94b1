// Dots of texts with a panel of images: packed panels, deep rows step by step, few rows along their channels.
#pragma once

#include "strip.h"

namespace mmkernels::MMK_ISA {

// Images [first, first + lanes) as the right operand of products. Products in steps have not packed them: `packed` is
// null.
struct Panel {
  const float* packed;
  i64 first, lanes;
};
// Where a step of rows is packed and copied.
struct StepScratch {
  float* panel;
  char *images, *texts;
};

// Writes the dots of packed columns to a tile, or adds them.
inline void add_dots(const ContrastiveParams& p, Rows texts, i64 rows, const float* panel, i64 panel_row, i64 vectors,
                     i64 depth, float* tile, bool add) {
  const Operand a{texts.data, texts.stride, 4};
  if (is_dot(p)) {
    product<kHasDot>(a, panel, panel_row, tile, kPanel, rows, vectors, depth, add);
    return;
  }
  for (i64 k = 0; k < depth; k += kChain) {
    product<false>({a.data + k * 4, a.row, 4}, panel + k * panel_row, panel_row, tile, kPanel, rows, vectors,
                   least(kChain, depth - k), add || k > 0);
  }
}

// Sums of products along kLanes channels at a time, of kTexts x kImages pairs of rows: at [t * kImages + i] that of
// text t and image i, or at [i] that of text i and image i (kPaired). Each is the same sum in the same order.
template <bool kDot, int kTexts, int kImages, bool kPaired = false>
MMK_INLINE Vec channel_dots(const char* const* texts, const char* const* images, i64 depth) {
  Vec acc[kLanes] = {};
  const auto add = [&](i64 k, i64 count) {
    Vec x[kImages];
#pragma GCC unroll 16
    for (int i = 0; i < kImages; ++i) {
      x[i] = load_part(images[i] + k * 4, count);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTexts; ++t) {
      const Vec y = load_part(texts[t] + k * 4, count);
      if constexpr (kPaired) {
        acc[t] = multiply_add<kDot>(y, x[t], acc[t]);
        continue;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kImages && !kPaired; ++i) {
        acc[t * kImages + i] = multiply_add<kDot>(y, x[i], acc[t * kImages + i]);
      }
    }
  };
  i64 k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    add(k, kLanes);
  }
  if (k < depth) {
    add(k, depth - k);
  }
  return sum_each(acc);
}

// Adds dots of few rows to a tile, kTexts x kImages at a time.
template <bool kDot, int kTexts, int kImages>
void add_few_dots(Rows texts, i64 rows, Rows images, i64 lanes, i64 depth, float* tile) {
  for (i64 r = 0; r < rows; r += kTexts) {
    const char* text[kTexts];
    for (int t = 0; t < kTexts; ++t) { // the last row stands for those past the end
      text[t] = texts.data + least(r + t, rows - 1) * texts.stride;
    }
    for (i64 first = 0; first < lanes; first += kImages) {
      const char* image[kImages];
      for (int i = 0; i < kImages; ++i) {
        image[i] = images.data + least(first + i, lanes - 1) * images.stride;
      }
      const Vec sums = channel_dots<kDot, kTexts, kImages>(text, image, depth);
      for (i64 n = 0; n < least<i64>(kTexts, rows - r) * kImages; ++n) {
        tile[(r + n / kImages) * kPanel + first + n % kImages] += sums[n];
      }
    }
  }
}
template <bool kDot> void add_few_dots(Rows texts, i64 rows, Rows images, i64 lanes, i64 depth, float* tile) {
  multiplied_here() += 2 * rows * lanes * depth * (kDot ? 2 : 1);
  if (rows == 1 && lanes == 1) {
    add_few_dots<kDot, 1, 1>(texts, rows, images, lanes, depth, tile);
  } else if (rows == 1) {
    add_few_dots<kDot, 1, 4>(texts, rows, images, lanes, depth, tile);
  } else if (lanes == 1) {
    add_few_dots<kDot, 4, 1>(texts, rows, images, lanes, depth, tile);
  } else {
    add_few_dots<kDot, kLanes / 4, 4>(texts, rows, images, lanes, depth, tile);
  }
}

// Products step by step.
inline void step_dots(const ContrastiveParams& p, Source texts, i64 rows, const Panel& panel, float* tile,
                      const StepScratch& s) {
  const i64 vectors = vectors_of_lanes(panel.lanes), step = step_columns(p);
  const Source images = source_of(p.image, panel.first);
  if (has_few_rows(p)) {
    std::memset(tile, 0, rows * kPanel * sizeof(float));
  }
  for (i64 first = 0; first < p.dim; first += step) {
    const i64 cols = least(step, p.dim - first), depth = depth_of(is_dot(p), cols);
    const Rows some = fetch(from_column(texts, first), rows, cols, is_dot(p), s.texts);
    if (has_few_rows(p)) {
      const Rows of_images = fetch(from_column(images, first), panel.lanes, cols, is_dot(p), s.images);
      with_pairs(is_dot(p),
                 [&](auto pairs) { add_few_dots<pairs()>(some, rows, of_images, panel.lanes, depth, tile); });
      continue;
    }
    pack_panel(p, from_column(images, first), panel.lanes, cols, vectors * kLanes, s.panel, s.images);
    add_dots(p, some, rows, s.panel, vectors * kLanes, vectors, depth, tile, first > 0);
  }
}

// Text n of those that belong to the images from `first_image` on: of an index, or the right answer.
MMK_INLINE Source paired_text(const ContrastiveParams& p, const std::int32_t* texts, i64 first_image, i64 n) {
  return p.right.data != nullptr ? source_of(p.right, first_image + n) : source_of(p.text, texts[n]);
}
// Of each of `count` images, as few, the dot with one text, as `add_few_dots` computes it.
inline Vec paired_dots(const ContrastiveParams& p, const std::int32_t* texts, i64 first_image, i64 count,
                       const StepScratch& s) {
  Vec total = zero();
  for (i64 first = 0, step = step_columns(p); first < p.dim; first += step) {
    const i64 cols = least(step, p.dim - first), depth = depth_of(is_dot(p), cols);
    const Rows images = fetch(from_column(source_of(p.image, first_image), first), count, cols, is_dot(p), s.images);
    const char *text[kLanes], *image[kLanes];
    for (i64 i = 0; i < kLanes; ++i) {
      const i64 n = least(i, count - 1);
      char* copy = s.texts + n * row_bytes(is_dot(p), step);
      text[i] = i > n ? text[n]
                      : fetch(from_column(paired_text(p, texts, first_image, n), first), 1, cols, is_dot(p), copy).data;
      image[i] = images.data + n * images.stride;
    }
    with_pairs(is_dot(p), [&](auto pairs) {
      total += count == 1 ? channel_dots<pairs(), 1, 1>(text, image, depth)
                          : channel_dots<pairs(), kLanes, kLanes, true>(text, image, depth);
    });
  }
  multiplied_here() += 2 * count * p.dim;
  return total;
}

// Dots [rows, kPanel] of texts with a panel; lanes without an image hold 0 or padding. Of several queries the largest
// dot, and if `winner` is given, the index of its query. `whole`: the texts, unless there are steps. `other` is a tile
// of scratch.
inline void panel_dots(const ContrastiveParams& p, Source texts, Rows whole, i64 rows, const Panel& panel, float* to,
                       float* other, std::int32_t* winner, const StepScratch& s) {
  const i64 vectors = vectors_of_lanes(panel.lanes), depth = depth_of(p);
  const auto multiply = [&](i64 query, float* tile) {
    if (panel.packed == nullptr) {
      step_dots(p, texts, rows, panel, tile, s);
    } else {
      const float* packed = panel.packed + query * depth * panel_lanes(p);
      add_dots(p, whole, rows, packed, panel_lanes(p), vectors, depth, tile, false);
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

} // namespace mmkernels::MMK_ISA
