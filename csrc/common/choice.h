// Which of the instruction sets that kernels are compiled for is used: one choice for the whole process.
#pragma once

#include <string>
#include <vector>

namespace mmkernels {

enum class Isa { avx512_bf16, avx512, avx2, plain };

// The instruction sets that this machine can run, widest first.
const std::vector<Isa>& offered();
const char* name_of(Isa isa);

Isa chosen();
void choose(Isa isa);

} // namespace mmkernels

// Of the four objects name_avx512_bf16 to name_plain the chosen instruction set's.
#if defined(MMKERNELS_X86)
#define MMKERNELS_CHOSEN(name)                                                                                         \
  (::mmkernels::chosen() == ::mmkernels::Isa::avx512_bf16                                                              \
       ? name##_avx512_bf16                                                                                            \
       : (::mmkernels::chosen() == ::mmkernels::Isa::avx512                                                            \
              ? name##_avx512                                                                                          \
              : (::mmkernels::chosen() == ::mmkernels::Isa::avx2 ? name##_avx2 : name##_plain)))
#else
#define MMKERNELS_CHOSEN(name) name##_plain
#endif
