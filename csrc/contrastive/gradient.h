// Gradients: one strip of images against blocks of texts. A tile of logits becomes a tile of their gradients, in both
// orientations and the working format; two products with it give the gradients of the texts and of the images.
#pragma once

#include "strip.h"

namespace mmkernels {
namespace MMK_ISA {

// log(1 + e) for 0 <= e <= 1: 2 atanh(e / (2 + e)), whose series converges fast: the square is at most 1 / 9.
MMK_INLINE Vec log1p_of_unit(Vec e) {
  const Vec z = e / (set1(2.0f) + e), w = z * z;
  Vec p = fma(set1(1.0f / 13), w, set1(1.0f / 11));
  p = fma(p, w, set1(1.0f / 9));
  p = fma(p, w, set1(1.0f / 7));
  p = fma(p, w, set1(1.0f / 5));
  p = fma(p, w, set1(1.0f / 3));
  p = fma(p, w, set1(1.0f));
  return (z + z) * p;
}

struct GradientScratch {
  float *dots, *other;
  std::int32_t *winner, *labels;
  char *texts, *by_text, *by_image;
  float* groups;
  i64 text_stride, image_stride; // bytes of a row of by_text and by_image
  i64 bytes;

  GradientScratch(const ContrastiveParams& p, char* memory) {
    Arena arena{memory};
    const i64 rows = block_rows(p), lanes = strip_lanes(p), several = p.queries > 1 ? 1 : 0;
    const i64 size = is_dot(p) && !several ? 2 : 4;
    // One cache line more than a power of two, whose rows would fall into few sets of a cache.
    text_stride = lanes * size + 64;
    image_stride = rows * size + 64;
    dots = arena.take<float>(rows * kPanel);
    other = arena.take<float>(several * rows * kPanel);
    winner = arena.take<std::int32_t>(several * rows * kPanel);
    labels = arena.take<std::int32_t>(lanes);
    texts = arena.take<char>(copy_bytes(p, rows));
    by_text = arena.take<char>(rows * text_stride);
    by_image = arena.take<char>(several ? 0 : lanes * image_stride);
    groups = arena.take<float>(several ? rows * columns_of(p) : product_depth(p, rows) * kPanel);
    bytes = arena.used;
  }
};
inline i64 gradient_scratch(const ContrastiveParams& p) {
  return most(GradientScratch(p, nullptr).bytes, copy_bytes(p, kPanel));
}

// A strip is packed panel by panel.
inline i64 pieces(const ContrastiveParams& p) {
  return strip_lanes(p) / kPanel;
}
inline void pack(const ContrastiveParams& p, const Strip& strip, i64 piece, float* panels, char* rows, char* scratch) {
  const i64 lane = piece * kPanel, lanes = least<i64>(kPanel, strip.count - lane);
  if (lanes <= 0) {
    return;
  }
  for (i64 query = 0; query < p.queries; ++query) {
    const Source from = source_of(p.image, strip.first + lane, query);
    const Rows working = fetch(from, lanes, p.dim, is_dot(p), scratch);
    transpose_rows(working, lanes, depth_of(p), kPanel, panels + (piece * p.queries + query) * depth_of(p) * kPanel);
    if (rows == nullptr) {
      continue;
    }
    if (p.queries > 1) { // several queries: `add_rows` multiplies single rows in float32
      for (i64 i = 0; i < lanes; ++i) {
        float* to = (float*)rows + ((lane + i) * p.queries + query) * columns_of(p);
        const Source row = source_of(p.image, strip.first + lane + i, query);
        const Rows wide = fetch(row, 1, p.dim, false, scratch);
        for (i64 c = 0; c < p.dim; c += kLanes) {
          store(to + c, load_part(wide.data + c * 4, p.dim - c));
        }
      }
      continue;
    }
    const i64 depth = product_depth(p, padded_lanes(strip));
    for (i64 group = 0; group < groups_of(p); ++group) {
      group_columns(p, working, lanes, kPanel, group, (float*)rows + (group * depth + product_depth(p, lane)) * kPanel);
    }
  }
}

// The gradient by the logits of one text and kLanes images.
struct SoftmaxGradient {
  const ContrastiveParams& p;
  const bool of_images, of_texts, even;
  Vec reference, softmax, positive, even_image; // of the images

  SoftmaxGradient(const ContrastiveParams& p, bool hard)
      : p(p), of_images(p.of_images.reference != nullptr), of_texts(!hard && p.of_texts.reference != nullptr),
        even(p.of_images.even != nullptr || p.of_texts.even != nullptr) {}

  void move(i64 image) {
    const auto at = [&](const float* x) { return x == nullptr ? zero() : load(x + image); };
    reference = at(p.of_images.reference);
    softmax = at(p.of_images.softmax);
    positive = at(p.of_images.positive);
    even_image = at(p.of_images.even);
  }
  // `bits`: the pairs of the same label; `diagonal`: the pair of the same index, if it is among them.
  MMK_INLINE Vec operator()(Vec dot, i64 text, std::uint32_t bits, std::uint32_t diagonal) {
    const Power power = power_of(p, dot);
    Vec g = of_images ? power.over(reference) * softmax : zero();
    if (of_texts) {
      g = fma(power.over(set1(p.of_texts.reference[text])), set1(p.of_texts.softmax[text]), g);
    }
    if (even) {
      g -= even_image;
      if (of_texts && p.of_texts.even != nullptr) {
        g -= set1(p.of_texts.even[text]);
      }
    }
    if (bits != 0) {
      const Vec less = positive + (of_texts ? set1(p.of_texts.positive[text]) : zero());
      g -= choose(p.ignore ? diagonal : bits, less, zero());
      if (p.ignore) {
        g = choose(bits & ~diagonal, zero(), g);
      }
    }
    return g;
  }
};

struct SigmoidGradient {
  const ContrastiveParams& p;
  Vec loss = zero(); // of the last call

  SigmoidGradient(const ContrastiveParams& p, int) : p(p) {}
  void move(i64) {}

  MMK_INLINE Vec operator()(Vec dot, i64, std::uint32_t bits, std::uint32_t) {
    const Vec x = fma(dot, set1(p.scale), set1(p.bias));
    const Vec y = bits == 0 ? -x : choose(bits, x, -x); // its sigmoid should be 1
    const Vec size = y < zero() ? -y : y, e = exp2(size * set1(-kLog2e));
    const Vec over = set1(1.0f) / (set1(1.0f) + e), wrong = y < zero() ? over : e * over;
    loss = (y < zero() ? size : zero()) + log1p_of_unit(e);
    return bits == 0 ? wrong : choose(bits, -wrong, wrong);
  }
};

// Where the gradients of a tile go: rows of texts `by_text`, from the panel's column on, and rows of images `by_image`.
struct TileOut {
  char* by_text;
  i64 text_stride;
  char* by_image; // null: not needed
  i64 image_stride;
  bool dot;
  float factor;
};

template <typename Gradient>
void gradient_tile(const ContrastiveParams& p, bool hard, i64 row, i64 rows, i64 lane, i64 lanes,
                   const std::int32_t* labels, const float* dots, const TileOut& out, GradientSums& sums) {
  Gradient gradient(p, hard);
  constexpr bool kSigmoid = std::is_same<Gradient, SigmoidGradient>::value;
  const bool matches = may_match(p, hard, row, rows, lane, lanes);
  const Vec factor = set1(out.factor), middle = set1(p.middle);
  for (int v = 0; v < kVectors; ++v) {
    const std::uint32_t live = live_bits(v * kLanes, lanes);
    const bool whole = live == live_bits(0, kLanes);
    gradient.move(lane + v * kLanes);
    Vec of_scale = zero(), of_bias = zero();
    for (i64 first = 0; first < rows; first += kLanes) {
      Vec block[kLanes];
      Vec loss = zero(); // a short sum: in a long one, equal terms would all be rounded in the same direction
      for (i64 n = 0; n < kLanes; ++n) {
        const i64 r = first + n;
        if (r >= rows) {
          block[n] = zero();
          continue;
        }
        std::uint32_t bits = 0, diagonal = 0;
        if (matches) {
          bits = match_bits(p, hard, row + r, lane, lanes, labels, v);
          diagonal = bits & diagonal_bit(row + r, lane, v);
        }
        const Vec dot = load(dots + r * kPanel + v * kLanes);
        Vec g = gradient(dot, row + r, bits, diagonal);
        if (!whole) {
          g = choose(live, g, zero());
        }
        of_scale = fma(g, whole ? dot - middle : choose(live, dot - middle, zero()), of_scale);
        if constexpr (kSigmoid) {
          of_bias += g;
          loss += whole ? gradient.loss : choose(live, gradient.loss, zero());
        }
        block[n] = g * factor;
        char* to = out.by_text + r * out.text_stride + v * kLanes * (out.dot ? 2 : 4);
        if (out.dot) {
          store_bf16((std::uint16_t*)to, block[n]);
        } else {
          store(to, block[n]);
        }
      }
      if constexpr (kSigmoid) {
        sums.loss += sum(loss);
      }
      if (out.by_image != nullptr) {
        transpose(block);
        for (i64 n = 0; n < kLanes; ++n) {
          char* to = out.by_image + (v * kLanes + n) * out.image_stride + first * (out.dot ? 2 : 4);
          if (out.dot) {
            store_bf16((std::uint16_t*)to, block[n]);
          } else {
            store(to, block[n]);
          }
        }
      }
    }
    sums.scale += sum(of_scale);
    sums.bias += sum(of_bias);
  }
}

// Several queries: each pair's gradient goes to the winner, row by row.
inline void add_rows(const ContrastiveParams& p, const float* gradients, i64 stride, const std::int32_t* winner,
                     i64 rows, i64 lanes, const float* image_rows, const float* text_rows, float* of_images,
                     float* of_texts) {
  const i64 columns = columns_of(p);
  multiplied_here() += 2 * rows * lanes * columns * ((of_images != nullptr) + (of_texts != nullptr));
  for (i64 r = 0; r < rows; ++r) {
    const float* text = text_rows + r * columns;
    for (i64 i = 0; i < lanes; ++i) {
      const i64 at = (i * p.queries + winner[r * kPanel + i]) * columns;
      const Vec g = set1(gradients[r * stride + i]);
      for (i64 c = 0; of_images != nullptr && c < columns; c += kLanes) {
        store(of_images + at + c, fma(g, load(text + c), load(of_images + at + c)));
      }
      for (i64 c = 0; of_texts != nullptr && c < columns; c += kLanes) {
        float* to = of_texts + r * p.dim + c;
        store_part(to, fma(g, load(image_rows + at + c), load_part(to, p.dim - c)), p.dim - c);
      }
    }
  }
}

template <bool kDot>
void products(const ContrastiveParams& p, const Strip& strip, const GradientScratch& s, Rows texts, i64 rows, bool hard,
              i64 row, bool first, bool first_block, float* part) {
  const i64 lanes = padded_lanes(strip), over_lanes = product_depth(p, lanes), over_rows = product_depth(p, rows);
  for (i64 group = 0; group < groups_of(p); ++group) {
    const i64 vectors = vectors_of(p, group), columns = p.dim - group * kPanel; // left
    if (p.need_rows[hard]) {
      const Operand a{s.by_text, s.text_stride, 4};
      const float* b = (const float*)strip.rows + group * over_lanes * kPanel;
      float* to = p.grad_rows[hard] + row * p.dim + group * kPanel;
      if (columns >= vectors * kLanes) {
        product<kDot>(a, b, to, p.dim, rows, vectors, over_lanes, !first);
      } else { // a whole vector would pass the end of the row
        product<kDot>(a, b, s.dots, kPanel, rows, vectors, over_lanes, false);
        for (i64 r = 0; r < rows; ++r) {
          for (i64 c = 0; c < columns; c += kLanes) {
            float* at = to + r * p.dim + c;
            const Vec more = load(s.dots + r * kPanel + c);
            store_part(at, first ? more : load_part(at, columns - c) + more, columns - c);
          }
        }
      }
    }
    if (p.need_image) {
      group_columns(p, texts, rows, rows, group, s.groups);
      product<kDot>({s.by_image, s.image_stride, 4}, s.groups, part + group * strip_lanes(p) * kPanel, kPanel,
                    strip.count, vectors, over_rows, !first_block);
    }
  }
}

inline i64 part_floats(const ContrastiveParams& p) {
  return strip_lanes(p) * (p.queries > 1 ? p.queries * columns_of(p) : groups_of(p) * kPanel);
}

template <typename Gradient>
void gradient_of(const ContrastiveParams& p, const Strip& strip, const Task& task, bool first, float* part,
                 GradientSums& sums, char* scratch) {
  const GradientScratch s(p, scratch);
  const Features& features = texts_of(p, task.hard);
  const bool several = p.queries > 1, dot = is_dot(p) && !several;
  const bool wanted = p.need_image || p.need_rows[task.hard];
  const i64 step = block_rows(p), columns = columns_of(p);
  if (several && p.need_image) {
    std::memset(part, 0, part_floats(p) * sizeof(float));
  }
  if (several && first && p.need_rows[task.hard]) {
    std::memset(p.grad_rows[task.hard] + task.first * p.dim, 0, (task.last - task.first) * p.dim * sizeof(float));
  }
  for (i64 lane = 0; lane < strip.count; lane += kPanel) {
    panel_labels(p, strip.first + lane, least<i64>(kPanel, strip.count - lane), s.labels + lane);
  }
  for (i64 row = task.first; row < task.last; row += step) {
    const i64 rows = least(step, task.last - row);
    const Rows texts = fetch(source_of(features, row), rows, p.dim, is_dot(p), s.texts);
    if (several && wanted) {
      for (i64 r = 0; r < rows; ++r) {
        for (i64 c = 0; c < p.dim; c += kLanes) {
          const Vec x = is_dot(p) ? load_as_f32(texts.data + r * texts.stride + c * 2, Type::bf16, p.dim - c)
                                  : load_part(texts.data + r * texts.stride + c * 4, p.dim - c);
          store(s.groups + r * columns + c, x);
        }
      }
    }
    for (i64 lane = 0; lane < strip.count; lane += kPanel) {
      const i64 lanes = least<i64>(kPanel, strip.count - lane);
      const float* panel = strip.panels + lane * p.queries * depth_of(p);
      panel_dots(p, texts, rows, panel, lanes, s.dots, s.other, several ? s.winner : nullptr);
      const TileOut out{s.by_text + lane * (dot ? 2 : 4),
                        s.text_stride,
                        several || !p.need_image ? nullptr : s.by_image + lane * s.image_stride,
                        s.image_stride,
                        dot,
                        p.factor};
      gradient_tile<Gradient>(p, task.hard, row, rows, strip.first + lane, lanes, s.labels + lane, s.dots, out, sums);
      if (several && wanted) {
        const i64 at = lane * p.queries * columns;
        add_rows(p, (const float*)out.by_text, s.text_stride / 4, s.winner, rows, lanes, (const float*)strip.rows + at,
                 s.groups, p.need_image ? part + at : nullptr,
                 p.need_rows[task.hard] ? p.grad_rows[task.hard] + row * p.dim : nullptr);
      }
    }
    if (!several && wanted) {
      if (dot) {
        products<kHasDot>(p, strip, s, texts, rows, task.hard, row, first, row == task.first, part);
      } else {
        products<false>(p, strip, s, texts, rows, task.hard, row, first, row == task.first, part);
      }
    }
  }
}

inline void gradient(const ContrastiveParams& p, const Strip& strip, const Task& task, bool first, float* part,
                     GradientSums& sums, char* scratch) {
  if (p.sigmoid) {
    gradient_of<SigmoidGradient>(p, strip, task, first, part, sums, scratch);
  } else {
    gradient_of<SoftmaxGradient>(p, strip, task, first, part, sums, scratch);
  }
}

inline void convert(const ContrastiveParams& p, const float* from, i64 rows, Type type, char* to) {
  const i64 size = bytes_of(type);
  for (i64 r = 0; r < rows; ++r) {
    for (i64 c = 0; c < p.dim; c += kLanes) {
      store_from_f32(to + (r * p.dim + c) * size, type, load_part(from + r * p.dim + c, p.dim - c), p.dim - c);
    }
  }
}

inline void merge(const ContrastiveParams& p, const Strip& strip, const float* parts, i64 count, i64 first, i64 last,
                  Type type, char* to) {
  const i64 size = bytes_of(type), lanes = strip_lanes(p), apart = part_floats(p);
  for (i64 i = first; i < last; ++i) {
    for (i64 query = 0; query < p.queries; ++query) {
      char* row = to + ((strip.first + i) * p.queries + query) * p.dim * size;
      for (i64 c = 0; c < p.dim; c += kLanes) {
        const i64 at = p.queries > 1 ? (i * p.queries + query) * columns_of(p) + c
                                     : (c / kPanel * lanes + i) * kPanel + c % kPanel;
        Vec total = load(parts + at);
        for (i64 n = 1; n < count; ++n) {
          total += load(parts + n * apart + at);
        }
        store_from_f32(row + c * size, type, total, p.dim - c);
      }
    }
  }
}

} // namespace MMK_ISA
} // namespace mmkernels
