// Tables of kernels: one for each instruction set, filled in by a kernels.cpp with an initialiser for each name.
#pragma once

// The name of the table of the instruction set that is compiled.
#define MMK_JOIN_EXPANDED(name, isa) name##_##isa
#define MMK_JOIN(name, isa) MMK_JOIN_EXPANDED(name, isa)
#define MMK_OF_ISA(name) MMK_JOIN(name, MMK_ISA)

#pragma GCC diagnostic error "-Wmissing-field-initializers" // a table without one of its kernels does not compile

namespace mmkernels {

// FLOP of one thread that does nothing but multiply and add in registers for some seconds, of bfloat16 pairs if it can.
using Multiply = double (*)(bool bf16, double seconds);

} // namespace mmkernels
