// The peak of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "peak.h"

namespace mmkernels {

extern const Multiply MMK_OF_ISA(multiply);
const Multiply MMK_OF_ISA(multiply) = MMK_ISA::multiply;

} // namespace mmkernels
