// What one instruction set gives at best: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "names.h"
#include "peak.h"

namespace mmkernels {

// FLOP of one thread that does nothing but multiply and add in registers for some seconds, of bfloat16 pairs if it can.
double MMK_JOIN(multiply_, MMK_ISA)(bool bf16, double seconds) {
  return MMK_ISA::multiply(bf16, seconds);
}

} // namespace mmkernels
