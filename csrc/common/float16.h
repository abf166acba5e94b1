// bfloat16 and float16: conversions of single numbers and of vectors.
#pragma once

#include "vec.h"

namespace mmkernels::MMK_ISA {

typedef std::uint16_t Halves __attribute__((vector_size(kLanes * 2))); // the bits of 16-bit floats

MMK_INLINE float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = (std::uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
MMK_INLINE std::uint16_t to_bf16(float x) { // to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return (std::uint16_t)((bits >> 16) | 0x40);
  }
  return (std::uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
MMK_INLINE float from_f16(std::uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#elif defined(__aarch64__)
  __fp16 h;
  std::memcpy(&h, &x, sizeof h);
  return (float)h;
#else
  const std::uint32_t sign = (std::uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
  std::uint32_t bits;
  float y;
  if (rest >= 0x7c00) { // inf, NaN
    bits = 0x7f800000u | (rest << 13);
  } else if (rest >= 0x0400) {
    bits = (rest << 13) + (112u << 23);
  } else { // subnormal: exact in float32
    y = (float)rest * 5.9604644775390625e-8f;
    std::memcpy(&bits, &y, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&y, &bits, sizeof y);
  return y;
#endif
}
MMK_INLINE std::uint16_t to_f16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 h = (__fp16)x;
  std::uint16_t y;
  std::memcpy(&y, &h, sizeof y);
  return y;
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint16_t sign = (std::uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    return sign | 0x7e00;
  }
  if (bits >= 0x477ff000u) { // rounds to 2^16 or above
    return sign | 0x7c00;
  }
  if (bits < 0x38800000u) { // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    float y;
    std::memcpy(&y, &bits, sizeof y);
    y += 0.5f;
    std::memcpy(&bits, &y, sizeof bits);
    return sign | (std::uint16_t)(bits - 0x3f000000u);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | (std::uint16_t)((bits - (112u << 23)) >> 13);
#endif
}
// Loads kLanes 16-bit floats as float32; stores them back.
MMK_INLINE Vec load_bf16(const std::uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__) // GCC 12 translates the conversion below to more than one instruction
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return (Vec)(__builtin_convertvector(x, UVec) << 16);
#endif
}
MMK_INLINE Vec load_f16(const std::uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = from_f16(p[i]);
  }
  return v;
#endif
}
MMK_INLINE void store_bf16(std::uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh y = _mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i y = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#else
  const UVec bits = (UVec)v, rounded = bits + ((bits >> 16 & 1) + 0x7fff);
  const Halves y = __builtin_convertvector((v != v ? bits | 0x400000 : rounded) >> 16, Halves);
#endif
  std::memcpy(p, &y, sizeof y);
}
MMK_INLINE void store_f16(std::uint16_t* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) {
    p[i] = to_f16(v[i]);
  }
#endif
}
// Lane i: the bfloat16 of low[i] in the low half, that of high[i] in the high half.
MMK_INLINE Vec pair_bf16(Vec low, Vec high) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); // 16 of low, then 16 of high
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, both);
#else
  (void)high;
  return low;
#endif
}

} // namespace mmkernels::MMK_ISA
