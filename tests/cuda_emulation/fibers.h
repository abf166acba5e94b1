// Runs a CUDA kernel's source on the host: a block's threads are fibers, and the functions of csrc/common/cuda_ptx.cuh
// do what the PTX ISA says of the instructions behind them. A warp runs as far as it can before the next one does, so
// that warps drift as far apart as barriers let them.
//
// Checked on the way: lanes of a warp meet in the same instruction; nothing waits for ever; addresses of shared memory
// lie in what the launch asked for; addresses of global memory in ranges that the caller names; every copy is waited
// for.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct Dim3 {
  unsigned x = 0;
};
inline Dim3 threadIdx, blockIdx;

namespace mmkernels::emulation {

struct Range { // of global memory
  const char *begin, *end;
  bool writable;
};

// When copies land: when they are waited for, as late as they may; or at once, as early as they may.
enum class Copies { late, early };

struct Copy {
  std::uint32_t to;
  const void* from;
  bool there;
};

struct Fiber {
  ucontext_t start;
  jmp_buf point;
  bool started = false, done = false;
  const unsigned* event = nullptr; // runs again when this is no longer `was`
  unsigned was = 0;
  std::deque<std::vector<Copy>> groups; // the last one is still open
};

struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  const char* instruction = nullptr;
  void* lanes[32];
};

// The block that runs. One at a time in a process.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks, shared;
  int threads = 0, at_barrier = 0, current = 0;
  unsigned barrier = 0;
  Copies copies = Copies::late;
  std::vector<Range> ranges;
  std::string error;
  std::function<void()> kernel;
  jmp_buf scheduler;
};
inline Block block;

constexpr std::size_t kStack = 64 << 10, kCanary = 64;

inline void fail(const std::string& what) {
  if (block.error.empty()) {
    block.error = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": " + what;
  }
}

inline Fiber& self() {
  return *block.fibers[block.current];
}

inline void wait_for(const unsigned& event) {
  Fiber& fiber = self();
  fiber.event = &event;
  fiber.was = event;
  if (_setjmp(fiber.point) == 0) {
    _longjmp(block.scheduler, 1);
  }
}

inline void fiber_main() {
  block.kernel();
  Fiber& fiber = self();
  for (const auto& group : fiber.groups) {
    if (!group.empty()) {
      fail("a copy that is never waited for");
    }
  }
  fiber.done = true;
  _longjmp(block.scheduler, 1);
}

// Every lane of the warp brings `lane` here; the last to come does `together` for all.
template <class L, class F> void meet(const char* instruction, L& lane, F together) {
  Warp& warp = block.warps[block.current / 32];
  if (warp.arrived == 0) {
    warp.instruction = instruction;
  } else if (warp.instruction != instruction) {
    fail(std::string("a warp in ") + warp.instruction + " and in " + instruction);
  }
  warp.lanes[block.current % 32] = &lane;
  if (++warp.arrived < 32) {
    return wait_for(warp.generation);
  }
  L* lanes[32];
  for (int n = 0; n < 32; ++n) {
    lanes[n] = static_cast<L*>(warp.lanes[n]);
  }
  together(lanes);
  warp.arrived = 0;
  ++warp.generation;
}

inline void run_fiber(int n) {
  Fiber& fiber = *block.fibers[n];
  block.current = n;
  threadIdx.x = static_cast<unsigned>(n);
  if (_setjmp(block.scheduler) != 0) {
    return;
  }
  if (fiber.started) {
    _longjmp(fiber.point, 1);
  }
  fiber.started = true;
  setcontext(&fiber.start);
}

inline bool run_warp(int warp, bool backwards) {
  bool ran = false;
  for (int n = 0; n < 32; ++n) {
    const int thread = warp * 32 + (backwards ? 31 - n : n);
    Fiber& fiber = *block.fibers[thread];
    if (!fiber.done && (fiber.event == nullptr || *fiber.event != fiber.was)) {
      run_fiber(thread);
      ran = true;
    }
  }
  return ran;
}

inline void run_block(bool backwards) {
  const int warps = block.threads / 32;
  block.warps.assign(warps, Warp{});
  block.fibers.clear();
  block.at_barrier = 0;
  std::memset(block.shared.data(), 0xff, block.shared.size()); // NaN of every type
  for (int n = 0; n < block.threads; ++n) {
    block.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *block.fibers.back();
    fiber.groups.emplace_back();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = block.stacks.data() + n * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
  for (bool ran = true; ran && block.error.empty();) {
    ran = false;
    for (int n = 0; n < warps; ++n) {
      while (run_warp(backwards ? warps - 1 - n : n, backwards) && block.error.empty()) {
        ran = true;
      }
    }
  }
  for (int n = 0; n < block.threads; ++n) {
    if (!block.fibers[n]->done) {
      threadIdx.x = static_cast<unsigned>(n);
      fail("waits for ever");
    }
  }
  for (std::size_t n = block.shared.size() - kCanary; n < block.shared.size(); ++n) {
    if (block.shared[n] != static_cast<char>(0xff)) {
      fail("shared memory written past its end");
    }
  }
}

// What <<<blocks, threads, shared>>> does; answers what went wrong, or "".
inline std::string launch(unsigned blocks, int threads, int shared, Copies copies, bool backwards,
                          const std::vector<Range>& ranges, const std::function<void()>& kernel) {
  block.threads = threads;
  block.shared.resize(shared + kCanary);
  block.stacks.resize(threads * kStack);
  block.copies = copies;
  block.ranges = ranges;
  block.kernel = kernel;
  block.error.clear();
  for (unsigned n = 0; n < blocks && block.error.empty(); ++n) {
    blockIdx.x = backwards ? blocks - 1 - n : n;
    run_block(backwards);
  }
  return block.error;
}

inline bool check_global(const void* p, std::size_t bytes, bool writes) {
  const char* at = static_cast<const char*>(p);
  for (const Range& range : block.ranges) {
    if (at >= range.begin && at + bytes <= range.end && (!writes || range.writable)) {
      return true;
    }
  }
  fail(writes ? "a write outside of what may be written" : "a read outside of what may be read");
  return false;
}

inline char* at_shared(std::uint32_t address, std::uint32_t bytes) {
  static char nowhere[16];
  if (address % bytes != 0 || address + bytes > block.shared.size() - kCanary) {
    fail("shared memory past its end, or not aligned");
    return nowhere;
  }
  return block.shared.data() + address;
}

inline void land(const Copy& copy) {
  char* to = at_shared(copy.to, 16);
  if (copy.there && check_global(copy.from, 16, false)) {
    std::memcpy(to, copy.from, 16);
  } else {
    std::memset(to, 0, 16);
  }
}

} // namespace mmkernels::emulation
