// The instruction sets that the kernels are compiled for, and which of them is in use: one choice for the process.
#pragma once

#include <string>
#include <vector>

namespace mmkernels {

enum class Isa { avx512_bf16, avx512, avx2, plain }; // name_of and MMK_TABLES list them in this order

// The widest instruction set of this CPU and OS: avx512_bf16, avx512, avx2, neon or plain.
std::string detect_isa();

// The instruction sets that this machine can run, widest first.
const std::vector<Isa>& available_isas();
const char* name_of(Isa isa);

Isa chosen_isa();
void choose_isa(Isa isa);

} // namespace mmkernels

// Declares the tables `<instruction set>::name`, each defined by a kernels.cpp, and name(), which returns the table of
// the chosen instruction set.
#define MMK_TABLE(Table, name, isa)                                                                                    \
  namespace isa {                                                                                                      \
  extern const Table name;                                                                                             \
  }
#if defined(MMKERNELS_X86)
#define MMK_TABLES(Table, name)                                                                                        \
  MMK_TABLE(Table, name, avx512_bf16)                                                                                  \
  MMK_TABLE(Table, name, avx512)                                                                                       \
  MMK_TABLE(Table, name, avx2)                                                                                         \
  MMK_TABLE(Table, name, plain)                                                                                        \
  inline const Table& name() {                                                                                         \
    static constexpr const Table* tables[] = {&avx512_bf16::name, &avx512::name, &avx2::name, &plain::name};           \
    return *tables[static_cast<int>(chosen_isa())];                                                                    \
  }
#else
#define MMK_TABLES(Table, name)                                                                                        \
  MMK_TABLE(Table, name, plain)                                                                                        \
  inline const Table& name() {                                                                                         \
    return plain::name;                                                                                                \
  }
#endif
