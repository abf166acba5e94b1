// What the ops on visual tokens share: their tensors as plain data, and how rows are cut into tasks.
#pragma once

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <vector>

#include "../common/arguments.h"
#include "../common/isa.h"
#include "../common/parallel.h"

namespace mmkernels {

// x if its channels follow each other in memory, else a copy.
inline Tensor with_dense_channels(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

// Threads for work that moves so many bytes: as `threads_for`, at the 10 GB a second that a core copies at least.
inline int threads_for_bytes(double bytes) {
  return threads_for(10.0 * bytes);
}

// Results of more bytes are written past the caches.
constexpr i64 kCacheBytes = 4 << 20;

// Calls run(first, last, task, scratch of so many bytes) for `tasks` ranges of rows [0, rows), on as many threads.
inline void each_range(i64 rows, i64 tasks, int threads, i64 scratch_bytes,
                       const std::function<void(i64, i64, i64, char*)>& run) {
  const i64 each = (rows + tasks - 1) / tasks;
  parallel_tasks(tasks, threads, scratch_bytes, [&](i64 task, char* scratch) {
    const i64 first = std::min(rows, task * each), last = std::min(rows, first + each);
    if (first < last) {
      run(first, last, task, scratch);
    }
  });
}

} // namespace mmkernels
