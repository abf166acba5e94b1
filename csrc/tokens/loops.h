// Loops over the channels of a token.
#pragma once

#include "../common/rows.h"

namespace mmkernels::MMK_ISA {

// Calls f(c, count) for each vector of channels: with a constant count, but for the last.
template <typename F> MMK_INLINE void each_vector(i64 channels, const F& f) {
  i64 c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    f(c, kLanes);
  }
  if (c < channels) {
    f(c, channels - c);
  }
}

// Calls f(image, row) for rows [first, last) of the output. images: `count` of them, in the order of their first `row`.
template <typename Image, typename F>
MMK_INLINE void each_row_of_images(const Image* images, i64 count, i64 first, i64 last, const F& f) {
  i64 i = 0, beyond = count; // the image that holds the first row, by bisection
  while (beyond - i > 1) {
    const i64 middle = (i + beyond) / 2;
    (images[middle].row <= first ? i : beyond) = middle;
  }
  for (i64 row = first; row < last; ++row) {
    while (i + 1 < count && images[i + 1].row <= row) {
      ++i;
    }
    f(images[i], row);
  }
}

} // namespace mmkernels::MMK_ISA
