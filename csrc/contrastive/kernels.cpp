// The contrastive kernels of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its
// name.
#include "../common/table.h"
#include "gradient.h"
#include "max_sim_gradient.h"
#include "ranks.h"
#include "softmax.h"

namespace mmkernels::MMK_ISA {

extern const ContrastiveKernels contrastive_kernels;
const ContrastiveKernels contrastive_kernels = {
    .strip_lanes = strip_lanes,
    .panels_bytes = panels_bytes,
    .rows_bytes = rows_bytes,
    .part_floats = part_floats,
    .take_multiplied = take_multiplied,
    .pieces = pieces,
    .pack = pack,
    .softmax_scratch = scratch_bytes<SoftmaxScratch>,
    .softmax = softmax,
    .best_positives = best_positives,
    .gradient_scratch = gradient_scratch,
    .gradient = gradient,
    .merge = merge,
    .convert = convert,
    .target_scores = target_scores,
    .count_before = count_before,
};

extern const MaxSimKernels max_sim_kernels;
const MaxSimKernels max_sim_kernels = {
    .panel = kPanel,
    .min_rows = 1024,
    .take_multiplied = take_multiplied,
    .task_panels = task_panels,
    .scratch = scratch_bytes<BestScratch>,
    .best = best_tokens,
    .query_gradient = query_gradient,
    .document_scratch = document_scratch,
    .document_gradient = document_gradient,
};

} // namespace mmkernels::MMK_ISA
