// Few rows a group: the matrix is streamed once, in place and in the order of memory, and is used for all rows while it
// is in the first cache. The rows, which are small, stay there.
#pragma once

#include "blocks.h"
#include "grouped_params.h"

namespace mmkernels::MMK_ISA {

// Vectors of the matrix in registers at once, of so many of its rows. One or two rows of x take no time beside reading
// the matrix, which is then one stream of memory for the processor too; more rows are loaded less often with more
// words.
constexpr int kDotVectors = kLanes == 16 ? 16 : 8;
constexpr int kDotWords = kLanes == 16 ? 4 : 2;
MMK_INLINE int dot_words(i64 rows) {
  return rows <= 2 ? 1 : kDotWords;
}
MMK_INLINE i64 dot_depth(i64 words) {
  return kDotVectors / words * kLanes;
}
constexpr i64 kNearBytes = 40 << 10;  // of packed rows and of sums, which stay in the first cache
constexpr i64 kAheadBytes = 16 << 10; // of the matrix, which the first cache holds beside them

// The lines of a matrix's rows in the order of memory, asked of it a few at a time while others are multiplied: several
// rows that are read side by side are not one stream to the hardware, which then fetches a third as fast. They are
// asked of the first cache: of the second one they came up to a fifth slower, measured on Zen 5.
struct Stream {
  const char* data;
  i64 stride, bytes, rows; // bytes from one row to the next, and of a row
  i64 at = 0;

  MMK_INLINE void ask(i64 count) {
    for (i64 i = 0; i < count && rows > 0; ++i) {
      __builtin_prefetch(data + at, 0, 3);
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
// Elements of the depth of packed rows that stay in the first cache, in steps.
MMK_INLINE i64 near_depth(i64 rows, i64 step) {
  return most<i64>((kNearBytes - rows * kLanes * kLanes * 4) / (rows * step * 4), 1) * step;
}
// Rows of the matrix that are asked ahead: few where each is read as a whole before the next ones and they are short,
// else all that a part of the depth meets before the next part.
MMK_INLINE i64 rows_ahead(i64 rows, i64 depth, i64 step, i64 row_bytes) {
  return near_depth(rows, step) >= depth && kDotWords * row_bytes <= kAheadBytes ? kDotWords : kLanes;
}
// Packs rows to [depth in steps, rows, step], padded with zeros.
inline void pack_few(Rows rows, i64 count, i64 depth, i64 step, float* to) {
  for (i64 k = 0; k < depth; k += step) {
    for (i64 r = 0; r < count; ++r) {
      for (i64 i = 0; i < step; i += kLanes, to += kLanes) {
        store(to, load_part(rows.data + r * rows.stride + (k + i) * 4, most<i64>(depth - k - i, 0)));
      }
    }
  }
}

// Adds to sums [rows, kWords, kLanes], lane by lane, the products of packed rows with kWords rows of the matrix
// at a step of the depth. Each element of the matrix is loaded once.
template <int kWords, bool kDot, Type kType>
MMK_INLINE void dot_step(const float* a, i64 rows, const char* const (&word)[kWords], i64 k, i64 depth, bool first,
                         float* sums) {
  constexpr int kSteps = kDotVectors / kWords;
  Vec y[kWords][kSteps];
#pragma GCC unroll 16
  for (int w = 0; w < kWords; ++w) {
#pragma GCC unroll 16
    for (int i = 0; i < kSteps; ++i) {
      y[w][i] = load_element<kDot, kType>(word[w], k + i * kLanes, most<i64>(depth - k - i * kLanes, 0));
    }
  }
  for (i64 r = 0; r < rows; ++r, a += kSteps * kLanes, sums += kWords * kLanes) {
    Vec x[kSteps], acc[kWords];
#pragma GCC unroll 16
    for (int w = 0; w < kWords; ++w) {
      acc[w] = first ? zero() : load(sums + w * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSteps; ++i) {
      x[i] = load(a + i * kLanes);
#pragma GCC unroll 16
      for (int w = 0; w < kWords; ++w) {
        acc[w] = multiply_add<kDot>(x[i], y[w][i], acc[w]);
      }
    }
#pragma GCC unroll 16
    for (int w = 0; w < kWords; ++w) {
      store(sums + w * kLanes, acc[w]);
    }
  }
}

// As above for at most kLanes rows of the matrix and the whole depth: [kLanes / kWords, rows, kWords, kLanes].
template <int kWords, bool kDot, Type kType>
void dot_block(const float* a, i64 rows, Rows words, i64 count, i64 depth, Stream& ahead, float* sums) {
  constexpr i64 kDepth = kDotVectors / kWords * kLanes;
  constexpr i64 kBytes = kWords * (kDot || kType == Type::f32 ? 4 : 2); // of a step's elements at one place
  const i64 near = near_depth(rows, kDepth);
  for (i64 first = 0; first < depth; first += near) {
    const i64 last = least(first + near, depth);
    for (i64 w = 0; w < count; w += kWords) {
      const char* word[kWords];
      for (int i = 0; i < kWords; ++i) { // past the last one, the last one again
        word[i] = words.data + least(w + i, count - 1) * words.stride;
      }
      i64 k = first;
      for (; k + kDepth <= last; k += kDepth) {
        ahead.ask(kDepth * kBytes / 64);
        dot_step<kWords, kDot, kType>(a + k * rows, rows, word, k, k + kDepth, k == 0, sums + w * rows * kLanes);
      }
      if (k < last) {
        ahead.ask((last - k) * kBytes / 64);
        dot_step<kWords, kDot, kType>(a + k * rows, rows, word, k, depth, k == 0, sums + w * rows * kLanes);
      }
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
// Of rows that are copied to the working format; none where they are read in place.
MMK_INLINE i64 rows_bytes(const GroupedParams& p, i64 rows) {
  return usable_in_place(rows_from(p.rows, 0), p.depth, is_dot(p)) ? 0 : rows * row_bytes(is_dot(p), p.depth);
}
struct FewByRowsScratch : Arena {
  const GroupedShare& s;
  char* rows = take<char>(rows_bytes(s.p, s.rows));
  float* packed = take<float>(s.rows * round_up(depth_of(is_dot(s.p), s.p.depth), dot_depth(1)));
  char* words = take<char>(kLanes * row_bytes(is_dot(s.p), s.p.depth));
  float* sums = take<float>(s.rows * kLanes * kLanes);
};

// Of a matrix whose rows are runs of memory; others are copied.
inline void few_by_rows(const GroupedParams& p, const GroupedTask& t, char* scratch) {
  const GroupedShare share{p, t.rows, t.columns};
  const FewByRowsScratch s{{scratch}, share};
  const int words_at_once = dot_words(t.rows);
  pack_few(fetch(rows_from(p.rows, t.first_row), t.rows, p.depth, is_dot(p), s.rows), t.rows,
           depth_of(is_dot(p), p.depth), dot_depth(words_at_once), s.packed);
  const Matrix m = matrix_of(p, t.group, t.first);
  const i64 size = bytes_of(m.type);
  // Odd rows of pairs end in the next row, which a zero does not keep out if it is not finite.
  const bool in_place = m.column == 1 && (!is_dot(p) || p.depth % 2 == 0);
  Stream ahead{m.data, m.row * size, p.depth * size, in_place ? t.columns : 0};
  if (in_place) {
    const i64 rows = rows_ahead(t.rows, depth_of(is_dot(p), p.depth), dot_depth(words_at_once), p.depth * size);
    ahead.ask(rows * ((p.depth * size + 63) / 64));
  }
  with_elements(is_dot(p), in_place ? m.type : Type::f32, [&](auto pairs, auto type) {
    for (i64 n = 0; n < t.columns; n += kLanes) {
      const i64 count = least<i64>(kLanes, t.columns - n);
      const Source from = rows_from(m, n);
      const Rows words = in_place ? Rows{from.data, from.l * size} : fetch(from, count, p.depth, is_dot(p), s.words);
      const i64 depth = depth_of(is_dot(p), p.depth);
      if (words_at_once == 1) {
        dot_block<1, pairs(), type()>(s.packed, t.rows, words, count, depth, ahead, s.sums);
      } else {
        dot_block<kDotWords, pairs(), type()>(s.packed, t.rows, words, count, depth, ahead, s.sums);
      }
      for (i64 r = 0; r < t.rows; ++r) {
        Vec sums[kLanes];
        for (i64 i = 0; i < kLanes; ++i) {
          const i64 at = (i / words_at_once * t.rows + r) * words_at_once + i % words_at_once;
          sums[i] = i < count ? load(s.sums + at * kLanes) : zero();
        }
        write_result(p, t.group, t.first_row + r, t.first + n, sum_each(sums), count);
      }
    }
  });
  multiplied_here() += 2 * t.rows * t.columns * p.depth;
}

constexpr int kSumSteps = kLanes == 16 ? 8 : 4; // rows of the transposed matrix, or pairs, that are added at once
constexpr i64 kStripBytes = 96 << 10;           // of sums, which stay in the second cache beside a strip of the matrix
MMK_INLINE i64 strip_columns(i64 rows, i64 columns) {
  return least(columns, round_up(kStripBytes / (rows * 4), kPanel));
}
// Floats from one row of sums to the next: rows at multiples of a page would meet in the same cache lines.
MMK_INLINE i64 sums_row(i64 columns) {
  return round_up(columns, 2 * kLanes) + 16;
}
struct FewByColumnsScratch : Arena {
  const GroupedShare& s;
  char* rows = take<char>(rows_bytes(s.p, s.rows));
  char* copy = take<char>(s.p.matrices.row == 1 ? 0 : 2 * kSumSteps * row_bytes(is_dot(s.p), s.columns));
  // Of all columns, or of a strip of them for any rows up to these.
  float* sums =
      take<float>(least(s.rows * sums_row(s.columns), kStripBytes / 4 + s.rows * sums_row(kPanel + 2 * kLanes)));
};

// kSteps rows of the right operand, or pairs of rows of which `count` exist, at two vectors of columns, of which `cols`
// exist.
template <int kSteps, bool kDot, Type kType>
MMK_INLINE void load_steps(Rows right, i64 count, i64 column, i64 cols, Vec (&y)[kSteps][2]) {
  const i64 first = least<i64>(cols, kLanes), second = most<i64>(cols - kLanes, 0);
  if constexpr (!kDot) {
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) {
      y[i][0] = load_element<kDot, kType>(right.data + i * right.stride, column, first);
      y[i][1] = load_element<kDot, kType>(right.data + i * right.stride, column + kLanes, second);
    }
    return;
  }
#if defined(__AVX512BF16__)
  if (cols >= 2 * kLanes && count == 2 * kSteps) {
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) {
      const char* from = right.data + 2 * i * right.stride + column * 2;
      const Interleaved pairs = interleave(_mm512_loadu_si512(from), _mm512_loadu_si512(from + right.stride));
      y[i][0] = (Vec)pairs.front, y[i][1] = (Vec)pairs.back;
    }
    return;
  }
#endif
  char pairs[kSteps * 2 * sizeof(Vec)];
  const i64 row = pad_lanes(least<i64>(cols, 2 * kLanes)) * 4;
  interleave_rows({right.data + column * 2, right.stride}, count, least<i64>(cols, 2 * kLanes), pairs);
  for (int i = 0; i < kSteps; ++i) {
    y[i][0] = load(pairs + i * row);
    y[i][1] = second > 0 ? load(pairs + i * row + sizeof(Vec)) : zero();
  }
}

// sums [rows, columns] += a [rows, kSteps] right [kSteps, columns], in whole pairs of vectors.
template <int kSteps, bool kDot, Type kType>
void add_outer(Rows a, i64 rows, Rows right, i64 count, i64 columns, Stream& ahead, float* sums) {
  constexpr i64 size = kDot || kType == Type::f32 ? 4 : 2;
  const auto step = [&](i64 c, i64 cols) __attribute__((always_inline)) {
    Vec y[kSteps][2];
    load_steps<kSteps, kDot, kType>(right, count, c, cols, y);
    for (i64 r = 0; r < rows; ++r) {
      Vec x = zero(), z = zero();
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; ++i) {
        const Vec factor = broadcast(a.data + r * a.stride + i * 4);
        x = multiply_add<kDot>(factor, y[i][0], x);
        z = multiply_add<kDot>(factor, y[i][1], z);
      }
      float* to = sums + r * sums_row(columns) + c;
      store(to, load(to) + x);
      store(to + kLanes, load(to + kLanes) + z);
    }
  };
  i64 c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
    ahead.ask((2 * kLanes * kSteps * size + 63) / 64);
    step(c, 2 * kLanes);
  }
  if (c < columns) {
    step(c, columns - c);
  }
}

// Of some columns of a matrix whose columns are runs of memory; others are copied.
inline void strip_by_columns(const GroupedParams& p, const GroupedTask& t, char* scratch) {
  const GroupedShare share{p, t.rows, t.columns};
  const FewByColumnsScratch s{{scratch}, share};
  const Rows a = fetch(rows_from(p.rows, t.first_row), t.rows, p.depth, is_dot(p), s.rows);
  const Source m = across(matrix_of(p, t.group, t.first)); // [depth, columns]
  const i64 size = bytes_of(m.type), depth = depth_of(is_dot(p), p.depth);
  const bool in_place = m.d == 1;
  Stream ahead{m.data, m.l * size, t.columns * size, in_place ? p.depth : 0};
  ahead.ask(kSumSteps * t.columns * 4 / 64);
  std::memset(s.sums, 0, t.rows * sums_row(t.columns) * 4);
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
      add_outer<decltype(steps)::value, decltype(pairs)::value, decltype(type)::value>(
          {a.data + k * 4, a.stride}, t.rows, right, count, t.columns, ahead, s.sums);
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
      write_result(p, t.group, t.first_row + r, t.first + c, load(s.sums + r * sums_row(t.columns) + c), t.columns - c);
    }
  }
  multiplied_here() += 2 * t.rows * t.columns * p.depth;
}
inline void few_by_columns(const GroupedParams& p, const GroupedTask& t, char* scratch) {
  const i64 step = strip_columns(t.rows, t.columns);
  for (i64 first = 0; first < t.columns; first += step) {
    strip_by_columns(p, {t.group, t.first_row, t.rows, t.first + first, least(step, t.columns - first)}, scratch);
  }
}

} // namespace mmkernels::MMK_ISA
