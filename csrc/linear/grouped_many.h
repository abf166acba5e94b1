// Many rows a group: packed tiles at the rate of the arithmetic. A task has so few rows that they stay in a cache,
// packed, while the matrix passes by.
#pragma once

#include "grouped_few.h"

namespace mmkernels::MMK_ISA {

// The rows of a task and its part of a matrix, as the linear ops' panels and blocks see them.
inline LinearParams panels_of_task(const GroupedParams& p, const GroupedTask& t, std::int32_t* live) {
  LinearParams q;
  q.tokens = t.rows, q.words = t.columns, q.dim = p.depth;
  q.hidden = p.rows;
  q.hidden.data += t.first_row * p.rows.row * bytes_of(p.rows.type);
  q.weight = matrix_of(p, t.group, t.first);
  for (i64 row = 0; live != nullptr && row < t.rows; ++row) {
    live[row] = (std::int32_t)row;
  }
  q.live = live;
  return q;
}

struct ManyByRowsScratch : Arena {
  const GroupedShare& s;
  std::int32_t* live = take<std::int32_t>(s.rows);
  LinearParams q = panels_of_task(s.p, {0, 0, s.rows, 0, s.columns}, nullptr);
  float* panels = take<float>(panels_floats(q));
  char* pack = take<char>(pack_scratch(q));
  char* tile = take<char>(scratch_bytes<LogitsScratch>(q));
};

// Of a matrix whose rows are runs of memory: rows of x are lanes, so that rows of the matrix are read in place.
inline void many_by_rows(const GroupedParams& p, const GroupedTask& t, char* scratch) {
  const GroupedShare share{p, t.rows, t.columns};
  const ManyByRowsScratch s{{scratch}, share};
  LinearParams q = panels_of_task(p, t, s.live);
  for (i64 panel = 0; panel < panels_of(q); ++panel) {
    pack_panel(q, panel, s.panels, s.pack);
  }
  q.panels = s.panels;
  const LogitsScratch tile{{s.tile}, q};
  each_block(0, t.columns, tile.words, [&](i64 first, i64 count) {
    each_tile(q, tile, first, count, [&](i64 panel) {
      const i64 row = panel * kPanel, rows = least<i64>(kPanel, t.rows - row);
      for (i64 r = 0; r < rows; r += kLanes) {
        for (i64 n = 0; n < count; n += kLanes) {
          Vec block[kLanes];
          for (i64 i = 0; i < kLanes; ++i) {
            block[i] = n + i < count ? load(tile.tile + (n + i) * kPanel + r) : zero();
          }
          transpose(block);
          for (i64 i = 0; i < least<i64>(kLanes, rows - r); ++i) {
            write_result(p, t.group, t.first_row + row + r + i, t.first + first + n, block[i], count - n);
          }
        }
      }
    });
  });
}

constexpr i64 kSumDepth = 128; // elements, or pairs, along the depth whose block of the matrix is copied at a time
struct ManyByColumnsScratch : Arena {
  const GroupedShare& s;
  char* rows = take<char>(rows_bytes(s.p, s.rows));
  char* copy = take<char>(2 * kSumDepth * row_bytes(is_dot(s.p), kPanel));
  float* right = take<float>(kSumDepth * kPanel);
  float* sums = take<float>(s.rows * kPanel);
};

// Of a matrix whose columns are runs of memory, which are vectors of the right operand: copied block by block, for rows
// at multiples of a page meet in the same cache lines.
inline void many_by_columns(const GroupedParams& p, const GroupedTask& t, char* scratch) {
  const GroupedShare share{p, t.rows, t.columns};
  const ManyByColumnsScratch s{{scratch}, share};
  const Rows a = fetch(rows_from(p.rows, t.first_row), t.rows, p.depth, is_dot(p), s.rows);
  const Source m = across(matrix_of(p, t.group, t.first)); // [depth, columns]
  with_pairs(is_dot(p), [&](auto pairs) {
    constexpr i64 kPair = pairs() ? 2 : 1;
    for (i64 c = 0; c < t.columns; c += kPanel) {
      const i64 cols = least<i64>(kPanel, t.columns - c);
      for (i64 k = 0; k < p.depth; k += kPair * kSumDepth) {
        const i64 count = least(kPair * kSumDepth, p.depth - k);
        Source some = from_column(m, c);
        some.data += k * m.l * bytes_of(m.type);
        group_columns(pairs(), fetch(some, count, cols, pairs(), s.copy), count, cols, s.right);
        product<pairs()>({a.data + k * (4 / kPair), a.stride, 4}, s.right, kPanel, s.sums, kPanel, t.rows,
                         vectors_of_lanes(cols), depth_of(pairs(), count), k > 0);
      }
      for (i64 r = 0; r < t.rows; ++r) {
        for (i64 n = 0; n < cols; n += kLanes) {
          write_result(p, t.group, t.first_row + r, t.first + c + n, load(s.sums + r * kPanel + n), cols - n);
        }
      }
    }
  });
}

// More rows fill enough lanes of packed panels: 48 of them take as long as 44 do above, and of a matrix whose columns
// are runs, which are lanes for few rows too, packing pays later.
inline i64 few_rows(const GroupedParams& p) {
  return p.transposed ? 64 : 44;
}
inline i64 column_step(const GroupedParams&) {
  return kPanel;
}
inline i64 grouped_scratch(const GroupedParams& p, i64 rows, i64 columns) {
  const GroupedShare few{p, least(rows, few_rows(p)), columns}, many{p, rows, columns};
  return p.transposed ? most(scratch_bytes<FewByColumnsScratch>(few), scratch_bytes<ManyByColumnsScratch>(many))
                      : most(scratch_bytes<FewByRowsScratch>(few), scratch_bytes<ManyByRowsScratch>(many));
}
inline void multiply(const GroupedParams& p, const GroupedTask& t, char* scratch) {
  const bool few = t.rows <= few_rows(p);
  if (p.transposed) {
    few ? few_by_columns(p, t, scratch) : many_by_columns(p, t, scratch);
  } else {
    few ? few_by_rows(p, t, scratch) : many_by_rows(p, t, scratch);
  }
}

} // namespace mmkernels::MMK_ISA
