// The peak of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "peak.h"

namespace mmkernels::MMK_ISA {

extern const Multiply multiply;
const Multiply multiply = multiply_in_registers;

} // namespace mmkernels::MMK_ISA
