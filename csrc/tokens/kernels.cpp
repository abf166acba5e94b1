// The kernels on visual tokens of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA
// its name.
#include "../common/table.h"
#include "merge_patches_kernels.h"
#include "pool_tokens_kernels.h"

namespace mmkernels::MMK_ISA {

extern const MergePatchesKernels merge_patches_kernels;
const MergePatchesKernels merge_patches_kernels = {
    .scratch = merge_scratch,
    .merge = merge_patches,
    .backward = merge_patches_backward,
};

extern const PoolTokensKernels pool_tokens_kernels;
const PoolTokensKernels pool_tokens_kernels = {
    .scratch = pool_scratch,
    .pool = pool_tokens,
    .dots = pool_dots,
};

} // namespace mmkernels::MMK_ISA
