// The contrastive kernels of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its
// name.
#include "../common/names.h"
#include "gradient.h"
#include "ranks.h"
#include "softmax.h"

namespace mmkernels {

extern const PairKernels MMK_JOIN(pair_kernels_, MMK_ISA);
const PairKernels MMK_JOIN(pair_kernels_, MMK_ISA) = {
    MMK_ISA::kPanel,          MMK_ISA::strip_lanes,     MMK_ISA::panels_bytes,   MMK_ISA::rows_bytes,
    MMK_ISA::part_floats,     MMK_ISA::take_multiplied, MMK_ISA::pieces,         MMK_ISA::pack,
    MMK_ISA::softmax_scratch, MMK_ISA::softmax,         MMK_ISA::best_positives, MMK_ISA::gradient_scratch,
    MMK_ISA::gradient,        MMK_ISA::merge,           MMK_ISA::convert,        MMK_ISA::target_scores,
    MMK_ISA::count_before,
};

} // namespace mmkernels
