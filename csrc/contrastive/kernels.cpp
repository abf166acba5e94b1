// The contrastive kernels of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its
// name.
#include "../common/table.h"
#include "gradient.h"
#include "ranks.h"
#include "softmax.h"

namespace mmkernels {

extern const ContrastiveKernels MMK_OF_ISA(contrastive_kernels);
const ContrastiveKernels MMK_OF_ISA(contrastive_kernels) = {
    .strip_lanes = MMK_ISA::strip_lanes,
    .panels_bytes = MMK_ISA::panels_bytes,
    .rows_bytes = MMK_ISA::rows_bytes,
    .part_floats = MMK_ISA::part_floats,
    .take_multiplied = MMK_ISA::take_multiplied,
    .pieces = MMK_ISA::pieces,
    .pack = MMK_ISA::pack,
    .softmax_scratch = MMK_ISA::softmax_scratch,
    .softmax = MMK_ISA::softmax,
    .best_positives = MMK_ISA::best_positives,
    .gradient_scratch = MMK_ISA::gradient_scratch,
    .gradient = MMK_ISA::gradient,
    .merge = MMK_ISA::merge,
    .convert = MMK_ISA::convert,
    .target_scores = MMK_ISA::target_scores,
    .count_before = MMK_ISA::count_before,
};

} // namespace mmkernels
