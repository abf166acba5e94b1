// One call of a linear op as the kernels see it: plain data, no torch. launch.h fills it in; the kernels, compiled once
// for each instruction set, read it.
//
// Tokens, which are rows of `hidden` that take part, are lanes of vectors; the vocabulary's words are rows: a block of
// logits is [words, tokens]. The tokens are packed once; the weight, which is large, is read in place where it can be.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace mmkernels {

// Strides in elements.
struct Matrix {
  const char* data = nullptr;
  Type type = Type::f32;
  std::int64_t row = 0, column = 0;
};

// Rows of a task's running sums, [kStateRows, stride] floats. The sums' lost parts are what rounding took of them.
enum StateRow { kReference, kSum, kSumLost, kMoment, kMomentLost, kTotal, kTotalLost, kPicked, kBest, kBestWord };
constexpr std::int64_t kStateRows = 10; // kBestWord: int32

// Rows of [kGradientRows, stride] floats: the gradient of token i's logit y of word c is
// exp(y - base) (probability + entropy (y - base)) + target [c = target] + words * word_weight_c. kOfTargetLogit: that
// of the target's logit, where exponentials are kept.
enum GradientRow { kBase, kOfProbability, kOfEntropy, kOfTarget, kOfWords, kOfTargetLogit };
constexpr std::int64_t kGradientRows = 6;

constexpr std::int64_t kTokenAlign = 64;  // arrays over tokens are padded to this: whole panels
constexpr std::int64_t kVectorAlign = 16; // whole vectors of any instruction set

struct LinearParams {
  std::int64_t tokens = 0, words = 0, dim = 0;
  Matrix hidden, weight;
  const std::int32_t* live = nullptr;   // the tokens' rows of hidden
  const std::int32_t* target = nullptr; // of tokens, padded; -1: not one of these words
  const float *bias = nullptr, *word_weight = nullptr;
  float softcap = 0.0f, temperature = 1.0f; // softcap 0: none
  bool entropy = false, best = false;
  const float* panels = nullptr; // the tokens transposed, [panels, depth, kPanel]
  const float* groups = nullptr; // the tokens by columns, [groups, tokens (or pairs), kPanel]

  // Of all words, [words, tokens]: products in float32, or exponentials above `exponents` in bfloat16. Null where only
  // sums are wanted.
  char* kept = nullptr;
  bool keeps_exponentials = false;
  std::int64_t kept_row = 0;   // bytes
  float* exponents = nullptr;  // [blocks of words, padded tokens]
  char* logits = nullptr;      // of some words, [words, tokens in whole vectors]: the logits' gradient, working format
  std::int64_t logits_row = 0; // bytes
  const float* gradient_rows = nullptr;
};

// Words [first, last).
struct Words {
  std::int64_t first, last;
};

// Where products of the logits' gradient go: those of words first to last, and groups of columns.
struct ProductTask {
  Words words;
  std::int64_t first_group, last_group;
  float* hidden; // [groups, tokens, kPanel]; null: not needed
  bool add_hidden;
};
// The weight's gradient: float32 sums [words, dim], or null where a block's products are final; what is final is
// converted to `to`, unless that is null.
struct WeightSums {
  bool need = false, add = false;
  float* sums = nullptr;
  char* to = nullptr;
  Type type = Type::f32;
};

// The kernels of one instruction set. The first word that `logits` holds is `first_word`.
struct LinearKernels {
  std::int64_t (*take_multiplied)(); // FLOP of this thread's products since the last call
  bool (*is_dot)(const LinearParams&);
  std::int64_t (*block_words)(const LinearParams&);   // of a block of logits
  std::int64_t (*product_words)(const LinearParams&); // of a block in products, a multiple of the former
  std::int64_t (*panel_tokens)();                     // of a panel, and columns of a group

  std::int64_t (*panels_floats)(const LinearParams&);
  std::int64_t (*groups_floats)(const LinearParams&);
  std::int64_t (*pack_scratch)(const LinearParams&);
  void (*pack_panel)(const LinearParams&, std::int64_t panel, float* panels, char* scratch);
  void (*pack_group)(const LinearParams&, std::int64_t group, float* groups, char* scratch);

  std::int64_t (*logits_scratch)(const LinearParams&);
  // Adds the logits of some words to a task's states, and keeps what `kept` says.
  void (*states)(const LinearParams&, Words, float* states, std::int64_t stride, char* scratch);
  // The gradient of some words' logits, of what `states` kept, whose place it may take, or of logits that are computed
  // again; and, if wanted, that of the bias, which is added to if `add_bias`.
  void (*gradient_of_kept)(const LinearParams&, Words, std::int64_t first_word, float* bias, bool add_bias,
                           char* scratch);
  void (*gradient)(const LinearParams&, Words, std::int64_t first_word, float* bias, char* scratch);

  std::int64_t (*product_scratch)(const LinearParams&);
  void (*products)(const LinearParams&, const ProductTask&, std::int64_t first_word, const WeightSums&, char* scratch);
  // Tokens [first, last) of sums [groups, tokens, kPanel] of so many parts, `apart` floats from one to the next, to
  // their rows of the hidden states' gradient.
  void (*hidden_rows)(const LinearParams&, const float* sums, std::int64_t parts, std::int64_t apart, Words tokens,
                      Type type, char* to);
};

} // namespace mmkernels
