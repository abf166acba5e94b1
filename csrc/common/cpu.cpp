// What Python asks of the CPU extension as a whole.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "choice.h"
#include "parallel.h"
#include "work.h"

namespace mmkernels {

#if defined(MMKERNELS_X86)
double peak_avx512_bf16(bool bf16);
double peak_avx512(bool bf16);
double peak_avx2(bool bf16);
#endif
double peak_plain(bool bf16);

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

// FLOP a second of all threads together that only multiply and add in registers.
double cpu_peak(bool bf16) {
  double (*const peak)(bool) = MMKERNELS_CHOSEN(peak);
  const int threads = available_threads();
  std::vector<double> rates(threads);
  parallel_tasks(threads, threads, 0, [&](std::int64_t i, char*) { rates[i] = peak(bf16); });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def("cpu_isa(str name) -> str", cpu_isa);
  m.def("cpu_peak(bool bf16) -> float", cpu_peak);
  m.def("cpu_torch() -> str", [] { return std::string(MMKERNELS_TORCH); });
  m.def("cpu_multiplied() -> int", [] { return multiplied().load(); });
  m.def("cpu_release() -> ()", [] { release_kept(); });
}

} // namespace mmkernels
