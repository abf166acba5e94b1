// The kernels on visual tokens of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA
// its name.
#include "rows.h"

namespace mmkernels::MMK_ISA {

extern const RowKernels row_kernels;
const RowKernels row_kernels = {.compose = compose_rows};

} // namespace mmkernels::MMK_ISA
