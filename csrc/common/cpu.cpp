// What Python asks of the CPU extension as a whole.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <string>
#include <vector>

#include "choice.h"
#include "parallel.h"
#include "work.h"

namespace mmkernels {

#if defined(MMKERNELS_X86)
double multiply_avx512_bf16(bool bf16, double seconds);
double multiply_avx512(bool bf16, double seconds);
double multiply_avx2(bool bf16, double seconds);
#endif
double multiply_plain(bool bf16, double seconds);

namespace {

// Sets the instruction set ("": the widest; "?": as it is), and answers the names of all that can be set, the one in
// use first.
std::string cpu_isa(const std::string& name) {
  const auto& all = offered();
  const bool asks = name == "?";
  const auto found = std::find_if(all.begin(), all.end(), [&](Isa isa) { return name_of(isa) == name; });
  TORCH_CHECK_VALUE(asks || name.empty() || found != all.end(),
                    "the CPU's instruction set must be one that it has, got ", name);
  if (!asks) {
    choose(name.empty() ? all.front() : *found);
  }
  std::string names = name_of(chosen());
  for (const Isa isa : all) {
    if (isa != chosen()) {
      names += std::string(" ") + name_of(isa);
    }
  }
  return names;
}

// FLOP a second of all threads together that only multiply and add in registers, all at once, for some seconds.
double cpu_peak(bool bf16, double seconds) {
  double (*const multiply)(bool, double) = MMKERNELS_CHOSEN(multiply);
  const int threads = available_threads();
  std::vector<double> flops(threads);
  const auto begin = std::chrono::steady_clock::now();
  parallel_tasks(threads, threads, 0, [&](std::int64_t i, char*) { flops[i] = multiply(bf16, seconds); });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  return std::accumulate(flops.begin(), flops.end(), 0.0) / elapsed.count();
}

} // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def("cpu_isa(str name) -> str", cpu_isa);
  m.def("cpu_peak(bool bf16, float seconds) -> float", cpu_peak);
  m.def("cpu_torch() -> str", [] { return std::string(MMKERNELS_TORCH); });
  m.def("cpu_multiplied() -> int", [] { return multiplied().load(); });
  m.def("cpu_release() -> ()", [] { release_kept(); });
}

} // namespace mmkernels
