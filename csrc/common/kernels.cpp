// What one instruction set gives at best: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "names.h"
#include "peak.h"

namespace mmkernels {

// FLOP a second of one thread that does nothing but multiply and add in registers, of bfloat16 pairs if it can.
double MMK_JOIN(peak_, MMK_ISA)(bool bf16) {
  return MMK_ISA::peak(bf16);
}

} // namespace mmkernels
