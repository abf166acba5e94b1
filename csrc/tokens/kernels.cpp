// The kernels on visual tokens of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA
// its name.
#include "nearest.h"
#include "rows.h"

namespace mmkernels::MMK_ISA {

extern const RowKernels row_kernels;
const RowKernels row_kernels = {.compose = compose_rows};

extern const NearestKernels nearest_kernels;
const NearestKernels nearest_kernels = {
    .rows = kNearestRows,
    .panel = kPanel,
    .panels_bytes = nearest_panels_bytes,
    .scratch = nearest_scratch,
    .pack = pack_kept,
    .nearest = nearest,
    .sum = sum_tokens,
};

} // namespace mmkernels::MMK_ISA
