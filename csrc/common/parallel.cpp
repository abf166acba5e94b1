#include "parallel.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include <pthread.h>
#include <sys/mman.h>

namespace mmkernels {
namespace {

std::atomic<bool> forked{false};

// Set after any fork: nothing tells whether OpenMP's threads had been started, and waiting for them would never end.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

struct Free {
  void operator()(char* p) const {
    std::free(p);
  }
};
using Memory = std::unique_ptr<char, Free>;

Memory allocate(std::int64_t bytes) {
  void* p = nullptr;
  TORCH_CHECK(posix_memalign(&p, 64, static_cast<std::size_t>(bytes)) == 0, "out of memory: scratch of ", bytes,
              " bytes");
  return Memory(static_cast<char*>(p));
}

// Memory that a thread keeps between calls.
struct Kept {
  Memory memory;
  std::int64_t bytes = 0;

  void reset() {
    memory.reset();
    bytes = 0;
  }
};

// Scratch that each thread of a loop keeps, so that small calls neither allocate nor touch fresh pages: at most the
// size of a second-level cache, which most calls' scratch fits.
constexpr std::int64_t kMaxKeptScratch = 1 << 20;
thread_local Kept kept_scratch;

// The last workspace, which the thread that makes the calls keeps.
constexpr std::int64_t kMaxKeptWorkspace = 1 << 22;
thread_local Kept kept_workspace;

} // namespace

Workspace::Workspace(std::int64_t bytes) : data_(nullptr), bytes_(bytes) {
  if (kept_workspace.memory != nullptr && kept_workspace.bytes >= bytes) {
    bytes_ = kept_workspace.bytes;
    data_ = kept_workspace.memory.release();
  } else {
    data_ = allocate(bytes).release();
  }
}

Workspace::~Workspace() {
  Memory memory(data_);
  if (bytes_ <= kMaxKeptWorkspace && (kept_workspace.memory == nullptr || kept_workspace.bytes < bytes_)) {
    kept_workspace = {std::move(memory), bytes_};
  }
}

int available_threads() {
#ifndef _OPENMP
  return 1;
#endif
  if (at::in_parallel_region() || forked.load(std::memory_order_relaxed)) {
    return 1;
  }
  return at::get_num_threads();
}

void parallel_tasks(std::int64_t count, int threads, std::int64_t bytes,
                    const std::function<void(std::int64_t, char*)>& run) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    Memory larger;
    char* scratch = nullptr;
    if (bytes > kMaxKeptScratch) {
      larger = allocate(bytes);
      scratch = larger.get();
    } else if (bytes > 0) {
      if (kept_scratch.bytes < bytes) {
        kept_scratch = {allocate(bytes), bytes};
      }
      scratch = kept_scratch.memory.get();
    }
    for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      run(i, scratch);
    }
  };
  threads = static_cast<int>(std::min<std::int64_t>(threads, count));
  if (threads <= 1) {
    work();
    return;
  }
  at::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      work();
    }
  });
}

void release_kept() {
  const auto release = [] {
    kept_scratch.reset();
    kept_workspace.reset();
  };
  release();
  const int threads = available_threads();
  if (threads > 1) { // a range for each thread, this one's among them
    at::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) { release(); });
  }
}

void expect_writes(void* data, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kPage = 1 << 21;
  if (bytes < static_cast<std::int64_t>(2 * kPage)) {
    return;
  }
  const auto begin = reinterpret_cast<std::uintptr_t>(data), first = (begin + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (begin + bytes) / kPage * kPage;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // a hint: nothing depends on its success
  }
#else
  (void)data, (void)bytes;
#endif
}

} // namespace mmkernels
