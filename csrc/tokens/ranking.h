// The tokens with the largest scores, by counting digits of their bits: no sort, in time linear in the tokens.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace mmkernels {

// An unsigned integer that orders as the score does; 0, the least, for NaN. Zeros of both signs are equal.
template <typename Score, typename Key = std::conditional_t<sizeof(Score) == 4, std::uint32_t, std::uint64_t>>
Key key_of(Score score) {
  if (score != score) {
    return 0;
  }
  score += Score(0); // -0 + 0 is 0
  Key bits;
  std::memcpy(&bits, &score, sizeof bits);
  constexpr Key kSign = Key(1) << (8 * sizeof bits - 1);
  return bits & kSign ? ~bits : bits | kSign;
}

// Writes the numbers of the `keep` largest of `count` keys, ascending, plus `first`; of equal keys the first ones.
template <typename Key>
void choose_largest(const Key* keys, std::int64_t count, std::int64_t keep, std::int64_t first, std::int32_t* to) {
  constexpr int kDigit = 11;
  Key prefix = 0, known = 0; // the bits of the least key that is kept, as far as they are known
  std::int64_t left = keep;  // how many of the keys with this prefix are kept
  if (keep == 0) {
    return;
  }
  std::vector<std::int64_t> counts(1 << kDigit);
  for (int bits = 8 * sizeof(Key); bits > 0 && keep < count;) {
    const int width = bits < kDigit ? bits : kDigit, shift = bits - width;
    const Key digit = (Key(1) << width) - 1;
    counts.assign(counts.size(), 0);
    for (std::int64_t i = 0; i < count; ++i) {
      counts[keys[i] >> shift & digit] += (keys[i] & known) == prefix;
    }
    Key top = digit;
    for (; counts[top] < left; --top) {
      left -= counts[top];
    }
    prefix |= top << shift;
    known |= digit << shift;
    bits = counts[top] == left ? 0 : shift; // all keys with this prefix are kept
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const Key key = keys[i] & known;
    if (key > prefix || (key == prefix && left-- > 0)) {
      *to++ = static_cast<std::int32_t>(first + i);
    }
  }
}

} // namespace mmkernels
