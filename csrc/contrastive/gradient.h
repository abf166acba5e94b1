// Gradients: one strip of images against blocks of texts. A tile of logits becomes a tile of their gradients, in both
// orientations and the working format; two products with it give the gradients of the texts and of the images.
#pragma once

#include "dots.h"
#include "winners.h"

namespace mmkernels::MMK_ISA {

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

// Scratch of one task. Members are taken in the order of their declaration.
struct GradientScratch : Arena {
  const ContrastiveParams& p;
  const i64 rows = block_rows(p), lanes = strip_lanes(p);
  const bool several = p.queries > 1;
  const bool dot = is_dot(p) && !several; // of the products: gradients are bfloat16
  const i64 size = dot ? 2 : 4;
  // Bytes of a row: one cache line more than a power of two, whose rows would fall into few sets of a cache.
  const i64 text_stride = lanes * size + 64, image_stride = rows * size + 64;
  float* dots = take<float>(rows * kPanel);
  float* other = take<float>(several ? rows * kPanel : 0);
  std::int32_t* winner = take<std::int32_t>(several ? rows * kPanel : 0);
  WinnerOrder order{take<std::int32_t>(several ? rows : 0), take<std::int32_t>(several ? p.queries : 0)};
  std::int32_t* labels = take<std::int32_t>(round_up(lanes, kPanel));
  char* texts = take<char>(copy_bytes(p, rows));
  // Of products in steps: of a panel, its copy, and a group of columns of the strip.
  float* panel = take<float>(in_steps(p) ? kDepthStep * kPanel : 0);
  char* images = take<char>(in_steps(p) ? most(copy_bytes(p, kPanel), lanes* row_bytes(is_dot(p), kPanel)) : 0);
  float* strip_group = take<float>(in_steps(p) ? product_depth(p, lanes) * kPanel : 0);
  char* by_text = take<char>(rows * text_stride);
  char* by_image = take<char>(several ? 0 : lanes * image_stride);
  float* groups = take<float>(several ? rows * columns_of(p) : product_depth(p, rows) * kPanel);

  StepScratch step() const {
    return {panel, images, texts};
  }
};
// Images of a strip's gradient.
inline i64 part_lanes(const ContrastiveParams& p) {
  return least(strip_lanes(p), p.image.count);
}
// Images `lane` to lane + lanes of a strip, from a whole panel on.
inline Panel panel_of(const ContrastiveParams& p, const Strip& strip, i64 lane, i64 lanes) {
  const float* packed = in_steps(p) ? nullptr : strip.panels + lane * p.queries * depth_of(p);
  return {packed, strip.first + lane, lanes};
}
inline i64 gradient_scratch(const ContrastiveParams& p) {
  return most(GradientScratch{{nullptr}, p}.used, copy_bytes(p, kPanel));
}

// A strip is packed panel by panel, but for products in steps.
inline i64 pieces(const ContrastiveParams& p) {
  return in_steps(p) ? 0 : (strip_lanes(p) + kPanel - 1) / kPanel;
}
inline void pack(const ContrastiveParams& p, const Strip& strip, i64 piece, float* panels, char* rows, char* scratch) {
  const i64 lane = piece * kPanel, lanes = least<i64>(kPanel, strip.count - lane);
  if (lanes <= 0) {
    return;
  }
  for (i64 query = 0; query < p.queries; ++query) {
    float* panel = panels + (piece * p.queries + query) * depth_of(p) * panel_lanes(p);
    const Source images = source_of(p.image, strip.first + lane, query);
    const Rows working = pack_panel(p, images, lanes, p.dim, panel_lanes(p), panel, scratch);
    if (rows == nullptr) {
      continue;
    }
    if (p.queries > 1) { // `add_winners` multiplies single rows in float32
      for (i64 i = 0; i < lanes; ++i) {
        float* to = (float*)rows + ((lane + i) * p.queries + query) * columns_of(p);
        const Rows row = fetch(source_of(p.image, strip.first + lane + i, query), 1, p.dim, false, scratch);
        for (i64 c = 0; c < p.dim; c += kLanes) {
          store(to + c, load_part(row.data + c * 4, p.dim - c));
        }
      }
      continue;
    }
    const i64 depth = product_depth(p, strip.count);
    for (i64 group = 0; group < groups_of(p); ++group) {
      group_columns(is_dot(p), from_group(p, working, group), lanes, columns_of(p, group),
                    (float*)rows + (group * depth + product_depth(p, lane)) * kPanel);
    }
  }
}

// The gradient by the logits of one text and the kLanes images from `image` on.
struct SoftmaxGradient {
  const ContrastiveParams& p;
  const bool of_images, of_texts, smooth;
  const Vec reference, of_softmax, of_positive, of_class; // of the images

  MMK_INLINE SoftmaxGradient(const ContrastiveParams& p, bool hard, i64 image)
      : p(p), of_images(p.of_images.reference != nullptr), of_texts(!hard && p.of_texts.reference != nullptr),
        smooth(p.of_images.of_class != nullptr || p.of_texts.of_class != nullptr),
        reference(at(p.of_images.reference, image)), of_softmax(at(p.of_images.of_softmax, image)),
        of_positive(at(p.of_images.of_positive, image)), of_class(at(p.of_images.of_class, image)) {}

  MMK_INLINE static Vec at(const float* x, i64 image) {
    return x == nullptr ? zero() : load(x + image);
  }
  // `bits`: the pairs of the same label; `diagonal`: the pair of the same index, if it is among them.
  MMK_INLINE Vec operator()(Vec dot, i64 text, std::uint32_t bits, std::uint32_t diagonal) {
    const Power power = power_of(p, dot);
    Vec g = of_images ? power.over(reference) * of_softmax : zero();
    if (of_texts) {
      g = fma(power.over(set1(p.of_texts.reference[text])), set1(p.of_texts.of_softmax[text]), g);
    }
    if (smooth) {
      g -= of_class;
      if (of_texts && p.of_texts.of_class != nullptr) {
        g -= set1(p.of_texts.of_class[text]);
      }
    }
    if (bits != 0) {
      const Vec less = of_positive + (of_texts ? set1(p.of_texts.of_positive[text]) : zero());
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

  MMK_INLINE SigmoidGradient(const ContrastiveParams& p, bool, i64) : p(p) {}

  MMK_INLINE Vec operator()(Vec dot, i64, std::uint32_t bits, std::uint32_t) {
    const Vec x = fma(dot, set1(p.scale), set1(p.bias));
    const Vec y = bits == 0 ? -x : choose(bits, x, -x); // its sigmoid should be 1
    const Vec size = y < zero() ? -y : y, e = exp2(size * set1(-kLog2e));
    const Vec over = set1(1.0f) / (set1(1.0f) + e), wrong = y < zero() ? over : e * over;
    loss = (y < zero() ? size : zero()) + log1p_of_unit(e);
    return bits == 0 ? wrong : choose(bits, -wrong, wrong);
  }
};

// The gradients by the logits of vector v of a tile's images, text by text, and their sums.
template <typename Gradient> struct VectorGradient {
  static constexpr bool kSigmoid = std::is_same<Gradient, SigmoidGradient>::value;

  const LogitTile& tile;
  const i64 v;
  const bool may_match = tile.may_match();
  const std::uint32_t live = tile.live(v);
  const bool whole = live == kAllLanes;
  const Vec factor = set1(tile.p.factor), middle = set1(tile.p.middle);
  Gradient gradient = Gradient(tile.p, tile.hard, tile.lane + v * kLanes);
  Vec of_scale = zero(), of_bias = zero(), loss = zero();

  MMK_INLINE Vec only_live(Vec x) const {
    return whole ? x : choose(live, x, zero());
  }
  MMK_INLINE Vec of_text(i64 r) {
    const std::uint32_t bits = may_match ? tile.matches(r, v) : 0,
                        diagonal = bits != 0 ? bits & tile.diagonal(r, v) : 0;
    const Vec dot = load(tile.dots + r * kPanel + v * kLanes);
    const Vec g = only_live(gradient(dot, tile.row + r, bits, diagonal));
    of_scale = fma(g, only_live(dot - middle), of_scale);
    if constexpr (kSigmoid) {
      of_bias += g;
      loss += only_live(gradient.loss);
    }
    return g * factor;
  }
};

// A tile's gradients by its logits to `by_text` and, where the images' gradient is needed, transposed to `by_image`.
// column: of the strip, the tile's first one.
template <typename Gradient>
void gradient_tile(const LogitTile tile, const GradientScratch& s, i64 column, GradientSums& sums) {
  const bool dot = s.dot;
  const i64 size = s.size, text_stride = s.text_stride, image_stride = s.image_stride;
  char* by_text = s.by_text + column * size;
  char* by_image = s.several || !tile.p.need_image ? nullptr : s.by_image + column * image_stride;
  for (i64 v = 0; v < vectors_of_lanes(tile.lanes); ++v) {
    VectorGradient<Gradient> gradient{tile, v};
    for (i64 first = 0; first < tile.rows; first += kLanes) {
      Vec block[kLanes];
      gradient.loss = zero(); // a short sum: in a long one, equal terms would all be rounded in the same direction
      for (i64 n = 0; n < kLanes; ++n) {
        const i64 r = first + n;
        if (r >= tile.rows) {
          block[n] = zero();
          continue;
        }
        block[n] = gradient.of_text(r);
        store_working(by_text + r * text_stride + v * kLanes * size, dot, block[n]);
      }
      if constexpr (VectorGradient<Gradient>::kSigmoid) {
        sums.loss += sum(gradient.loss);
      }
      if (by_image != nullptr) {
        transpose(block);
        for (i64 n = 0; n < kLanes; ++n) {
          store_working(by_image + (v * kLanes + n) * image_stride + first * size, dot, block[n]);
        }
      }
    }
    sums.scale += sum(gradient.of_scale);
    sums.bias += sum(gradient.of_bias);
  }
}

// A strip of images against a task's texts, and where its gradients go; see `ContrastiveKernels::gradient`.
struct StripTask {
  const ContrastiveParams& p;
  const Strip& strip;
  const Task& task;
  bool first;
  float* part;

  MMK_INLINE bool need_texts() const {
    return p.need_rows[task.hard];
  }
  MMK_INLINE float* grad_text(i64 row) const {
    return p.grad_rows[task.hard] + row * p.dim;
  }
};

// Several queries: each pair's gradient goes to the winner. Images outside: the rows and sums of an image's queries,
// and those of a block of texts, fit into a cache; those of a strip don't.
inline void add_winners(const StripTask& t, const GradientScratch& s, const LogitTile& tile, i64 column) {
  const ContrastiveParams& p = t.p;
  const i64 columns = columns_of(p);
  const float* image_rows = (const float*)t.strip.rows;
  float* of_texts = t.need_texts() ? t.grad_text(tile.row) : nullptr;
  multiplied_here() += 2 * tile.rows * tile.lanes * columns * (p.need_image + (of_texts != nullptr));
  for (i64 i = 0; i < tile.lanes; ++i) {
    s.order.sort(s.winner, tile.rows, i, p.queries);
    const std::int32_t* first = s.order.texts;
    for (i64 query = 0; query < p.queries; ++query) {
      const std::int32_t* last = s.order.texts + s.order.ends[query];
      const i64 at = ((column + i) * p.queries + query) * columns;
      if (first < last) {
        add_won(p, {first, last, s.by_text + (column + i) * s.size, s.text_stride, s.groups, image_rows + at, of_texts,
                    p.need_image ? t.part + at : nullptr});
      }
      first = last;
    }
  }
}

// One group of columns of the gradients of `rows` texts from `row` on.
template <bool kDot> void text_product(const StripTask& t, const GradientScratch& s, i64 row, i64 rows, i64 group) {
  const ContrastiveParams& p = t.p;
  const i64 over_lanes = product_depth(p, t.strip.count);
  const i64 vectors = vectors_of(p, group), columns = p.dim - group * kPanel; // left
  const Operand a{s.by_text, s.text_stride, 4};
  const float* b = (const float*)t.strip.rows + group * over_lanes * kPanel;
  if (in_steps(p)) {
    const Source images = from_column(source_of(p.image, t.strip.first), group * kPanel);
    const Rows some = fetch(images, t.strip.count, columns_of(p, group), is_dot(p), s.images);
    group_columns(is_dot(p), some, t.strip.count, columns_of(p, group), s.strip_group);
    b = s.strip_group;
  }
  float* to = t.grad_text(row) + group * kPanel;
  if (columns >= vectors * kLanes) {
    product<kDot>(a, b, kPanel, to, p.dim, rows, vectors, over_lanes, !t.first);
    return;
  }
  // A whole vector would pass the end of the row.
  product<kDot>(a, b, kPanel, s.dots, kPanel, rows, vectors, over_lanes, false);
  for (i64 r = 0; r < rows; ++r) {
    for (i64 c = 0; c < columns; c += kLanes) {
      float* at = to + r * p.dim + c;
      const Vec more = load(s.dots + r * kPanel + c);
      store_part(at, t.first ? more : load_part(at, columns - c) + more, columns - c);
    }
  }
}

// `whole`: the texts, unless there are steps.
template <bool kDot>
void products(const StripTask& t, const GradientScratch& s, Source texts, Rows whole, i64 row, i64 rows) {
  const ContrastiveParams& p = t.p;
  for (i64 group = 0; group < groups_of(p); ++group) {
    if (t.need_texts()) {
      text_product<kDot>(t, s, row, rows, group);
    }
    if (p.need_image) {
      const i64 cols = columns_of(p, group);
      const Rows some = in_steps(p) ? fetch(from_column(texts, group * kPanel), rows, cols, is_dot(p), s.texts)
                                    : from_group(p, whole, group);
      group_columns(is_dot(p), some, rows, cols, s.groups);
      product<kDot>({s.by_image, s.image_stride, 4}, s.groups, kPanel, t.part + group * part_lanes(p) * kPanel, kPanel,
                    t.strip.count, vectors_of(p, group), product_depth(p, rows), row > t.task.first);
    }
  }
}

inline i64 part_floats(const ContrastiveParams& p) {
  return part_lanes(p) * (p.queries > 1 ? p.queries * columns_of(p) : groups_of(p) * kPanel);
}

// Several queries: zeros to what `add_winners` adds to.
inline void begin_sums(const StripTask& t) {
  const ContrastiveParams& p = t.p;
  if (p.need_image) {
    std::memset(t.part, 0, part_floats(p) * sizeof(float));
  }
  if (t.first && t.need_texts()) {
    std::memset(t.grad_text(t.task.first), 0, (t.task.last - t.task.first) * p.dim * sizeof(float));
  }
}

// Several queries: rows of texts as float32 to `groups`.
inline void widen_texts(const GradientScratch& s, Rows texts, i64 rows) {
  const ContrastiveParams& p = s.p;
  const Type type = is_dot(p) ? Type::bf16 : Type::f32;
  for (i64 r = 0; r < rows; ++r) {
    for (i64 c = 0; c < p.dim; c += kLanes) {
      const char* from = texts.data + r * texts.stride + c * bytes_of(type);
      store(s.groups + r * columns_of(p) + c, load_as_f32(from, type, p.dim - c));
    }
  }
}

template <typename Gradient> void gradient_of(const StripTask& t, GradientSums& sums, char* scratch) {
  const ContrastiveParams& p = t.p;
  const Strip& strip = t.strip;
  const Task& task = t.task;
  const GradientScratch s{{scratch}, p};
  const bool wanted = p.need_image || t.need_texts();
  if (s.several) {
    begin_sums(t);
  }
  for (i64 lane = 0; lane < strip.count; lane += kPanel) {
    panel_labels(p, strip.first + lane, least<i64>(kPanel, strip.count - lane), s.labels + lane);
  }
  for (i64 row = task.first; row < task.last; row += s.rows) {
    const i64 rows = least(s.rows, task.last - row);
    const Source source = source_of(texts_of(p, task.hard), row);
    const Rows texts = fetch_whole(p, source, rows, s.texts);
    if (s.several && wanted) {
      widen_texts(s, texts, rows);
    }
    for (i64 lane = 0; lane < strip.count; lane += kPanel) {
      const i64 lanes = least<i64>(kPanel, strip.count - lane);
      panel_dots(p, source, texts, rows, panel_of(p, strip, lane, lanes), s.dots, s.other,
                 s.several ? s.winner : nullptr, s.step());
      const LogitTile tile{p, task.hard, row, rows, strip.first + lane, lanes, s.labels + lane, s.dots};
      gradient_tile<Gradient>(tile, s, lane, sums);
      if (s.several && wanted) {
        add_winners(t, s, tile, lane);
      }
    }
    if (!s.several && wanted) {
      with_pairs(s.dot, [&](auto pairs) { products<pairs()>(t, s, source, texts, row, rows); });
    }
  }
}

inline void gradient(const ContrastiveParams& p, const Strip& strip, const Task& task, bool first, float* part,
                     GradientSums& sums, char* scratch) {
  const StripTask t{p, strip, task, first, part};
  if (p.sigmoid) {
    gradient_of<SigmoidGradient>(t, sums, scratch);
  } else {
    gradient_of<SoftmaxGradient>(t, sums, scratch);
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
  const i64 size = bytes_of(type), lanes = part_lanes(p), apart = part_floats(p);
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

} // namespace mmkernels::MMK_ISA
