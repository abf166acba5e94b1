// One call of a contrastive op as the kernels see it: plain data, no torch. cpu.cpp fills it in; the kernels, compiled
// once for each instruction set, read it.
//
// Images are lanes of vectors, texts are rows: a tile of logits is [texts, images]. A strip of images is packed and
// then meets texts, block by block; whatever comes as a block of texts (a batch's, hard ones, another process's) goes
// the same way.
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

// What one text's, or one image's, row of logits adds up to so far; `reference` and `sum` as in the op's state.
struct Sums {
  float *reference = nullptr, *sum = nullptr; // of 2^(logit - reference), logits in base 2
  float* positives = nullptr;                 // sum of the positives' dots
  float* all = nullptr;                       // of all dots; null: not wanted
};

// The best positive of each row, a dot times the scale's sign, and its place; then how many negatives stand before it.
struct Ranks {
  float* best = nullptr; // null: not wanted
  std::int32_t* place = nullptr;
  std::int32_t* before = nullptr;
};

// Weights of the gradient by a logit s of image i and text j, each null where its direction gives nothing:
// 2^(s - reference) softmax - even, and less `positive` for a positive pair.
struct Weights {
  const float *reference = nullptr, *softmax = nullptr, *positive = nullptr, *even = nullptr;
};

struct PairProblem {
  std::int64_t dim = 0, queries = 1;
  Features image, text, hard; // the score of a pair is the largest of the image's queries
  float scale = 0.0f;
  // The scale times log2(e) in two parts of one sign, neither of them 0: one rounded factor would shift all logits
  // alike.
  float high = 0.0f, low = 0.0f;
  float hidden = 0.0f; // a dot whose logit is -inf
  float sign = 0.0f;   // of the scale: dots in the order of logits
  float bias = 0.0f;   // of the sigmoid loss

  // What image and text belong together: those of one label; null: those of one number.
  const std::int32_t *image_label = nullptr, *text_label = nullptr;
  bool ignore = false; // only those of one number do, and other pairs of one label take no part

  // Softmax forward. Tasks begin at whole vectors of texts, and the arrays are padded to one.
  Sums text_sums;
  Ranks text_ranks;

  // Gradients.
  bool sigmoid = false;
  Weights of_images, of_texts;
  float middle = 0.0f; // taken off dots in the scale's gradient, where a constant comes to nothing but rounding
  float factor = 1.0f; // what the products are multiplied by
  bool need_image = false, need_rows[2] = {false, false}; // rows: of text, of hard
  float* grad_rows[2] = {nullptr, nullptr};               // float32 [count, dim]
};

// A run of texts, of hard ones if `side` is 1.
struct Task {
  int side;
  std::int64_t first, last;
};

// Images [first, first + count), packed: `panels` for logits, `rows` for the texts' gradient.
struct Strip {
  std::int64_t first, count;
  const float* panels;
  const char* rows;
};

// What a task of a gradient adds up, besides its part of the images' gradient.
struct GradientSums {
  double loss = 0.0, scale = 0.0, bias = 0.0;
};

// What one instruction set offers. `scratch` functions answer bytes for one thread.
struct PairKernels {
  int panel;                                       // images that are packed together
  std::int64_t (*strip_lanes)(const PairProblem&); // images of a full strip
  std::int64_t (*panels_bytes)(const PairProblem&);
  std::int64_t (*rows_bytes)(const PairProblem&);
  std::int64_t (*part_floats)(const PairProblem&); // of a task's part of a strip's gradient
  std::int64_t (*take_multiplied)();               // FLOP of this thread's products since it was last asked

  // A strip is packed in pieces; `rows` may be null.
  std::int64_t (*pieces)(const PairProblem&);
  void (*pack)(const PairProblem&, const Strip&, std::int64_t piece, float* panels, char* rows, char* scratch);

  // All images against a task's texts; `images`: the task's own sums, padded to whole panels.
  std::int64_t (*softmax_scratch)(const PairProblem&);
  void (*softmax)(const PairProblem&, const Task&, const Sums& images, const Ranks& image_ranks, char* scratch);
  void (*best_positives)(const PairProblem&, const Task&, const Ranks& images, char* scratch);

  // One strip against a task's texts. `part` is written; so are the texts' gradients, or added to unless `first`.
  std::int64_t (*gradient_scratch)(const PairProblem&);
  void (*gradient)(const PairProblem&, const Strip&, const Task&, bool first, float* part, GradientSums&,
                   char* scratch);
  // Images [first, last) of a strip: the parts of `count` tasks, added up, to `to` [images, queries, dim].
  void (*merge)(const PairProblem&, const Strip&, const float* parts, std::int64_t count, std::int64_t first,
                std::int64_t last, Type type, char* to);
  // float32 [rows, dim] to any type.
  void (*convert)(const PairProblem&, const float* from, std::int64_t rows, Type type, char* to);

  // Retrieval: a strip of queries; ranks' arrays are the strip's, padded to whole panels.
  void (*target_scores)(const PairProblem&, const Strip&, const Ranks&, char* scratch);
  void (*count_before)(const PairProblem&, const Strip&, const Task&, const Ranks&, char* scratch);
};

} // namespace mmkernels
