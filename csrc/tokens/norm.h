// Layer norm and RMS norm of one row, in float32.
#pragma once

#include "loops.h"
#include "stream.h"

// Of a lambda that is called for whole vectors and for a tail: so that the tail costs whole vectors nothing.
#define MMK_INLINED __attribute__((always_inline))

namespace mmkernels::MMK_ISA {

// The sum of f(vector's first element, lanes that count) along a row: four sums, so that additions do not wait.
template <typename F> MMK_INLINE float sum_along(i64 length, const F& f) {
  Vec total[4] = {zero(), zero(), zero(), zero()};
  i64 c = 0;
  for (; c + 4 * kLanes <= length; c += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      total[i] += f(c + i * kLanes, (i64)kLanes);
    }
  }
  for (; c < length; c += kLanes) {
    total[0] += f(c, length - c);
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}
// x where the lane counts, else 0.
MMK_INLINE Vec first_lanes(Vec x, i64 count) {
  return count >= kLanes ? x : choose((1u << count) - 1, x, zero());
}

// Copies a row to float32 and returns its sum.
inline float load_row(const char* from, Type type, i64 length, float* to) {
  float total = 0.0f;
  with_type(type, [&](auto kind) {
    constexpr Type kType = decltype(kind)::value;
    total = sum_along(length, [&](i64 c, i64 count) MMK_INLINED {
      const Vec x = load_as_f32(from + c * bytes_of(kType), kType, count);
      store_part(to + c, x, count);
      return x;
    });
  });
  return total;
}
inline void store_row(const float* from, i64 length, Type type, char* to) {
  with_type(type, [&](auto kind) {
    constexpr Type kType = decltype(kind)::value;
    each_vector(length, [&](i64 c, i64 count) MMK_INLINED {
      store_from_f32(to + c * bytes_of(kType), kType, load_part(from + c, count), count);
    });
  });
}

struct NormStatistics {
  float mean, scale;
};

// The sum of (x - mean)^2. `next`: a row of `size` bytes an element that will be read soon; it is fetched meanwhile.
inline float squares_about(const float* x, i64 length, float mean, const char* next, i64 size) {
  return sum_along(length, [&](i64 c, i64 count) MMK_INLINED {
    __builtin_prefetch(next + c * size);
    const Vec d = first_lanes(load_part(x + c, count) - set1(mean), count);
    return d * d;
  });
}
MMK_INLINE float norm_scale(float squares, i64 length, float eps) {
  return 1.0f / __builtin_sqrtf(squares / length + eps);
}

// weight, bias: float32 [length], or null. past_caches: whole vectors are stored so; `to` must be aligned to a line.
template <bool kPastCaches, Type kType>
MMK_OUTLINE void normalize_row(const float* x, i64 length, NormStatistics of, const float* weight, const float* bias,
                               char* to) {
  const Vec mean = set1(of.mean), scale = set1(of.scale);
  each_vector(length, [&](i64 c, i64 count) MMK_INLINED {
    Vec y = (load_part(x + c, count) - mean) * scale;
    if (weight != nullptr) {
      y = bias != nullptr ? fma(y, load_part(weight + c, count), load_part(bias + c, count))
                          : y * load_part(weight + c, count);
    } else if (bias != nullptr) {
      y += load_part(bias + c, count);
    }
    char* place = to + c * bytes_of(kType);
    if (kPastCaches && count == kLanes) {
      stream_from_f32(place, kType, y);
    } else {
      store_from_f32(place, kType, y, count);
    }
  });
}
inline void normalize(const float* x, i64 length, NormStatistics of, const float* weight, const float* bias, Type type,
                      char* to, bool past_caches) {
  with_type(type, [&](auto kind) {
    constexpr Type kType = decltype(kind)::value;
    past_caches ? normalize_row<true, kType>(x, length, of, weight, bias, to)
                : normalize_row<false, kType>(x, length, of, weight, bias, to);
  });
}

// grad: of the row's output, then of its input. grad_weight and grad_bias are added to, or null.
inline void normalize_backward(const float* x, float* grad, i64 length, NormStatistics of, bool centred,
                               const float* weight, float* grad_weight, float* grad_bias) {
  const Vec mean = set1(of.mean), scale = set1(of.scale);
  const auto unit = [&](i64 c, i64 count) MMK_INLINED { return (load_part(x + c, count) - mean) * scale; };
  const auto flow = [&](i64 c, i64 count) MMK_INLINED {
    const Vec g = load_part(grad + c, count);
    return weight != nullptr ? g * load_part(weight + c, count) : g;
  };
  const float along =
      sum_along(length,
                [&](i64 c, i64 count) MMK_INLINED { return first_lanes(flow(c, count) * unit(c, count), count); }) /
      length;
  const float middle =
      centred ? sum_along(length, [&](i64 c, i64 count) MMK_INLINED { return flow(c, count); }) / length : 0.0f;
  each_vector(length, [&](i64 c, i64 count) MMK_INLINED {
    const Vec g = load_part(grad + c, count), u = unit(c, count);
    if (grad_weight != nullptr) {
      store_part(grad_weight + c, fma(g, u, load_part(grad_weight + c, count)), count);
    }
    if (grad_bias != nullptr) {
      store_part(grad_bias + c, g + load_part(grad_bias + c, count), count);
    }
    store_part(grad + c, (flow(c, count) - set1(middle) - u * set1(along)) * scale, count);
  });
}

} // namespace mmkernels::MMK_ISA
