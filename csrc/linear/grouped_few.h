// Few rows a group: the matrix is streamed once, in place and in the order of memory, and is used for all rows while it
// is in the first cache. The rows, which are small, stay there.
#pragma once

#include "blocks.h"
#include "grouped_params.h"

namespace mmkernels::MMK_ISA {

constexpr int kDotWords = kLanes == 16 ? 4 : 2; // rows of the matrix that are multiplied at once
constexpr int kDotRows = kLanes == 16 ? 6 : 4;  // and rows of x: products of each pair are summed in a register

// The lines of a matrix's rows in the order of memory, asked of it a few at a time while others are multiplied: several
// rows that are read side by side are not one stream to the hardware, which then fetches a third as fast.
struct Stream {
  const char* data;
  i64 stride, bytes, rows; // bytes from one row to the next, and of a row
  i64 at = 0;

  MMK_INLINE void ask(i64 count) {
    for (i64 i = 0; i < count && rows > 0; ++i) {
      __builtin_prefetch(data + at, 0, 2);
      at += 64;
      if (at >= bytes) {
        at -= bytes;
        data += stride;
        --rows;
      }
    }
  }
};

// kLanes elements of a matrix in the working format.
template <bool kDot, Type kType> MMK_INLINE Vec load_element(const char* row, i64 k, i64 count) {
  if constexpr (kDot || kType == Type::f32) {
    return load_part(row + k * 4, count);
  } else {
    return load_as_f32(row + k * 2, kType, count);
  }
}

// Calls f(std::bool_constant<kDot>, std::integral_constant<Type, type>).
template <typename F> MMK_INLINE void with_elements(bool is_dot, Type type, const F& f) {
  if (kHasDot && is_dot) {
    f(std::bool_constant<kHasDot>(), std::integral_constant<Type, Type::bf16>());
  } else if (type == Type::f32) {
    f(std::false_type(), std::integral_constant<Type, Type::f32>());
  } else if (type == Type::bf16) {
    f(std::false_type(), std::integral_constant<Type, Type::bf16>());
  } else {
    f(std::false_type(), std::integral_constant<Type, Type::f16>());
  }
}
template <typename F> MMK_INLINE void with_height(i64 rows, const F& f) {
  switch (rows) {
  case 1:
    return f(std::integral_constant<int, 1>());
  case 2:
    return f(std::integral_constant<int, 2>());
  case 3:
    return f(std::integral_constant<int, 3>());
  case 4:
    return f(std::integral_constant<int, 4>());
  case 5:
    return f(std::integral_constant<int, kDotRows == 6 ? 5 : 4>());
  default:
    return f(std::integral_constant<int, kDotRows>());
  }
}

// Lane by lane, what a few rows' products with kDotWords rows of the matrix sum to: sums [rows, kLanes, kLanes].
template <int kRows, bool kDot, Type kType>
MMK_INLINE void dot_tile(Rows a, const char* const (&word)[kDotWords], i64 depth, Stream& ahead, float* sums) {
  constexpr i64 kStepBytes = kDotWords * kLanes * (kDot || kType == Type::f32 ? 4 : 2);
  Vec acc[kRows][kDotWords];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < kDotWords; ++w) {
      acc[r][w] = zero();
    }
  }
  const auto step = [&](i64 k, i64 count) __attribute__((always_inline)) {
    Vec y[kDotWords];
#pragma GCC unroll 4
    for (int w = 0; w < kDotWords; ++w) {
      y[w] = load_element<kDot, kType>(word[w], k, count);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load_part(a.data + r * a.stride + k * 4, count);
#pragma GCC unroll 4
      for (int w = 0; w < kDotWords; ++w) {
        acc[r][w] = multiply_add<kDot>(x, y[w], acc[r][w]);
      }
    }
  };
  i64 k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    ahead.ask((kStepBytes + 63) / 64);
    step(k, kLanes);
  }
  if (k < depth) {
    step(k, depth - k);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < kDotWords; ++w) {
      store(sums + (r * kLanes + w) * kLanes, acc[r][w]);
    }
  }
}

// As above for all rows and at most kLanes rows of the matrix.
template <bool kDot, Type kType>
void dot_block(Rows a, i64 rows, Rows words, i64 count, i64 depth, Stream& ahead, float* sums) {
  const i64 passes = (rows + kDotRows - 1) / kDotRows, height = (rows + passes - 1) / passes;
  for (i64 w = 0; w < count; w += kDotWords) {
    const char* word[kDotWords];
    for (int i = 0; i < kDotWords; ++i) { // past the last one, the last one again
      word[i] = words.data + least(w + i, count - 1) * words.stride;
    }
    for (i64 r = 0; r < rows; r += height) {
      with_height(least(height, rows - r), [&](auto tall) {
        dot_tile<decltype(tall)::value, kDot, kType>({a.data + r * a.stride, a.stride}, word, depth, ahead,
                                      sums + (r * kLanes + w) * kLanes);
      });
    }
  }
}

MMK_INLINE bool is_dot(const GroupedParams& p) {
  return uses_dot(p.matrices.type);
}
MMK_INLINE Source rows_from(const Matrix& x, i64 row) {
  return {x.data + row * x.row * bytes_of(x.type), x.type, x.row, x.column, nullptr};
}
// Rows `first` and on of a group's matrix [width, depth], and of its transpose.
MMK_INLINE Matrix matrix_of(const GroupedParams& p, i64 group, i64 first) {
  Matrix m = p.matrices;
  m.data += (group * p.matrix_step + first * m.row) * bytes_of(m.type);
  return m;
}
MMK_INLINE Source across(const Matrix& m) {
  return {m.data, m.type, m.column, m.row, nullptr};
}
// kLanes columns of one row of the result; `count` of them exist.
MMK_INLINE void write_result(const GroupedParams& p, i64 group, i64 row, i64 column, Vec y, i64 count) {
  if (p.bias != nullptr) {
    y += load_part(p.bias + group * p.width + column, count);
  }
  store_from_f32(p.out + (row * p.width + column) * bytes_of(p.out_type), p.out_type, y, count);
}

struct GroupedShare { // the largest task of a call
  const GroupedParams& p;
  i64 rows, columns;
};
struct FewByRowsScratch : Arena {
  const GroupedShare& s;
  char* rows = take<char>(s.rows * row_bytes(is_dot(s.p), s.p.depth));
  char* words = take<char>(kLanes * row_bytes(is_dot(s.p), s.p.depth));
  float* sums = take<float>(s.rows * kLanes * kLanes);
};

// Of a matrix whose rows are runs of memory; others are copied.
inline void few_by_rows(const GroupedParams& p, const GroupedTask& t, char* scratch) {
  const GroupedShare share{p, t.rows, t.columns};
  const FewByRowsScratch s{{scratch}, share};
  const Rows a = fetch(rows_from(p.rows, t.first_row), t.rows, p.depth, is_dot(p), s.rows);
  const Matrix m = matrix_of(p, t.group, t.first);
  const i64 size = bytes_of(m.type);
  // Odd rows of pairs end in the next row, which a zero does not keep out if it is not finite.
  const bool in_place = m.column == 1 && (!is_dot(p) || p.depth % 2 == 0);
  Stream ahead{m.data, m.row * size, p.depth * size, in_place ? t.columns : 0};
  if (in_place) {
    ahead.ask(kDotWords * p.depth * size / 64);
  }
  with_elements(is_dot(p), in_place ? m.type : Type::f32, [&](auto pairs, auto type) {
    for (i64 n = 0; n < t.columns; n += kLanes) {
      const i64 count = least<i64>(kLanes, t.columns - n);
      const Source from = rows_from(m, n);
      const Rows words = in_place ? Rows{from.data, from.l * size} : fetch(from, count, p.depth, is_dot(p), s.words);
      dot_block<pairs(), type()>(a, t.rows, words, count, depth_of(pairs(), p.depth), ahead, s.sums);
      for (i64 r = 0; r < t.rows; ++r) {
        Vec sums[kLanes];
        for (i64 i = 0; i < kLanes; ++i) {
          sums[i] = i < count ? load(s.sums + (r * kLanes + i) * kLanes) : zero();
        }
        write_result(p, t.group, t.first_row + r, t.first + n, sum_each(sums), count);
      }
    }
  });
  multiplied_here() += 2 * t.rows * t.columns * p.depth;
}

constexpr int kSumSteps = kLanes == 16 ? 8 : 4; // rows of the transposed matrix, or pairs, that are added at once
struct FewByColumnsScratch : Arena {
  const GroupedShare& s;
  char* rows = take<char>(s.rows * row_bytes(is_dot(s.p), s.p.depth));
  char* copy = take<char>(s.p.matrices.row == 1 ? 0 : 2 * kSumSteps * row_bytes(is_dot(s.p), s.columns));
  char* pairs = take<char>(is_dot(s.p) ? kSumSteps * pad_lanes(s.columns) * 4 : 0);
  float* sums = take<float>(s.rows * round_up(s.columns, 2 * kLanes));
};

// sums [rows, columns in whole pairs of vectors] += a [rows, kSteps] right [kSteps, columns].
template <int kSteps, bool kDot, Type kType>
void add_outer(Rows a, i64 rows, Rows right, i64 columns, Stream& ahead, float* sums) {
  constexpr i64 size = kDot || kType == Type::f32 ? 4 : 2;
  const i64 sums_row = round_up(columns, 2 * kLanes);
  const auto step = [&](i64 c, i64 first, i64 second) __attribute__((always_inline)) {
    Vec y[kSteps][2];
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) {
      y[i][0] = load_element<kDot, kType>(right.data + i * right.stride, c, first);
      y[i][1] = load_element<kDot, kType>(right.data + i * right.stride, c + kLanes, second);
    }
    for (i64 r = 0; r < rows; ++r) {
      Vec x = zero(), z = zero();
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; ++i) {
        const Vec factor = broadcast(a.data + r * a.stride + i * 4);
        x = multiply_add<kDot>(factor, y[i][0], x);
        z = multiply_add<kDot>(factor, y[i][1], z);
      }
      float* to = sums + r * sums_row + c;
      store(to, load(to) + x);
      store(to + kLanes, load(to + kLanes) + z);
    }
  };
  i64 c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
    ahead.ask((2 * kLanes * kSteps * size + 63) / 64);
    step(c, kLanes, kLanes);
  }
  if (c < columns) {
    step(c, least<i64>(kLanes, columns - c), most<i64>(columns - c - kLanes, 0));
  }
}

// Of a matrix whose columns are runs of memory; others are copied.
inline void few_by_columns(const GroupedParams& p, const GroupedTask& t, char* scratch) {
  const GroupedShare share{p, t.rows, t.columns};
  const FewByColumnsScratch s{{scratch}, share};
  const Rows a = fetch(rows_from(p.rows, t.first_row), t.rows, p.depth, is_dot(p), s.rows);
  const Source m = across(matrix_of(p, t.group, t.first)); // [depth, columns]
  const i64 size = bytes_of(m.type), sums_row = round_up(t.columns, 2 * kLanes), depth = depth_of(is_dot(p), p.depth);
  const bool in_place = m.d == 1;
  Stream ahead{m.data, m.l * size, t.columns * size, in_place ? p.depth : 0};
  ahead.ask(kSumSteps * t.columns * size / 64);
  std::memset(s.sums, 0, t.rows * sums_row * 4);
  with_elements(is_dot(p), in_place ? m.type : Type::f32, [&](auto pairs, auto type) {
    const auto add = [&](i64 k, auto steps) __attribute__((always_inline)) {
      constexpr i64 kPair = decltype(pairs)::value ? 2 : 1;
      const i64 count = least<i64>(kPair * decltype(steps)::value, p.depth - kPair * k);
      Source from = m;
      from.data += kPair * k * m.l * size;
      Rows right{from.data, m.l * size};
      if (!in_place) {
        right = fetch(from, count, t.columns, is_dot(p), s.copy);
      }
      if constexpr (decltype(pairs)::value) {
        interleave_rows(right, count, t.columns, s.pairs);
        right = {s.pairs, pad_lanes(t.columns) * 4};
      }
      add_outer<decltype(steps)::value, decltype(pairs)::value, decltype(type)::value>({a.data + k * 4, a.stride}, t.rows, right, t.columns, ahead, s.sums);
    };
    i64 k = 0;
    for (; k + kSumSteps <= depth; k += kSumSteps) {
      add(k, std::integral_constant<int, kSumSteps>());
    }
    for (; k < depth; ++k) {
      add(k, std::integral_constant<int, 1>());
    }
  });
  for (i64 r = 0; r < t.rows; ++r) {
    for (i64 c = 0; c < t.columns; c += kLanes) {
      write_result(p, t.group, t.first_row + r, t.first + c, load(s.sums + r * sums_row + c), t.columns - c);
    }
  }
  multiplied_here() += 2 * t.rows * t.columns * p.depth;
}

} // namespace mmkernels::MMK_ISA
