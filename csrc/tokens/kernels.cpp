// The kernels on visual tokens of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA
// its name.
#include "../common/table.h"
#include "diverse.h"

namespace mmkernels::MMK_ISA {

extern const DiverseKernels diverse_kernels;
const DiverseKernels diverse_kernels = {
    .scratch = diverse_scratch,
    .read = read_token,
    .dots = token_dots,
    .subtract = subtract_rows,
};

} // namespace mmkernels::MMK_ISA
