// Types and sizes of torch's tensors, checked before kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "parallel.h"
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

// The stride of a dim; 0 where its size is 1, so that it may be shared.
inline i64 shared_stride(const Tensor& x, i64 dim) {
  return x.size(dim) == 1 ? 0 : x.stride(dim);
}

// Returns x, which is freshly allocated and about to be written in full: see `expect_writes` in parallel.h.
inline Tensor expect_writes(Tensor x) {
  expect_writes(x.mutable_data_ptr(), static_cast<i64>(x.nbytes()));
  return x;
}

// The public functions check everything, with better messages; this keeps a direct call of torch.ops from reading past
// an end. A size of -1 may be anything; with `may_be_one` each dim may also have size 1.
inline void check_sizes(const char* name, const Tensor& x, at::IntArrayRef sizes, bool may_be_one = false) {
  bool fits = x.device().is_cpu() && x.dim() == static_cast<i64>(sizes.size());
  for (i64 dim = 0; fits && dim < x.dim(); ++dim) {
    fits = sizes[dim] < 0 || x.size(dim) == sizes[dim] || (may_be_one && x.size(dim) == 1);
  }
  TORCH_CHECK_VALUE(fits, name, " must be on the CPU and of shape ", sizes, may_be_one ? " or 1 in any dim" : "",
                    ", got ", x.sizes());
}

} // namespace mmkernels
