// The attention kernels of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "../common/table.h"
#include "backward.h"
#include "co_attention_backward.h"
#include "co_attention_floor.h"
#include "co_attention_forward.h"
#include "decode.h"
#include "forward.h"
#include "scores.h"

namespace mmkernels::MMK_ISA {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    .panel = kPanel,
    .word_bytes = sizeof(Word),
    .mask_words = mask_words,
    .plan_panels = plan_panels,
    .forward_scratch = forward_scratch,
    .forward = forward,
    .decode_rows = kDecodeRows,
    .decode_scratch = scratch_bytes<DecodeScratch>,
    .decode = decode,
    .decode_merge = decode_merge,
    .backward_scratch = scratch_bytes<BackwardScratch>,
    .backward = backward,
    .backward_merge = backward_merge,
    .scores_scratch = scores_scratch,
    .scores_lse = scores_lse,
    .received = received,
    .weights = weights,
    .few_weights = few_weights,
};

extern const CoAttentionKernels co_attention_kernels;
const CoAttentionKernels co_attention_kernels = {
    .max_tile_rows = kTileKeys,
    .forward_scratch = co_forward_scratch,
    .row_part = row_part,
    .forward = co_forward,
    .forward_merge = co_forward_merge,
    .backward_scratch = scratch_bytes<CoBackwardScratch>,
    .backward_row_part = backward_row_part,
    .backward = co_backward,
    .backward_merge = co_backward_merge,
    .largest_norm = largest_norm,
    .widen_range = widen_range,
    .largest_score = largest_score,
};

} // namespace mmkernels::MMK_ISA
