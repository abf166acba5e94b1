// The attention kernels of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "../common/table.h"
#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "scores.h"

namespace mmkernels {

extern const AttentionKernels MMK_OF_ISA(attention_kernels);
const AttentionKernels MMK_OF_ISA(attention_kernels) = {
    .panel = MMK_ISA::kPanel,
    .word_bytes = sizeof(MMK_ISA::Word),
    .mask_words = MMK_ISA::mask_words,
    .plan_panels = MMK_ISA::plan_panels,
    .forward_scratch = MMK_ISA::forward_scratch,
    .forward = MMK_ISA::forward,
    .decode_rows = MMK_ISA::kDecodeRows,
    .decode_scratch = MMK_ISA::decode_scratch,
    .decode = MMK_ISA::decode,
    .decode_merge = MMK_ISA::decode_merge,
    .backward_scratch = MMK_ISA::backward_scratch,
    .backward = MMK_ISA::backward,
    .backward_merge = MMK_ISA::backward_merge,
    .scores_scratch = MMK_ISA::scores_scratch,
    .scores_lse = MMK_ISA::scores_lse,
    .received = MMK_ISA::received,
    .weights = MMK_ISA::weights,
};

} // namespace mmkernels
