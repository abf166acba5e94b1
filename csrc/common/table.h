// Tables of kernels: one for each instruction set, filled in by a kernels.cpp with an initialiser for each name.
#pragma once

#pragma GCC diagnostic error "-Wmissing-field-initializers" // a table without one of its kernels does not compile

namespace mmkernels {

// FLOP of one thread that does nothing but multiply and add in registers for some seconds, of bfloat16 pairs if it can.
using Multiply = double (*)(bool bf16, double seconds);

} // namespace mmkernels
