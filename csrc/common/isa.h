// The instruction sets that kernels are compiled for, widest first, and which of them this CPU and OS have.
#pragma once

#include <string>

namespace mmkernels {

// avx512_bf16, avx512, avx2, neon or plain.
inline std::string detect_isa() {
#if defined(__x86_64__)
  // The builtins ask XGETBV too: an instruction set whose registers the OS does not save counts as absent.
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

} // namespace mmkernels
