// What the kernels of frame_difference and token_similarity take: see cosine.h.
#pragma once

#include <cstdint>

#include "nearest_params.h"

namespace mmkernels {

// Some positions of some frames of one video, each frame after the first.
struct FrameTask {
  TokenMatrix x;                        // the video's tokens
  std::int64_t positions;               // of a frame
  std::int64_t first, last;             // of them
  std::int64_t first_frame, last_frame; // from 1 on
  float* to;                            // of the video's first token
};

struct CosineKernels {
  std::int64_t (*frame_scratch)(const FrameTask&);
  void (*frame_difference)(const FrameTask&, char* scratch);
  // Adds rows [first, last), each at length 1, to a row.
  void (*add_directions)(const TokenMatrix&, std::int64_t first, std::int64_t last, float* to);
  // Products of a row with rows [first, last), each at length 1.
  void (*project)(const TokenMatrix&, std::int64_t first, std::int64_t last, const float* direction, float* to);
};

} // namespace mmkernels
