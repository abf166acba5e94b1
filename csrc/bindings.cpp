// mmkernels._cpu as Python sees it: functions without tensors. The operators of the same shared object are registered
// with torch by the ops' files. mmkernels/runtime/cpu.py and host.py call these functions.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/table.h"
#include "common/work.h"

namespace mmkernels {

MMK_TABLES(Multiply, multiply)

namespace {

// The instruction sets that can be used, the chosen one first.
pybind11::list isas() {
  const Isa chosen = chosen_isa();
  pybind11::list names;
  names.append(name_of(chosen));
  for (const Isa isa : available_isas()) {
    if (isa != chosen) {
      names.append(name_of(isa));
    }
  }
  return names;
}

void choose_isa_by_name(const std::string& name) {
  const auto& available = available_isas();
  const auto isa = std::find_if(available.begin(), available.end(), [&](Isa x) { return name_of(x) == name; });
  if (isa == available.end()) {
    throw std::invalid_argument("this machine has no instruction set '" + name + "'");
  }
  choose_isa(*isa);
}

// FLOP a second of all threads together that only multiply and add in registers, all at once, for some seconds.
double peak_of_threads(bool bf16, double seconds) {
  const Multiply multiply_of_thread = multiply();
  const int threads = available_threads();
  std::vector<double> flops(threads);
  const auto begin = std::chrono::steady_clock::now();
  parallel_tasks(threads, threads, 0, [&](std::int64_t i, char*) { flops[i] = multiply_of_thread(bf16, seconds); });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  return std::accumulate(flops.begin(), flops.end(), 0.0) / elapsed.count();
}

} // namespace
} // namespace mmkernels

PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
  using namespace mmkernels;
  using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.doc() = "The CPU extension's functions without tensors; its operators are in torch.ops.mmkernels.";
  m.def("detect_isa", &detect_isa,
        "Widest instruction set of this CPU and OS: avx512_bf16, avx512, avx2, neon or plain.");
  m.def("isas", &isas, "The instruction sets that the kernels can use here, the one in use first.");
  m.def("choose_isa", &choose_isa_by_name, "Makes the kernels use one of isas(), for the whole process.");
  m.def("peak", &peak_of_threads, ReleaseGil(),
        "FLOP a second of all threads together that only multiply and add in registers, for some seconds.");
  m.def(
      "multiplied", [] { return multiplied().load(); },
      "FLOP of the contrastive and linear ops' matrix products since the process began.");
  m.def("release", &release_kept, ReleaseGil(), "Frees the memory that the kernels keep between calls.");
  m.attr("torch_version") = MMKERNELS_TORCH; // that this was built for
  m.attr("compiler") = MMKERNELS_COMPILER;
}
