// Vectors of 32-bit lanes for the instruction set that this translation unit is compiled for, and operations on them.
// Each instruction set has a namespace, MMK_ISA, so that the linker can't take an inline function from the wrong
// object. For the same reason nothing here uses std.
//
// The compiler's flags decide: AVX-512 (F, BW, DQ, VL), AVX2 with FMA and F16C, or 16-byte vectors in GCC's notation,
// which compilers translate to what the CPU has (SSE2, NEON, ...).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define MMK_INLINE inline __attribute__((always_inline))
// Compiled on its own: inside of a large caller, GCC specialises loops for common strides and types less.
#define MMK_OUTLINE inline __attribute__((noinline))

namespace mmkernels::MMK_ISA {

using i64 = std::int64_t;

template <typename T> MMK_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T> MMK_INLINE T most(T a, T b) {
  return a > b ? a : b;
}
MMK_INLINE i64 round_up(i64 x, i64 to) {
  return (x + to - 1) / to * to;
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectors = 4; // of a panel: its widest tile is 6 x 4 vectors, 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kVectors = 2; // 6 x 2 vectors, 12 of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kVectors = 4; // 32 registers
#else
constexpr int kLanes = 4;
constexpr int kVectors = 2;
#endif
constexpr int kPanel = kLanes * kVectors; // rows of a panel
#if defined(__AVX512BF16__)
constexpr bool kHasDot = true; // an instruction that adds two products of bfloat16 pairs to each lane in float32
#else
constexpr bool kHasDot = false;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t UVec __attribute__((vector_size(kLanes * 4)));

MMK_INLINE Vec load(const void* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MMK_INLINE void store(void* p, Vec v) {
  std::memcpy(p, &v, sizeof v);
}
MMK_INLINE Vec set1(float x) {
  return x - Vec{};
}
// The 32 bits at p in every lane.
MMK_INLINE Vec broadcast(const void* p) {
  float x;
  std::memcpy(&x, p, sizeof x);
  return set1(x);
}
MMK_INLINE Vec zero() {
  return Vec{};
}
MMK_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// fma that is rounded once on every CPU.
MMK_INLINE Vec fma_exact(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) || defined(__AVX2__)
  return fma(a, b, c);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) {
#if defined(__aarch64__)
    v[i] = __builtin_fmaf(a[i], b[i], c[i]);
#else
    v[i] = (float)((double)a[i] * (double)b[i] + (double)c[i]);
#endif
  }
  return v;
#endif
}
// Stops the compiler from assuming anything about v.
MMK_INLINE void keep(Vec& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}
// acc + a0 * b0 + a1 * b1, where each lane of a and b holds two bfloat16.
MMK_INLINE Vec dot(Vec a, Vec b, Vec acc) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  (void)a, (void)b;
  return acc;
#endif
}
// The larger of both; `bound` where `data` is NaN.
MMK_INLINE Vec max_skip_nan(Vec bound, Vec data) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)data, (__m512)bound);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)data, (__m256)bound);
#else
  return data > bound ? data : bound;
#endif
}
// Selects lanes by the low bits of `bits`: a where the bit is 1, else b.
MMK_INLINE Vec choose(std::uint32_t bits, Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_mask_blend_ps((__mmask16)bits, (__m512)b, (__m512)a);
#else
  IVec lane;
  for (int i = 0; i < kLanes; ++i) {
    lane[i] = 1 << i;
  }
  const IVec has = ((std::int32_t)bits - IVec{}) & lane;
  return has != 0 ? a : b;
#endif
}
// A comparison's result as low bits.
MMK_INLINE std::uint32_t bits_of(IVec v) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX2__)
  return (std::uint32_t)_mm256_movemask_ps((__m256)v);
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) {
    bits |= (v[i] != 0 ? 1u : 0u) << i;
  }
  return bits;
#endif
}
MMK_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) {
    total += v[i];
  }
  return total;
#endif
}
MMK_INLINE float largest(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) {
    top = v[i] > top ? v[i] : top;
  }
  return top;
}

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// Rounds to the nearest whole number, ties to even. NaN and infinities stay; the plain code rounds only below 2^22.
MMK_INLINE Vec round_to_whole(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec shift = set1(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  volatile Vec rounded = x + shift;    // volatile: the compiler must not simplify it
  const Vec whole = rounded - shift;
  return x < 4194304.0f && x > -4194304.0f ? whole : x;
#endif
}

// 2^f for |f| <= 1/2, by the polynomial of degree 5 with the least relative error, below 1.6e-7.
MMK_INLINE Vec exp2_of_fraction(Vec f) {
  constexpr float c0 = 1.0f, c1 = 6.931469776e-1f, c2 = 2.402224208e-1f, c3 = 5.550733747e-2f, c4 = 9.671512910e-3f,
                  c5 = 1.326472689e-3f;
  Vec p = fma(set1(c5), f, set1(c4));
  p = fma(p, f, set1(c3));
  p = fma(p, f, set1(c2));
  p = fma(p, f, set1(c1));
  return fma(p, f, set1(c0));
}

// p * 2^n for whole n and p near 1; exactly 0 where `bound`, which is n or close to it, is below -126.
MMK_INLINE Vec times_exp2(Vec p, Vec n, Vec bound) {
#if defined(__AVX512F__)
  const __mmask16 big = _mm512_cmp_ps_mask((__m512)bound, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(big, (__m512)p, (__m512)n);
#else
  // 2^n in two factors, since n may be 128 where p is below 1. NaN must not be converted to an integer.
  const Vec safe = n != n ? zero() : (n > 256.0f ? set1(256.0f) : (n < -256.0f ? set1(-256.0f) : n));
  const IVec whole = __builtin_convertvector(safe, IVec);
  const IVec half = whole >> 1, rest = whole - half;
  const Vec scaled = p * (Vec)((half + 127) << 23) * (Vec)((rest + 127) << 23);
  return bound < -126.0f ? zero() : (bound > 1000.0f ? set1(kInf) : (bound != bound ? bound : scaled));
#endif
}

// 2^x, exactly 0 below -126 (so for -inf), NaN for NaN. Relative error below 1.6e-7.
MMK_INLINE Vec exp2(Vec x) {
  const Vec n = round_to_whole(x);
  return times_exp2(exp2_of_fraction(x - n), n, x);
}

// Transposes kLanes rows of kLanes lanes in place.
MMK_INLINE void transpose(Vec (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512i t[16], u[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) { // u[4 b + i], 128-bit lane l: column 4 l + i of rows 4 b to 4 b + 3
    const __m512i a = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd), d = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
    r[i] = (Vec)_mm512_shuffle_i32x4(a, b, 0x88);
    r[8 + i] = (Vec)_mm512_shuffle_i32x4(a, b, 0xdd);
    r[4 + i] = (Vec)_mm512_shuffle_i32x4(c, d, 0x88);
    r[12 + i] = (Vec)_mm512_shuffle_i32x4(c, d, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = (Vec)_mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = (Vec)_mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = i + 1; j < kLanes; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
  }
#endif
}

// Lane i: the sum of r[i]'s lanes.
MMK_INLINE Vec sum_each(Vec (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512 quarter[4]; // 128-bit lanes: four sums, each over a quarter of its vector
  for (int i = 0; i < 4; ++i) {
    const __m512 a = (__m512)r[4 * i], b = (__m512)r[4 * i + 1], c = (__m512)r[4 * i + 2], d = (__m512)r[4 * i + 3];
    const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    quarter[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  }
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return (Vec)fold(fold(quarter[0], quarter[1]), fold(quarter[2], quarter[3]));
#else
  transpose(r);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      r[i] += r[i + half];
    }
  }
  return r[0];
#endif
}

} // namespace mmkernels::MMK_ISA
