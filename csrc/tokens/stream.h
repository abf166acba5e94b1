// Copies to memory that does not fit into the caches: non-temporal stores do not read what they overwrite.
#pragma once

#include "../common/rows.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mmkernels::MMK_ISA {

// Copies bytes; with `past_caches` by non-temporal stores. `end_stream` orders them before what other threads read.
inline void copy_row(char* to, const char* from, i64 bytes, bool past_caches) {
#if defined(__SSE2__)
  if (past_caches && bytes >= 256) {
    const i64 head = (i64)(-(std::uintptr_t)to & 63);
    std::memcpy(to, from, head);
    i64 at = head;
    for (; at + 64 <= bytes; at += 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512((__m512i*)(to + at), _mm512_loadu_si512(from + at));
#elif defined(__AVX2__)
      const __m256i low = _mm256_loadu_si256((const __m256i*)(from + at));
      const __m256i high = _mm256_loadu_si256((const __m256i*)(from + at + 32));
      _mm256_stream_si256((__m256i*)(to + at), low);
      _mm256_stream_si256((__m256i*)(to + at + 32), high);
#else
      for (int part = 0; part < 64; part += 16) {
        _mm_stream_si128((__m128i*)(to + at + part), _mm_loadu_si128((const __m128i*)(from + at + part)));
      }
#endif
    }
    std::memcpy(to + at, from + at, bytes - at);
    return;
  }
#endif
  (void)past_caches;
  std::memcpy(to, from, bytes);
}

// A vector in any type, to an address that is aligned to its size.
MMK_INLINE void stream_from_f32(char* to, Type type, Vec v) {
  alignas(64) char bytes[sizeof v];
  store_from_f32(bytes, type, v, kLanes);
#if defined(__AVX512F__)
  type == Type::f32 ? _mm512_stream_si512((__m512i*)to, (__m512i)v)
                    : _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)bytes));
#elif defined(__AVX2__)
  type == Type::f32 ? _mm256_stream_si256((__m256i*)to, (__m256i)v)
                    : _mm_stream_si128((__m128i*)to, _mm_load_si128((const __m128i*)bytes));
#else
  std::memcpy(to, bytes, kLanes * bytes_of(type)); // narrow vectors gain nothing
#endif
}

inline void end_stream(bool past_caches) {
#if defined(__SSE2__)
  if (past_caches) {
    _mm_sfence();
  }
#endif
  (void)past_caches;
}

} // namespace mmkernels::MMK_ISA
