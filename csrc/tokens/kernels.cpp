// The kernels on visual tokens of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA
// its name.
#include "../common/table.h"
#include "diverse.h"
#include "nearest.h"
#include "rows.h"

namespace mmkernels::MMK_ISA {

extern const DiverseKernels diverse_kernels;
const DiverseKernels diverse_kernels = {
    .scratch = diverse_scratch,
    .read = read_token,
    .dots = token_dots,
    .subtract = subtract_rows,
};

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
