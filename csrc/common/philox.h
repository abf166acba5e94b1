// Random words that are the same on every backend: Philox-4x32-10, see mmkernels/ops/attention/philox.py.
#pragma once

#include "vec.h"

namespace mmkernels::MMK_ISA {

typedef std::uint64_t Wide __attribute__((vector_size(kLanes * 8)));

// x <- low words of x * by; the high words are returned.
MMK_INLINE UVec multiply_words(UVec& x, std::uint64_t by) {
  const Wide product = __builtin_convertvector(x, Wide) * by;
  x = __builtin_convertvector(product, UVec); // keeps the low half of each
  return __builtin_convertvector(product >> 32, UVec);
}

// Replaces counters (c0, c1, c2, c3) by their four random words under the key (k0, k1).
inline void philox(UVec& c0, UVec& c1, UVec& c2, UVec& c3, std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const UVec high0 = multiply_words(c0, 0xD2511F53u), high1 = multiply_words(c2, 0xCD9E8D57u);
    const UVec low0 = c0, low1 = c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

} // namespace mmkernels::MMK_ISA
