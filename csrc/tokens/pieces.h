// The images of a call of frame_difference and token_similarity, and their rows cut into pieces for the threads.
#pragma once

#include <numeric>
#include <vector>

#include "../common/tensors.h"
#include "nearest_params.h"

namespace mmkernels {

inline i64 count_of(const std::vector<i64>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), i64{0});
}

// Each image's tokens: where they lie in [tokens, C] or [images, tokens, C] with contiguous channels.
inline std::vector<TokenMatrix> matrices_of(const char* name, const Tensor& x, const std::vector<i64>& lengths) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && (x.dim() == 2 || x.dim() == 3), name,
                    " must be [tokens, C] or [images, tokens, C] on the CPU, got ", x.sizes());
  const bool batched = x.dim() == 3;
  bool fits = batched ? static_cast<i64>(lengths.size()) == x.size(0) : count_of(lengths) == x.size(0);
  for (const i64 n : lengths) {
    fits = fits && n >= 0 && (!batched || n == x.size(1));
  }
  TORCH_CHECK_VALUE(fits, "the lengths must match ", name, "'s tokens ", x.sizes(), ", got ", lengths);
  const i64 size = x.element_size(), row = x.stride(-2) * size;
  const char* data = static_cast<const char*>(x.const_data_ptr());
  std::vector<TokenMatrix> found;
  for (const i64 n : lengths) {
    found.push_back({data, row, x.size(-1), type_of(x)});
    data += batched ? x.stride(0) * size : n * row;
  }
  return found;
}

// Rows [first, last) of an image.
struct Piece {
  std::size_t image;
  i64 first, last;
};

inline std::vector<Piece> pieces_of(const std::vector<i64>& lengths, i64 step) {
  std::vector<Piece> found;
  for (std::size_t image = 0; image < lengths.size(); ++image) {
    for (i64 first = 0; first < lengths[image]; first += step) {
      found.push_back({image, first, std::min(lengths[image], first + step)});
    }
  }
  return found;
}

} // namespace mmkernels
