// One call of a contrastive op as the kernels see it: plain data, no torch. launch.h fills it in; the kernels, compiled
// once for each instruction set, read it.
//
// Images are lanes of vectors, texts are rows: a tile of logits is [texts, images]. A strip of images is packed once
// and then multiplied with all texts, block by block; the batch's texts and hard texts go the same way.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace mmkernels {

// [count, queries, dim]; strides in elements.
struct Features {
  const char* data = nullptr;
  Type type = Type::f32;
  std::int64_t count = 0, row = 0, query = 0, column = 0;
};

// Running sums of each text's, or image's, row of logits; `reference` and `sum` are as in the op's state.
struct Sums {
  float *reference = nullptr, *sum = nullptr; // of 2^(logit - reference), logits in base 2
  float* positives = nullptr;                 // sum of the positives' dots
  float* all = nullptr;                       // of all dots; null: not needed
};

// The best positive of each row, a dot times the scale's sign, and its index; then how many negatives rank before it.
struct Ranks {
  float* best = nullptr; // null: not needed
  std::int32_t* index = nullptr;
  std::int32_t* before = nullptr;
};

// The gradient with respect to a logit s of image i and text j, for one direction: 2^(s - reference) of_softmax -
// of_class, and less `of_positive` for a positive pair. Null where no gradient flows to the direction.
struct LogitGradient {
  const float *reference = nullptr, *of_softmax = nullptr, *of_positive = nullptr, *of_class = nullptr;
};

struct ContrastiveParams {
  std::int64_t dim = 0, queries = 1;
  Features image, text, hard; // the score of a pair is the largest of the image's queries
  float scale = 0.0f;
  // scale * log2(e), split hi + lo (both non-zero, same sign): a single rounded float would bias every logit.
  float high = 0.0f, low = 0.0f;
  float hidden = 0.0f; // a dot whose logit is -inf
  float sign = 0.0f;   // of the scale: dots times this are in the order of logits
  float bias = 0.0f;   // of the sigmoid loss
  // Whether few images, or few texts, are multiplied along their channels, which rounds otherwise. Where scores are
  // compared with those of another call, its counts must not matter.
  bool few_images = true, few_texts = true;

  // Positive pairs: those of the same label; null: partners. Text j's partner is the image first_text + j, if there is
  // one.
  std::int64_t first_text = 0;
  const std::int32_t *image_label = nullptr, *text_label = nullptr;
  const std::int32_t* hard_label = nullptr; // null: no hard text is of an image's label
  bool ignore = false;                      // only partners are positive, other pairs of the same label are hidden

  // Softmax forward. Tasks begin at whole vectors of texts, and the arrays are padded to whole vectors.
  Sums text_sums;
  Ranks text_ranks;

  // Retrieval: the right answer of each image, in their order; without data it is the text of an index.
  Features right;

  // Gradients. `need_rows` and `grad_rows`: of the batch's texts, then of hard texts.
  bool sigmoid = false;
  LogitGradient of_images, of_texts;
  float middle = 0.0f; // subtracted from dots in the scale's gradient, where a constant cancels but for its rounding
  float factor = 1.0f; // the gradients' products are multiplied by this
  bool need_image = false, need_rows[2] = {false, false};
  float* grad_rows[2] = {nullptr, nullptr}; // float32 [count, dim]
};

// Texts [first, last) of the batch, or of the hard texts.
struct Task {
  bool hard;
  std::int64_t first, last;
};

// Images [first, first + count), packed: `panels` for logits, `rows` for the texts' gradient.
struct Strip {
  std::int64_t first, count;
  const float* panels;
  const char* rows;
};

// What a task of a gradient sums, besides its part of the images' gradient.
struct GradientSums {
  double loss = 0.0, scale = 0.0, bias = 0.0;
};

// The kernels of one instruction set. `..._scratch` functions return the bytes that one thread needs.
struct ContrastiveKernels {
  std::int64_t (*strip_lanes)(const ContrastiveParams&); // images of a full strip
  std::int64_t (*panels_bytes)(const ContrastiveParams&);
  std::int64_t (*rows_bytes)(const ContrastiveParams&);
  std::int64_t (*part_floats)(const ContrastiveParams&); // of a task's part of a strip's gradient
  std::int64_t (*take_multiplied)();                     // FLOP of this thread's products since the last call

  // A strip is packed in pieces; `rows` may be null.
  std::int64_t (*pieces)(const ContrastiveParams&);
  void (*pack)(const ContrastiveParams&, const Strip&, std::int64_t piece, float* panels, char* rows, char* scratch);

  // All images against a task's texts. `images`: sums of this task alone, padded to whole panels.
  std::int64_t (*softmax_scratch)(const ContrastiveParams&);
  void (*softmax)(const ContrastiveParams&, const Task&, const Sums& images, const Ranks& image_ranks, char* scratch);
  void (*best_positives)(const ContrastiveParams&, const Task&, const Ranks& images, char* scratch);

  // One strip against a task's texts. `part` is written; so are the texts' gradients, or added to unless `first`.
  std::int64_t (*gradient_scratch)(const ContrastiveParams&);
  void (*gradient)(const ContrastiveParams&, const Strip&, const Task&, bool first, float* part, GradientSums&,
                   char* scratch);
  // Images [first, last) of a strip: the sum of the parts of `count` tasks, to `to` [images, queries, dim].
  void (*merge)(const ContrastiveParams&, const Strip&, const float* parts, std::int64_t count, std::int64_t first,
                std::int64_t last, Type type, char* to);
  // float32 [rows, dim] to any type.
  void (*convert)(const ContrastiveParams&, const float* from, std::int64_t rows, Type type, char* to);

  // Retrieval: a strip of queries; ranks' arrays are the strip's, padded to whole panels.
  void (*target_scores)(const ContrastiveParams&, const Strip&, const Ranks&, char* scratch);
  void (*count_before)(const ContrastiveParams&, const Strip&, const Task&, const Ranks&, char* scratch);
};

} // namespace mmkernels
