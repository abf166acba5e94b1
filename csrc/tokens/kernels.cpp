// The visual-token kernels of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its
// name.
#include "../common/table.h"
#include "match_tokens.h"
#include "merge_tokens.h"

namespace mmkernels::MMK_ISA {

extern const MergeTokensKernels merge_tokens_kernels;
const MergeTokensKernels merge_tokens_kernels = {
    .panel = kPanel,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .match_scratch = match_scratch,
    .match = match,
    .sum_groups = sum_groups,
    .spread_groups = spread_groups,
    .group_dots = group_dots,
};

} // namespace mmkernels::MMK_ISA
