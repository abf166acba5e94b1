// The peak of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "peak.h"

namespace mmkernels {

extern const Peak MMK_OF_ISA(peak);
const Peak MMK_OF_ISA(peak) = MMK_ISA::peak;

} // namespace mmkernels
