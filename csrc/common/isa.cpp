#include "isa.h"

#include <atomic>

namespace mmkernels {
namespace {

std::atomic<int> chosen{-1}; // -1: the widest

} // namespace

std::string detect_isa() {
#if defined(__x86_64__)
  // The builtins read XGETBV too: an instruction set whose registers the OS does not save counts as absent.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? "avx512_bf16" : "avx512";
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "avx2" : "plain";
#elif defined(__aarch64__)
  return "neon";
#else
  return "plain";
#endif
}

const char* name_of(Isa isa) {
  constexpr const char* names[] = {"avx512_bf16", "avx512", "avx2", "plain"};
  return names[static_cast<int>(isa)];
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> available = [] {
    std::vector<Isa> isas;
#if defined(MMKERNELS_X86)
    const std::string widest = detect_isa();
    for (const Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2}) {
      if (!isas.empty() || widest == name_of(isa)) {
        isas.push_back(isa);
      }
    }
#endif
    isas.push_back(Isa::plain);
    return isas;
  }();
  return available;
}

Isa chosen_isa() {
  const int isa = chosen.load(std::memory_order_relaxed);
  return isa < 0 ? available_isas().front() : static_cast<Isa>(isa);
}

void choose_isa(Isa isa) {
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

} // namespace mmkernels
