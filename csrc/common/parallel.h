// Parallel loops on PyTorch's threads, and scratch memory for each.
#pragma once

#include <cstdint>
#include <functional>

namespace mmkernels {

// Threads that a loop started here would use: torch.get_num_threads(); 1 inside another parallel region, and in a
// process forked from one that had loaded this (OpenMP's threads do not survive a fork).
int available_threads();

// Calls run(i, scratch) for each i below `count`, each once, in any order, on at most `threads` threads; `scratch` is
// `bytes` of memory of the thread's own, aligned to a cache line.
void parallel_tasks(std::int64_t count, int threads, std::int64_t bytes,
                    const std::function<void(std::int64_t, char*)>& run);

// Memory of a call, aligned to a cache line: of up to 4 MiB what this thread's last call has left, so that small calls
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

// Gives back what this thread and the loops' threads keep between calls, for whoever measures memory.
void release_kept();

// Asks the system for large pages under `bytes` at `data`, freshly allocated and about to be written in full: a page
// fault for each 4 KiB of a large output otherwise costs as much time as its arithmetic.
void expect_writes(void* data, std::int64_t bytes);

} // namespace mmkernels
