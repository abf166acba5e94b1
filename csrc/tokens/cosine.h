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

// The rows of a frame are in the caches when the next frame's are compared with them.
template <Type kType> void frame_differences(const FrameTask& t, float* squares) {
  const i64 frame_bytes = t.positions * t.x.row_bytes, channels = t.x.channels;
  const auto row_at = [&](i64 frame, i64 p) { return t.x.data + frame * frame_bytes + p * t.x.row_bytes; };
  for (i64 p = t.first; p < t.last; ++p) {
    const char* row = row_at(t.first_frame - 1, p);
    squares[p - t.first] = products_of<kType, kType>(row, row, channels).square;
  }
  for (i64 frame = t.first_frame; frame < t.last_frame; ++frame) {
    for (i64 p = t.first; p < t.last; ++p) {
      const char *before = row_at(frame - 1, p), *row = row_at(frame, p);
      const Products found = products_of<kType, kType>(before, row, channels);
      float& square = squares[p - t.first];
      t.to[frame * t.positions + p] = difference_of<kType>(before, row, channels, found.dot, square, found.square);
      square = found.square;
    }
  }
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
  with_type(x.type, [&](auto type) {
    constexpr Type kType = decltype(type)::value;
    const char* along = (const char*)direction;
    for (i64 i = first; i < last; ++i) {
      const char* row = x.data + i * x.row_bytes;
      Products found = products_of<Type::f32, kType>(along, row, x.channels);
      if (!is_near_one(found.square)) {
        const float scale = scale_of_row(row, kType, x.channels);
        found = products_of<Type::f32, kType>(along, row, x.channels, 1.0f, scale);
      }
      to[i] = found.square == 0.0f ? found.dot : found.dot / __builtin_sqrtf(found.square);
    }
  });
}

} // namespace mmkernels::MMK_ISA
