// One call of merge_patches as the kernels see it: plain data, no torch.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace mmkernels {

struct PatchImage {
  const char* x;        // or null
  char* grad_x;         // or null
  std::int64_t row;     // of the output, its first
  std::int64_t rows[3]; // t', h', w' of the output
  std::int64_t size[3]; // t, h, w
};

struct MergePatches {
  const PatchImage* images = nullptr;
  std::int64_t image_count = 0;
  std::int64_t window[3] = {1, 1, 1};
  std::int64_t patches = 1, channels = 0;  // of a window, of a token
  std::int64_t x_stride = 0, y_stride = 0; // bytes from a token to the next
  bool channel_major = false, grouped = false;
  bool past_caches = false; // what is written does not fit into the caches
  Type type = Type::f32;
  const char* grad_y = nullptr;
  char* y = nullptr;

  bool norm = false, centred = false; // subtract the mean: a layer norm
  bool first = false;                 // of tokens, not of merged ones
  float eps = 0.0f;
  // float32 [channels] if `first`, else [patches, channels]; null: 1, 0.
  const float *weight = nullptr, *bias = nullptr;
};

// The kernels of one instruction set, on rows [first, last) of the output. A norm's gradients of weight and bias, in
// the form of the weight, are added to; null: not needed.
struct MergePatchesKernels {
  std::int64_t (*scratch)(const MergePatches&); // bytes for one thread
  void (*merge)(const MergePatches&, std::int64_t first, std::int64_t last, char* scratch);
  void (*backward)(const MergePatches&, std::int64_t first, std::int64_t last, float* grad_weight, float* grad_bias,
                   char* scratch);
};

} // namespace mmkernels
