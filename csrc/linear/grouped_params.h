// One call of grouped_linear as the kernels see it: plain data, no torch. grouped_linear.cpp fills it in.
//
// What no kernel can go below: with few rows a group (a decode step), the bytes of the matrices of groups that have
// rows, over the bandwidth of reading them once; with many, 2 rows width depth FLOP over the peak of multiply-adds. A
// core of this decade reads some 8 FLOP's worth of time a byte, so that float32 matrices (4 bytes, 2 FLOP a row) cross
// over at about 16 rows a group, and so do bfloat16 matrices where pairs are multiplied at twice the rate.
#pragma once

#include "params.h"

namespace mmkernels {

// y = rows M' (+ bias) for each group's rows and matrix M [width, depth]. A forward pass has M = W; the gradient of its
// rows has M = W'. No sum's order depends on strides, so that no bit of a result does.
struct GroupedParams {
  bool transposed = false; // M = W': W's rows are as long as M is wide
  std::int64_t depth = 0, width = 0;
  Matrix rows;                  // [R, depth]
  Matrix matrices;              // [groups, width, depth]; strides of one of them
  std::int64_t matrix_step = 0; // elements from one group's matrix to the next
  const float* bias = nullptr;  // [groups, width]
  char* out = nullptr;          // [R, width], dense
  Type out_type = Type::f32;
};

// Columns [first, first + columns) of some rows of one group.
struct GroupedTask {
  std::int64_t group, first_row, rows, first, columns;
};

// The gradient of the matrices: dM = flow' rows for each group's rows.
struct MatrixGradientParams {
  std::int64_t depth = 0, width = 0;
  Matrix flow;        // [R, width]
  Matrix rows;        // [R, depth]
  char* to = nullptr; // [groups, width, depth], dense
  Type type = Type::f32;
};

// The kernels of one instruction set.
struct GroupedKernels {
  std::int64_t (*take_multiplied)();
  std::int64_t (*few_rows)(const GroupedParams&);    // up to so many rows a task streams the matrix and packs nothing
  std::int64_t (*column_step)(const GroupedParams&); // tasks begin at multiples of it
  std::int64_t (*scratch)(const GroupedParams&, std::int64_t rows, std::int64_t columns); // of a task, at most
  void (*multiply)(const GroupedParams&, const GroupedTask&, char* scratch);

  std::int64_t (*gradient_step)(); // outputs of a task: at most
  std::int64_t (*gradient_scratch)(const MatrixGradientParams&, std::int64_t rows);
  // Rows `first` to `first + columns` of one group's gradient.
  void (*matrix_gradient)(const MatrixGradientParams&, const GroupedTask&, char* scratch);
  // to[width]: the sum of some rows of the flow.
  void (*bias_gradient)(const MatrixGradientParams&, std::int64_t first_row, std::int64_t rows, float* to);
};

} // namespace mmkernels
