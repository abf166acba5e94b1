// The linear kernels of one instruction set: CMakeLists.txt compiles this file once for each, with MMK_ISA its name.
#include "../common/table.h"
#include "gradient.h"
#include "grouped_gradient.h"
#include "grouped_many.h"
#include "products.h"
#include "states.h"

namespace mmkernels::MMK_ISA {

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {
    .take_multiplied = take_multiplied,
    .is_dot = is_dot,
    .block_words = block_words,
    .product_words = product_words,
    .panel_tokens = panel_tokens,
    .panels_floats = panels_floats,
    .groups_floats = groups_floats,
    .pack_scratch = pack_scratch,
    .pack_panel = pack_panel,
    .pack_group = pack_group,
    .logits_scratch = scratch_bytes<LogitsScratch>,
    .states = states,
    .gradient_of_kept = gradient_of_kept,
    .gradient = gradient,
    .product_scratch = scratch_bytes<ProductScratch>,
    .products = products,
    .hidden_rows = hidden_rows,
};

extern const GroupedKernels grouped_kernels;
const GroupedKernels grouped_kernels = {
    .take_multiplied = take_multiplied,
    .few_rows = few_rows,
    .column_step = column_step,
    .scratch = grouped_scratch,
    .multiply = multiply,
    .gradient_step = gradient_step,
    .gradient_scratch = matrix_gradient_scratch,
    .matrix_gradient = matrix_gradient,
    .bias_gradient = bias_gradient,
};

} // namespace mmkernels::MMK_ISA
