// Rows of a tensor as operands of the tile GEMM: in the working format (float32, or bfloat16 where the CPU multiplies
// it), transposed, or interleaved in pairs.
#pragma once

#include <type_traits>

#include "float16.h"
#include "type.h"

namespace mmkernels::MMK_ISA {

// Allocates scratch memory piece by piece, aligned to cache lines; without memory (null) it only counts bytes.
struct Arena {
  char* memory;
  i64 used = 0;

  template <typename T> T* take(i64 count, i64 in_front = 0) {
    T* p = memory != nullptr ? (T*)(memory + used) + in_front : nullptr;
    used += round_up((count + in_front) * (i64)sizeof(T), 64);
    return p;
  }
};

// Bytes of a task's scratch: a struct that derives from `Arena`, whose next member is the call.
template <typename Scratch, typename Params> i64 scratch_bytes(const Params& p) {
  return Scratch{{nullptr}, p}.used;
}

MMK_INLINE constexpr int bytes_of(Type type) {
  return type == Type::f32 ? 4 : 2;
}
// Calls f with the type as a constant, so that a loop does not ask for it.
template <typename F> MMK_INLINE void with_type(Type type, const F& f) {
  if (type == Type::f32) {
    f(std::integral_constant<Type, Type::f32>());
  } else if (type == Type::bf16) {
    f(std::integral_constant<Type, Type::bf16>());
  } else {
    f(std::integral_constant<Type, Type::f16>());
  }
}
MMK_INLINE i64 pad_lanes(i64 n) {
  return round_up(n, kLanes);
}
MMK_INLINE bool uses_dot(Type type) {
  return kHasDot && type == Type::bf16;
}
// 32-bit elements along a row of `cols` in the working format.
MMK_INLINE i64 depth_of(bool is_dot, i64 cols) {
  return is_dot ? (cols + 1) / 2 : cols;
}
// Bytes of a copied row: whole vectors, so that it can be a row of the right operand too.
MMK_INLINE i64 row_bytes(bool is_dot, i64 cols) {
  return round_up(cols * (is_dot ? 2 : 4), (i64)sizeof(Vec));
}

// Loads `count` 32-bit elements at p, then zeros; stores only the first `count`.
MMK_INLINE Vec load_part(const void* p, i64 count) {
  if (count >= kLanes) {
    return load(p);
  }
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  Vec v{};
  std::memcpy(&v, p, count * 4);
  return v;
#endif
}
MMK_INLINE void store_part(void* p, Vec v, i64 count) {
  if (count >= kLanes) {
    store(p, v);
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  std::memcpy(p, &v, count * 4);
#endif
}

MMK_INLINE float load_one(const char* p, Type type) {
  if (type == Type::f32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  std::uint16_t x;
  std::memcpy(&x, p, 2);
  return type == Type::bf16 ? from_bf16(x) : from_f16(x);
}
MMK_INLINE void store_one(char* p, Type type, float x) {
  if (type == Type::f32) {
    std::memcpy(p, &x, 4);
    return;
  }
  const std::uint16_t y = type == Type::bf16 ? to_bf16(x) : to_f16(x);
  std::memcpy(p, &y, 2);
}
// Loads `count` elements of any type as float32, then zeros.
MMK_INLINE Vec load_as_f32(const char* p, Type type, i64 count) {
  if (type == Type::f32) {
    return load_part(p, count);
  }
  std::uint16_t few[kLanes] = {};
  const std::uint16_t* from = (const std::uint16_t*)p;
  if (count < kLanes) {
    std::memcpy(few, p, count * 2);
    from = few;
  }
  return type == Type::bf16 ? load_bf16(from) : load_f16(from);
}
MMK_INLINE void store_from_f32(char* p, Type type, Vec v, i64 count) {
  if (type == Type::f32) {
    store_part(p, v, count);
    return;
  }
  std::uint16_t few[kLanes];
  std::uint16_t* to = count < kLanes ? few : (std::uint16_t*)p;
  type == Type::bf16 ? store_bf16(to, v) : store_f16(to, v);
  if (count < kLanes) {
    std::memcpy(p, few, count * 2);
  }
}

// Stores kLanes elements in the working format.
MMK_INLINE void store_working(char* p, bool is_dot, Vec v) {
  if (is_dot) {
    store_bf16((std::uint16_t*)p, v);
  } else {
    store(p, v);
  }
}

// Rows of a matrix.
struct Source {
  const char* data;
  Type type;
  i64 l, d;                  // strides in elements
  const std::int32_t* index; // which rows; null: 0, 1, 2, ...
};

struct Rows {
  const char* data;
  i64 stride; // bytes
};

MMK_INLINE bool usable_in_place(const Source& x, i64 cols, bool is_dot) {
  return x.index == nullptr && x.d == 1 && (x.type == Type::f32 || (is_dot && cols % 2 == 0));
}

// Rows that are read soon. They are asked of memory a few at a time while others are multiplied: without that a
// core waits for each tile and then computes, one after the other; and rows that a product reads side by side are not
// one stream to the hardware, which then fetches a third as fast.
struct Ahead {
  const char* data = nullptr;
  i64 stride = 0, bytes = 0, rows = 0;

  // Of a tensor's rows; none where a row is not one run of memory.
  MMK_INLINE static Ahead of(const Source& x, i64 rows, i64 cols) {
    const i64 size = bytes_of(x.type);
    return x.index == nullptr && x.d == 1 ? Ahead{x.data, x.l * size, cols * size, rows} : Ahead{};
  }
  MMK_INLINE void ask(i64 count) {
    for (const i64 n = least(count, rows), end = rows - n; rows > end; --rows, data += stride) {
      for (i64 byte = 0; byte < bytes; byte += 64) {
        __builtin_prefetch(data + byte, 0, 2);
      }
    }
  }
};

// `fetch` of rows whose elements of one column are neighbours, such as a transposed view's.
inline void fetch_transposed(const Source& x, i64 count, i64 cols, bool is_dot, char* to) {
  const i64 size = bytes_of(x.type), stride = row_bytes(is_dot, cols);
  for (i64 r = 0; r < count; r += kLanes) {
    for (i64 c = 0; c < stride / (is_dot ? 2 : 4); c += kLanes) { // to the end of the padding, which is zeros
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = c + i < cols ? load_as_f32(x.data + (r + (c + i) * x.d) * size, x.type, count - r) : zero();
      }
      transpose(block);
      for (i64 i = 0; i < least<i64>(kLanes, count - r); ++i) {
        store_working(to + (r + i) * stride + c * (is_dot ? 2 : 4), is_dot, block[i]);
      }
    }
  }
}

// `count` rows of `cols` in the working format: in place where possible, else copied to `to` and padded with zeros.
// whole: rows of the right operand, which are read in whole vectors.
inline Rows fetch(const Source& x, i64 count, i64 cols, bool is_dot, char* to, bool whole = false) {
  const i64 size = bytes_of(x.type), stride = row_bytes(is_dot, cols);
  if (usable_in_place(x, cols, is_dot) && (!whole || cols * (is_dot ? 2 : 4) == stride)) {
    return {x.data, x.l * size};
  }
  if (x.index == nullptr && x.l == 1 && x.d != 1) {
    fetch_transposed(x, count, cols, is_dot, to);
    return {to, stride};
  }
  for (i64 r = 0; r < count; ++r) {
    const char* from = x.data + (x.index != nullptr ? x.index[r] : r) * x.l * size;
    char* row = to + r * stride;
    if (x.d == 1 && is_dot) {
      std::memcpy(row, from, cols * 2);
      std::memset(row + cols * 2, 0, stride - cols * 2);
    } else if (x.d == 1) {
      for (i64 c = 0; c < cols; c += kLanes) {
        store(row + c * 4, load_as_f32(from + c * size, x.type, cols - c));
      }
    } else {
      std::memset(row, 0, stride);
      for (i64 c = 0; c < cols; ++c) {
        const char* element = from + c * x.d * size;
        if (is_dot) {
          std::memcpy(row + c * 2, element, 2);
        } else {
          store_one(row + c * 4, Type::f32, load_one(element, x.type));
        }
      }
    }
  }
  return {to, stride};
}

// Transposes [count, depth] 32-bit elements to [depth, lanes]; lanes from `count` on are 0. `lanes` is a multiple of
// kLanes.
MMK_INLINE void transpose_rows(Rows rows, i64 count, i64 depth, i64 lanes, float* to) {
  for (i64 q = 0; q < lanes; q += kLanes) {
    for (i64 k = 0; k < depth; k += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = q + i < count ? load_part(rows.data + (q + i) * rows.stride + k * 4, depth - k) : zero();
      }
      transpose(block);
      for (i64 i = 0; i < least<i64>(kLanes, depth - k); ++i) {
        store(to + (k + i) * lanes + q, block[i]);
      }
    }
  }
}

#if defined(__AVX512BF16__)
// Pairs of the same column of two vectors of 32 bfloat16: of the first 16 columns, and of the others.
struct Interleaved {
  __m512i front, back;
};
MMK_INLINE Interleaved interleave(__m512i low, __m512i high) {
  const __m512i front = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i back = _mm512_or_si512(front, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(low, front, high), _mm512_permutex2var_epi16(low, back, high)};
}
#endif

// Interleaves rows of bfloat16 [count, cols] to [(count + 1) / 2, cols padded]: pairs of the same column of two rows
// that follow each other. Only for instruction sets that multiply such pairs.
inline void interleave_rows(Rows rows, i64 count, i64 cols, char* to) {
#if defined(__AVX512BF16__)
  for (i64 r = 0; r < count; r += 2) {
    const char* a = rows.data + r * rows.stride;
    const char* b = r + 1 < count ? a + rows.stride : nullptr;
    std::uint32_t* out = (std::uint32_t*)(to + r / 2 * pad_lanes(cols) * 4);
    i64 c = 0;
    const auto some = [&](auto vectors) { // of each row, one row after the other: memory is read in order
      constexpr int kCount = decltype(vectors)::value;
      for (; b != nullptr && c + kCount * 2 * kLanes <= cols; c += kCount * 2 * kLanes) {
        __m512i low[kCount];
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          low[i] = _mm512_loadu_si512(a + (c + i * 2 * kLanes) * 2);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          const __m512i high = _mm512_loadu_si512(b + (c + i * 2 * kLanes) * 2);
          const Interleaved pairs = interleave(low[i], high);
          _mm512_storeu_si512(out + c + 2 * i * kLanes, pairs.front);
          _mm512_storeu_si512(out + c + (2 * i + 1) * kLanes, pairs.back);
        }
      }
    };
    some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 1>());
    for (; c < cols; c += kLanes) {
      const __mmask16 left = (__mmask16)(cols - c >= kLanes ? 0xffff : (1u << (cols - c)) - 1);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(left, a + c * 2));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(b != nullptr ? left : 0, b + c * 2));
      _mm512_storeu_si512(out + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
#else
  (void)rows, (void)count, (void)cols, (void)to;
#endif
}

// Whether all of [count, cols] is finite.
inline bool all_finite(Rows rows, i64 count, i64 cols, bool is_dot) {
  Vec bad = zero(); // 0 * x is NaN exactly where x is not finite
  for (i64 r = 0; r < count; ++r) {
    const char* row = rows.data + r * rows.stride;
    for (i64 c = 0; c < cols; c += kLanes) {
      bad += zero() * (is_dot ? load_as_f32(row + c * 2, Type::bf16, cols - c) : load_part(row + c * 4, cols - c));
    }
  }
  return !(sum(bad) != 0.0f);
}

// A copy with 0 in place of each element that is not finite.
inline Rows zero_non_finite(Rows rows, i64 count, i64 cols, bool is_dot, char* to) {
  const i64 stride = row_bytes(is_dot, cols);
  const Type type = is_dot ? Type::bf16 : Type::f32;
  for (i64 r = 0; r < count; ++r) {
    for (i64 c = 0; c < cols; c += kLanes) {
      const Vec x = load_as_f32(rows.data + r * rows.stride + c * bytes_of(type), type, cols - c);
      const Vec y = x - x == zero() ? x : zero();
      store_from_f32(to + r * stride + c * bytes_of(type), type, y, kLanes);
    }
  }
  return {to, stride};
}

// Calls f(r, c, x) for each element that is not finite.
template <typename F> void each_non_finite(Rows rows, i64 count, i64 cols, bool is_dot, const F& f) {
  const Type type = is_dot ? Type::bf16 : Type::f32;
  for (i64 r = 0; r < count; ++r) {
    for (i64 c = 0; c < cols; ++c) {
      const float x = load_one(rows.data + r * rows.stride + c * bytes_of(type), type);
      if (!(x - x == 0.0f)) {
        f(r, c, x);
      }
    }
  }
}

} // namespace mmkernels::MMK_ISA
