// The attention kernels of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "../common/names.h"
#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "scores.h"

namespace mmkernels {

extern const Kernels MMK_JOIN(kernels_, MMK_ISA);
const Kernels MMK_JOIN(kernels_, MMK_ISA) = {
    MMK_ISA::kPanel,          sizeof(MMK_ISA::Word),   MMK_ISA::mask_words,       MMK_ISA::plan_panels,
    MMK_ISA::forward_scratch, MMK_ISA::forward,        MMK_ISA::kDecodeRows,      MMK_ISA::decode_scratch,
    MMK_ISA::decode,          MMK_ISA::decode_merge,   MMK_ISA::backward_scratch, MMK_ISA::backward,
    MMK_ISA::backward_merge,  MMK_ISA::scores_scratch, MMK_ISA::scores_lse,       MMK_ISA::received,
    MMK_ISA::weights,
};

} // namespace mmkernels
