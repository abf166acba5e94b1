// The instruction sets that the kernels are compiled for, and which of them is in use: one choice for the process.
#pragma once

#include <string>
#include <vector>

namespace mmkernels {

enum class Isa { avx512_bf16, avx512, avx2, plain };

// The widest instruction set of this CPU and OS: avx512_bf16, avx512, avx2, neon or plain.
std::string detect_isa();

// The instruction sets that this machine can run, widest first.
const std::vector<Isa>& available_isas();
const char* name_of(Isa isa);

Isa chosen_isa();
void choose_isa(Isa isa);

} // namespace mmkernels

// Declares the tables `name_<instruction set>`, each defined by a kernels.cpp, and name(), which returns the table of
// the chosen instruction set.
#if defined(MMKERNELS_X86)
#define MMK_TABLES(Table, name)                                                                                        \
  extern const Table name##_avx512_bf16, name##_avx512, name##_avx2, name##_plain;                                     \
  inline const Table& name() {                                                                                         \
    switch (chosen_isa()) {                                                                                            \
    case Isa::avx512_bf16:                                                                                             \
      return name##_avx512_bf16;                                                                                       \
    case Isa::avx512:                                                                                                  \
      return name##_avx512;                                                                                            \
    case Isa::avx2:                                                                                                    \
      return name##_avx2;                                                                                              \
    default:                                                                                                           \
      return name##_plain;                                                                                             \
    }                                                                                                                  \
  }
#else
#define MMK_TABLES(Table, name)                                                                                        \
  extern const Table name##_plain;                                                                                     \
  inline const Table& name() {                                                                                         \
    return name##_plain;                                                                                               \
  }
#endif
