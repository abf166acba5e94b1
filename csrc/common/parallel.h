// Parallel loops on PyTorch's threads, and scratch memory for each.
#pragma once

#include <cstdint>
#include <functional>

namespace mmkernels {

// Threads that a loop started here would use: torch.get_num_threads(); 1 inside another parallel region, and in a
// process forked from one that had loaded this extension (OpenMP's threads do not survive a fork).
int available_threads();

// Threads for work of so many FLOP: one where it takes less time than starting the others, some 4 microseconds, in
// which a core computes about 400,000 FLOP.
inline int threads_for(double flops) {
  return flops < 4e5 ? 1 : available_threads();
}

// Calls run(i, scratch) once for each i below `count`, in any order, on at most `threads` threads. `scratch` is `bytes`
// of memory that no other thread uses, aligned to a cache line.
void parallel_tasks(std::int64_t count, int threads, std::int64_t bytes,
                    const std::function<void(std::int64_t, char*)>& run);

// Memory of one call, aligned to a cache line. Up to 4 MiB are kept for this thread's next call, so that small calls
// touch no fresh pages.
class Workspace {
public:
  explicit Workspace(std::int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const {
    return data_;
  }

private:
  char* data_;
  std::int64_t bytes_;
};

// Frees what this thread and the loops' threads keep between calls, so that measurements of memory do not miss it.
void release_kept();

// Asks the system for large pages under `bytes` at `data`, which are freshly allocated and about to be written in full:
// a page fault for each 4 KiB of a large output would cost as much time as its arithmetic.
void expect_writes(void* data, std::int64_t bytes);

} // namespace mmkernels
