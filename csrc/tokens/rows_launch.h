// Composes rows of tokens on PyTorch's threads.
#pragma once

#include <algorithm>

#include "launch.h"
#include "rows_params.h"

namespace mmkernels {

MMK_TABLES(RowKernels, row_kernels)

// x: [tokens, C] or [batch, tokens, C], as `with_dense_channels` returns it.
inline RowsOf rows_of(const Tensor& x) {
  const i64 size = x.element_size(), inner = x.size(-2);
  return {static_cast<const char*>(x.const_data_ptr()), std::max<i64>(inner, 1), x.dim() == 3 ? x.stride(0) * size : 0,
          x.stride(-2) * size};
}

// Writes all of `out`, which is contiguous. Fills in p.out, p.bytes, p.type and p.stream.
//
// Measured on Zen 5, one thread: memory that the allocator hands out again is written up to three times as fast past
// the caches, from about the size of a core's share of them on. Above 32 MiB glibc maps fresh pages for each tensor,
// which the kernel's zeros have brought into the caches.
inline void compose(ComposeParams p, const Tensor& out) {
  constexpr i64 kCached = i64{12} << 20, kMapped = i64{32} << 20, kLine = 64, kTask = i64{1} << 18;
  const i64 count = out.numel() / std::max<i64>(out.size(-1), 1), total = static_cast<i64>(out.nbytes());
  if (total == 0) {
    return;
  }
  p.out = static_cast<char*>(expect_writes(out).mutable_data_ptr());
  p.bytes = out.size(-1) * out.element_size();
  p.type = type_of(out);
  p.stream = total > kCached && total <= kMapped && p.bytes % kLine == 0 &&
             reinterpret_cast<std::uintptr_t>(p.out) % kLine == 0;
  const i64 step = std::max<i64>(1, kTask / p.bytes), tasks = (count + step - 1) / step;
  const int threads = threads_for_bytes(static_cast<double>(total));
  const RowKernels& kernels = row_kernels();
  parallel_tasks(tasks, threads, 0,
                 [&](i64 task, char*) { kernels.compose(p, task * step, std::min(count, (task + 1) * step)); });
}

} // namespace mmkernels
