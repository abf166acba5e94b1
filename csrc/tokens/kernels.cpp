// The kernels on visual tokens of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA
// its name.
#include "../common/table.h"
#include "cosine.h"
#include "diverse.h"
#include "match_tokens.h"
#include "merge_patches_kernels.h"
#include "merge_tokens.h"
#include "nearest.h"
#include "pool_tokens_kernels.h"
#include "rows.h"

namespace mmkernels::MMK_ISA {

extern const CosineKernels cosine_kernels;
const CosineKernels cosine_kernels = {
    .frame_scratch = frame_scratch,
    .frame_difference = frame_difference,
    .add_directions = add_directions,
    .project = project,
};

extern const DiverseKernels diverse_kernels;
const DiverseKernels diverse_kernels = {
    .scratch = diverse_scratch,
    .read = read_token,
    .dots = token_dots,
    .subtract = subtract_rows,
};

extern const MergePatchesKernels merge_patches_kernels;
const MergePatchesKernels merge_patches_kernels = {
    .scratch = merge_scratch,
    .merge = merge_patches,
    .backward = merge_patches_backward,
};

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

extern const NearestKernels nearest_kernels;
const NearestKernels nearest_kernels = {
    .rows = kNearestRows,
    .panel = kPanel,
    .panels_bytes = nearest_panels_bytes,
    .scratch = nearest_scratch,
    .pack = pack_kept,
    .nearest = nearest,
    .extreme = extreme,
    .sum = sum_tokens,
};

extern const PoolTokensKernels pool_tokens_kernels;
const PoolTokensKernels pool_tokens_kernels = {
    .scratch = pool_scratch,
    .pool = pool_tokens,
};

extern const RowKernels row_kernels;
const RowKernels row_kernels = {.compose = compose_rows};

} // namespace mmkernels::MMK_ISA
