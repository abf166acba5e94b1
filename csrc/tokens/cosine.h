// Cosines of rows, whatever the size of their values: lengths, frame differences, products with one direction.
#pragma once

#include "cosine_params.h"
#include "loops.h"

namespace mmkernels::MMK_ISA {

// Squares of a row's length between these need no scaling: their product is a float too.
constexpr float kLeastSquare = 1e-18f, kMostSquare = 1e18f;

MMK_INLINE bool is_near_one(float square) {
  return square > kLeastSquare && square < kMostSquare;
}

// The power of two that brings x, which is not negative, near 1: squares of rows far from it would be 0 or infinite.
MMK_INLINE float scale_near_one(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (254 - most(1, least(253, bits >> 23))) << 23;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The power of two that brings a row near 1; NaN if it is not finite.
inline float scale_of_row(const char* row, Type type, i64 channels) {
  Vec top = zero(), bad = zero(); // 0 * x is NaN exactly where x is not finite
  for (i64 c = 0; c < channels; c += kLanes) {
    const Vec x = load_as_f32(row + c * bytes_of(type), type, channels - c);
    top = max_skip_nan(top, (Vec)((IVec)x & 0x7fffffff));
    bad += zero() * x;
  }
  return scale_near_one(largest(top)) + sum(bad);
}

struct Products {
  float dot, square;
};

// a . b and b . b of rows times powers of two. Both are added in the same order, so that they are equal where a and b
// are.
template <Type kA, Type kB>
MMK_INLINE Products products_of(const char* a, const char* b, i64 channels, float scale_a = 1.0f,
                                float scale_b = 1.0f) {
  constexpr int kChains = 4; // so that additions do not wait for each other
  Vec dot[kChains] = {}, square[kChains] = {};
  const auto add = [&](i64 c, i64 count, int chain) __attribute__((always_inline)) {
    const Vec x = load_as_f32(a + c * bytes_of(kA), kA, count) * scale_a;
    const Vec y = load_as_f32(b + c * bytes_of(kB), kB, count) * scale_b;
    dot[chain] = fma(x, y, dot[chain]);
    square[chain] = fma(y, y, square[chain]);
  };
  i64 c = 0;
  for (; c + kChains * kLanes <= channels; c += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      add(c + chain * kLanes, kLanes, chain);
    }
  }
  for (; c < channels; c += kLanes) {
    add(c, channels - c, 0);
  }
  return {sum((dot[0] + dot[1]) + (dot[2] + dot[3])), sum((square[0] + square[1]) + (square[2] + square[3]))};
}

// Products of rows with themselves, and with the row before each (kChained; `a` before the first), or with `a`. All are
// added in the same order, so that they are equal where the rows are. Rows are loaded once for both; 2 kRows chains of
// additions run at once.
template <Type kA, Type kB, bool kChained, int kRows>
MMK_INLINE void products_of_rows(const char* a, const char* const (&rows)[kRows], i64 channels, Products (&to)[kRows]) {
  Vec dot[kRows] = {}, square[kRows] = {};
  each_vector(channels, [&](i64 c, i64 count) __attribute__((always_inline)) {
    Vec other = load_as_f32(a + c * bytes_of(kA), kA, count);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load_as_f32(rows[r] + c * bytes_of(kB), kB, count);
      dot[r] = fma(other, x, dot[r]);
      square[r] = fma(x, x, square[r]);
      other = kChained ? x : other;
    }
  });
  for (int r = 0; r < kRows; ++r) {
    to[r] = {sum(dot[r]), sum(square[r])};
  }
}

// Calls f(first, rows at once) for rows [first, last): four at once, then two, then one.
template <typename F> MMK_INLINE void each_rows(i64 first, i64 last, const F& f) {
  const auto run = [&](auto rows) {
    for (; first + rows <= last; first += rows) {
      f(first, rows);
    }
  };
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

// A row times `scale` times `inverse` has length 1; a row of zeros stays, one that is not finite is NaN.
struct RowScale {
  float scale, inverse;
};

template <Type kType> MMK_INLINE RowScale row_scale(const char* row, i64 channels) {
  float scale = 1.0f, square = products_of<kType, kType>(row, row, channels).square;
  if (!is_near_one(square)) {
    scale = scale_of_row(row, kType, channels);
    square = products_of<kType, kType>(row, row, channels, scale, scale).square;
  }
  return {scale, square > 0.0f ? 1.0f / __builtin_sqrtf(square) : 1.0f};
}

inline i64 frame_scratch(const FrameTask& t) {
  return (t.last - t.first) * (i64)sizeof(float);
}

// Of a row and the one before it, whose products are known.
template <Type kType>
MMK_INLINE float difference_of(const char* before, const char* row, i64 channels, float dot, float square_before,
                               float square) {
  if (!is_near_one(square) || !is_near_one(square_before)) {
    const float scale_before = scale_of_row(before, kType, channels), scale = scale_of_row(row, kType, channels);
    const Products both = products_of<kType, kType>(before, row, channels, scale_before, scale);
    dot = both.dot;
    square = both.square;
    square_before = products_of<kType, kType>(before, before, channels, scale_before, scale_before).square;
  }
  // One square root of both: of equal rows it is their product without rounding.
  const float product = square * square_before;
  return 1.0f - (product == 0.0f ? 0.0f : dot / __builtin_sqrtf(product));
}

// Frames [frame, frame + kFrames). squares: of the frame before them, then of the last one.
template <Type kType, int kFrames> void difference_frames(const FrameTask& t, i64 frame, float* squares) {
  const i64 frame_bytes = t.positions * t.x.row_bytes, channels = t.x.channels;
  for (i64 p = t.first; p < t.last; ++p) {
    const char *before = t.x.data + (frame - 1) * frame_bytes + p * t.x.row_bytes, *rows[kFrames];
    for (int f = 0; f < kFrames; ++f) {
      rows[f] = before + (f + 1) * frame_bytes;
    }
    Products found[kFrames];
    products_of_rows<kType, kType, true>(before, rows, channels, found);
    float& square = squares[p - t.first];
    for (int f = 0; f < kFrames; ++f) {
      t.to[(frame + f) * t.positions + p] =
          difference_of<kType>(before, rows[f], channels, found[f].dot, square, found[f].square);
      before = rows[f];
      square = found[f].square;
    }
  }
}

// The rows before some frames, which are read once more, are still in the caches.
template <Type kType> void frame_differences(const FrameTask& t, float* squares) {
  for (i64 p = t.first; p < t.last; ++p) {
    const char* rows[] = {t.x.data + ((t.first_frame - 1) * t.positions + p) * t.x.row_bytes};
    Products found[1];
    products_of_rows<kType, kType, true>(rows[0], rows, t.x.channels, found);
    squares[p - t.first] = found[0].square;
  }
  each_rows(t.first_frame, t.last_frame,
            [&](i64 frame, auto frames) { difference_frames<kType, decltype(frames)::value>(t, frame, squares); });
}

inline void frame_difference(const FrameTask& t, char* scratch) {
  with_type(t.x.type, [&](auto type) { frame_differences<decltype(type)::value>(t, (float*)scratch); });
}

inline void add_directions(const TokenMatrix& x, i64 first, i64 last, float* to) {
  with_type(x.type, [&](auto type) {
    constexpr Type kType = decltype(type)::value;
    for (i64 i = first; i < last; ++i) {
      const char* row = x.data + i * x.row_bytes;
      const RowScale s = row_scale<kType>(row, x.channels);
      each_vector(x.channels, [&](i64 c, i64 count) {
        const Vec v = load_as_f32(row + c * bytes_of(kType), kType, count) * s.scale;
        store_part(to + c, fma(v, set1(s.inverse), load_part(to + c, count)), count);
      });
    }
  });
}

inline void project(const TokenMatrix& x, i64 first, i64 last, const float* direction, float* to) {
  const char* along = (const char*)direction;
  with_type(x.type, [&](auto type) {
    constexpr Type kType = decltype(type)::value;
    each_rows(first, last, [&](i64 row, auto count) {
      constexpr int kRows = decltype(count)::value;
      const char* rows[kRows];
      for (int r = 0; r < kRows; ++r) {
        rows[r] = x.data + (row + r) * x.row_bytes;
      }
      Products found[kRows];
      products_of_rows<Type::f32, kType, false>(along, rows, x.channels, found);
      for (int r = 0; r < kRows; ++r) {
        if (!is_near_one(found[r].square)) {
          const float scale = scale_of_row(rows[r], kType, x.channels);
          found[r] = products_of<Type::f32, kType>(along, rows[r], x.channels, 1.0f, scale);
        }
        to[row + r] = found[r].square == 0.0f ? found[r].dot : found[r].dot / __builtin_sqrtf(found[r].square);
      }
    });
  });
}

} // namespace mmkernels::MMK_ISA
