// Torch's tensors at the kernels' door.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "type.h"

namespace mmkernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using i64 = std::int64_t;

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
  case at::kFloat:
    return Type::f32;
  case at::kBFloat16:
    return Type::bf16;
  case at::kHalf:
    return Type::f16;
  default:
    TORCH_CHECK_TYPE(false, "the cpu backend takes float32, bfloat16 and float16, got ", x.scalar_type());
  }
}

// The public functions have checked everything and said it better; this keeps a call of torch.ops from reading past an
// end. Sizes of -1 may be anything, those of `loose` dims also 1.
inline void check_sizes(const char* name, const Tensor& x, at::IntArrayRef sizes, bool loose = false) {
  bool fits = x.device().is_cpu() && x.dim() == static_cast<i64>(sizes.size());
  for (i64 dim = 0; fits && dim < x.dim(); ++dim) {
    fits = sizes[dim] < 0 || x.size(dim) == sizes[dim] || (loose && x.size(dim) == 1);
  }
  TORCH_CHECK_VALUE(fits, name, " must be on the CPU and of shape ", sizes, loose ? " or 1 in any dim" : "", ", got ",
                    x.sizes());
}

} // namespace mmkernels
