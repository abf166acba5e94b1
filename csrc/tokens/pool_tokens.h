// One call of pool_tokens as the kernels see it: plain data, no torch.
//
// An output token is a sum over a run of inputs along each of t, h and w. A backward pass is such a sum too, of what
// the outputs that an input goes into receive.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace mmkernels {

// Along an axis: result i takes inputs first[i], first[i] + 1, ..., with weights[begin[i]] to weights[begin[i + 1]].
struct PoolAxis {
  const std::int32_t *first = nullptr, *begin = nullptr;
  const float* weights = nullptr;
};

struct PoolImage {
  const char* from;        // its tokens
  std::int64_t token;      // the number of its first token among all that are read
  std::int64_t row;        // and of its first result
  std::int64_t size[3];    // t, h, w of what is read
  std::int64_t results[3]; // t, h, w of the results
  PoolAxis axis[3];
  PoolAxis cells[3]; // of a backward pass that needs them: the forward pass' axes
  const char* x;     // of the backward pass of "attention": the image's tokens
};

enum class Pooling { linear, max, attention, max_backward, attention_backward };

// A token and a window that it is in, in the backward pass of "attention": its weight there, and its product with the
// window's gradient.
struct PoolPair {
  float weight, dot;
  std::int32_t window; // -1: none
};

struct PoolTokens {
  Pooling pooling = Pooling::linear;
  const PoolImage* images = nullptr;
  std::int64_t image_count = 0, most_taps = 0; // that one result has
  std::int64_t channels = 0, stride = 0;       // of what is read, in bytes from a token to the next
  std::int64_t x_stride = 0;
  bool past_caches = false; // the results do not fit into the caches
  Type type = Type::f32;
  char* to = nullptr;

  const float* scores = nullptr; // [tokens] of x
  float* new_lse = nullptr;      // "attention": [results]
  std::int32_t* new_index = nullptr;
  // Of backward passes, for each token that is read: the parts' log-sum-exp, and the largest tokens.
  const float* lse = nullptr;
  const std::int32_t* index = nullptr;
  PoolPair* pairs = nullptr; // [results, most_taps], "none" behind those of a result; null: not needed
};

// The kernels of one instruction set.
struct PoolTokensKernels {
  std::int64_t (*scratch)(const PoolTokens&);
  void (*pool)(const PoolTokens&, std::int64_t first, std::int64_t last, char* scratch); // results [first, last)
};

} // namespace mmkernels
