// The gradient of grouped_linear's matrices: products over a group's rows, whose results are written once.
#pragma once

#include "grouped_few.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kGradientStep = 96;     // rows of the result of a task: whole tiles of 6 and of 8 rows
constexpr i64 kPackedRows = 1024;     // rows of a group that are packed at a time
constexpr i64 kGradientColumns = 512; // columns of the result whose sums over more rows than that are kept
constexpr i64 kFewGradientRows = 16;  // whose packed rows stay in a cache for all rows of the result

MMK_INLINE bool is_dot(const MatrixGradientParams& p) {
  return uses_dot(p.flow.type);
}
struct GradientShare {
  const MatrixGradientParams& p;
  i64 rows; // packed at a time
};
struct MatrixGradientScratch : Arena {
  const GradientShare& s;
  const bool dot = is_dot(s.p);
  const i64 depth = depth_of(dot, s.rows), panels = s.rows <= kFewGradientRows ? s.p.depth : kPanel;
  char* copy = take<char>(s.rows * row_bytes(dot, kGradientStep));
  char* pairs = take<char>(dot ? depth * pad_lanes(kGradientStep) * 4 : 0);
  float* flow = take<float>(kGradientStep * pad_lanes(depth)); // [outputs, rows (or pairs)]
  char* row_copy = take<char>(s.rows * row_bytes(dot, kPanel));
  float* rows = take<float>(depth * round_up(panels, kPanel)); // [panels, rows (or pairs), kPanel]
  float* sums = take<float>(kGradientStep * kGradientColumns);
};

struct MatrixGradient {
  const MatrixGradientParams& p;
  const GroupedTask& t;
  const MatrixGradientScratch& s;

  // Transposes some rows' flow to the outputs of this task: rows of x are its depth.
  void pack_flow(i64 first, i64 count) const {
    const Source from = from_column(rows_from(p.flow, t.first_row + first), t.first);
    const Rows rows = fetch(from, count, t.columns, s.dot, s.copy);
    const i64 depth = depth_of(s.dot, count), lanes = pad_lanes(depth);
    if (s.dot) {
      interleave_rows(rows, count, t.columns, s.pairs);
      transpose_rows({s.pairs, pad_lanes(t.columns) * 4}, depth, t.columns, lanes, s.flow);
    } else {
      transpose_rows(rows, depth, t.columns, lanes, s.flow);
    }
  }
  void pack_rows(i64 first, i64 count, i64 column, float* to) const {
    const i64 cols = least<i64>(kPanel, p.depth - column);
    const Source from = from_column(rows_from(p.rows, t.first_row + first), column);
    group_columns(s.dot, fetch(from, count, cols, s.dot, s.row_copy), count, cols, to);
  }
  // Products of some outputs with a panel of x, over `count` rows.
  void multiply_panel(i64 output, i64 outputs, const float* rows, i64 count, i64 vectors, float* to, i64 to_row,
                      bool add) const {
    const i64 depth = depth_of(s.dot, count), stride = pad_lanes(depth) * 4;
    with_pairs(s.dot, [&](auto pairs) {
      for (i64 k = 0; k < depth; k += kChain) {
        product<pairs()>({(const char*)s.flow + output * stride + k * 4, stride, 4}, rows + k * kPanel, kPanel, to,
                         to_row, outputs, vectors, least(kChain, depth - k), add || k > 0);
      }
    });
  }
  char* result(i64 output, i64 column) const {
    return p.to + ((t.group * p.width + t.first + output) * p.depth + column) * bytes_of(p.type);
  }
  void write(i64 output, i64 outputs, i64 column, i64 cols, const float* sums, i64 sums_row) const {
    for (i64 r = 0; r < outputs; ++r) {
      for (i64 c = 0; c < cols; c += kLanes) {
        store_from_f32(result(output + r, column + c), p.type, load(sums + r * sums_row + c), cols - c);
      }
    }
  }

  // kTall rows of the result at two vectors of columns.
  template <int kTall, bool kDot> void few_tile(i64 output, const float* rows, i64 depth, i64 column, i64 cols) const {
    const i64 stride = pad_lanes(depth);
    const float* flow = s.flow + output * stride;
    Vec acc[kTall][2] = {};
    for (i64 k = 0; k < depth; ++k) {
      const Vec x = load(rows + k * kPanel), z = load(rows + k * kPanel + kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kTall; ++i) {
        const Vec factor = broadcast(flow + i * stride + k);
        acc[i][0] = multiply_add<kDot>(factor, x, acc[i][0]);
        acc[i][1] = multiply_add<kDot>(factor, z, acc[i][1]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTall; ++i) {
      store_from_f32(result(output + i, column), p.type, acc[i][0], cols);
      if (cols > kLanes) {
        store_from_f32(result(output + i, column + kLanes), p.type, acc[i][1], cols - kLanes);
      }
    }
  }
  // A few rows of the result after the other, so that memory is written in order, and what is written is final.
  void few() const {
    const i64 depth = depth_of(s.dot, t.rows);
    pack_flow(0, t.rows);
    for (i64 c = 0; c < p.depth; c += kPanel) {
      pack_rows(0, t.rows, c, s.rows + c * depth);
    }
    with_pairs(s.dot, [&](auto pairs) {
      constexpr bool kDot = decltype(pairs)::value;
      constexpr int kTall = 4;
      for (i64 o = 0; o < t.columns; o += kTall) {
        for (i64 c = 0; c < p.depth; c += 2 * kLanes) {
          const float* rows = s.rows + c / kPanel * kPanel * depth + c % kPanel;
          for (i64 i = 0; i < kTall && o + kTall > t.columns; ++i) { // fewer than kTall are left
            if (o + i < t.columns) {
              few_tile<1, kDot>(o + i, rows, depth, c, p.depth - c);
            }
          }
          if (o + kTall <= t.columns) {
            few_tile<kTall, kDot>(o, rows, depth, c, p.depth - c);
          }
        }
      }
    });
    multiplied_here() += 2 * t.rows * t.columns * p.depth;
  }
  void many() const {
    for (i64 strip = 0; strip < p.depth; strip += kGradientColumns) {
      const i64 width = least(kGradientColumns, p.depth - strip);
      for (i64 first = 0; first < t.rows; first += s.s.rows) {
        const i64 count = least(s.s.rows, t.rows - first);
        if (strip == 0 || t.rows > s.s.rows) {
          pack_flow(first, count);
        }
        for (i64 c = 0; c < width; c += kPanel) {
          pack_rows(first, count, strip + c, s.rows);
          multiply_panel(0, t.columns, s.rows, count, vectors_of_lanes(least<i64>(kPanel, width - c)), s.sums + c,
                         kGradientColumns, first > 0);
        }
      }
      write(0, t.columns, strip, width, s.sums, kGradientColumns);
    }
  }
};

inline i64 gradient_step() {
  return kGradientStep;
}
inline i64 matrix_gradient_scratch(const MatrixGradientParams& p, i64 rows) {
  const GradientShare few{p, least(rows, kFewGradientRows)}, many{p, least(rows, kPackedRows)};
  return most(scratch_bytes<MatrixGradientScratch>(few), scratch_bytes<MatrixGradientScratch>(many));
}
inline void matrix_gradient(const MatrixGradientParams& p, const GroupedTask& t, char* scratch) {
  const GradientShare share{p, least(t.rows, kPackedRows)};
  const MatrixGradientScratch s{{scratch}, share};
  const MatrixGradient gradient{p, t, s};
  t.rows <= kFewGradientRows ? gradient.few() : gradient.many();
}

// Sums of so many rows first, then of those sums with what rounding took from them (Kahan): a long chain of float32
// sums would lose digits.
inline void bias_gradient(const MatrixGradientParams& p, i64 first_row, i64 rows, float* to) {
  constexpr i64 kSome = 64;
  for (i64 c = 0; c < p.width; c += kLanes) {
    const i64 count = least<i64>(kLanes, p.width - c);
    Vec total = zero(), lost = zero();
    for (i64 first = 0; first < rows; first += kSome) {
      Vec some = zero();
      for (i64 r = first; r < least(first + kSome, rows); ++r) {
        const Source from = from_column(rows_from(p.flow, first_row + r), c);
        if (from.d == 1) {
          some += load_as_f32(from.data, from.type, count);
        } else {
          float x[kLanes] = {};
          for (i64 i = 0; i < count; ++i) {
            x[i] = load_one(from.data + i * from.d * bytes_of(from.type), from.type);
          }
          some += load(x);
        }
      }
      const Vec more = some - lost, sum = total + more;
      lost = (sum - total) - more;
      total = sum;
    }
    store_part(to + c, total, count);
  }
}

} // namespace mmkernels::MMK_ISA
