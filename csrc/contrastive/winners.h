// Several queries of an image: the gradients of each pair, which are those of its best query.
#pragma once

#include "strip.h"

namespace mmkernels::MMK_ISA {

// The texts of a tile that one query of one image wins.
struct Won {
  const std::int32_t *first, *last; // their numbers, ascending
  const char* weights;              // the gradient by the first text's score; others are `weights_stride` bytes apart
  i64 weights_stride;
  const float *texts, *image; // rows of texts, padded; the query's
  float *of_texts, *of_image; // where their gradients are added; null: not needed
};
constexpr int kWonVectors = kLanes == 16 ? 8 : 4; // of a query and of its gradient: they fit into registers

// Adds columns c to c + kCount * kLanes of their gradients, those of the query in registers; a single vector may pass
// the end of a row.
template <int kCount> MMK_INLINE void add_won(const ContrastiveParams& p, const Won& won, i64 c) {
  const i64 columns = columns_of(p), left = p.dim - c;
  Vec sum[kCount], image[kCount];
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) {
    sum[n] = won.of_image == nullptr ? zero() : load(won.of_image + c + n * kLanes);
    image[n] = load(won.image + c + n * kLanes);
  }
  for (const std::int32_t* r = won.first; r < won.last; ++r) {
    const Vec g = broadcast(won.weights + *r * won.weights_stride);
    const float* text = won.texts + *r * columns + c;
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) {
      sum[n] = fma(g, load(text + n * kLanes), sum[n]);
    }
    if (won.of_texts == nullptr) {
      continue;
    }
    float* to = won.of_texts + *r * p.dim + c;
    if constexpr (kCount == 1) {
      store_part(to, fma(g, image[0], load_part(to, left)), left);
      continue;
    }
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) {
      store(to + n * kLanes, fma(g, image[n], load(to + n * kLanes)));
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < kCount && won.of_image != nullptr; ++n) {
    store(won.of_image + c + n * kLanes, sum[n]);
  }
}
// Adds all columns.
inline void add_won(const ContrastiveParams& p, const Won& won) {
  i64 c = 0;
  for (; c + kWonVectors * kLanes <= p.dim; c += kWonVectors * kLanes) {
    add_won<kWonVectors>(p, won, c);
  }
  for (; c < p.dim; c += kLanes) {
    add_won<1>(p, won, c);
  }
}

// Orders the texts of a tile by the query that wins them.
struct WinnerOrder {
  std::int32_t* texts; // [rows]: their numbers, by query, ascending
  std::int32_t* ends;  // [queries]: where each query's texts end

  // winner: [rows, kPanel]; lane: of the image.
  void sort(const std::int32_t* winner, i64 rows, i64 lane, i64 queries) const {
    std::memset(ends, 0, queries * sizeof(std::int32_t));
    for (i64 r = 0; r < rows; ++r) {
      ++ends[winner[r * kPanel + lane]];
    }
    std::int32_t before = 0;
    for (i64 query = 0; query < queries; ++query) {
      const std::int32_t count = ends[query];
      ends[query] = before;
      before += count;
    }
    for (i64 r = 0; r < rows; ++r) {
      texts[ends[winner[r * kPanel + lane]]++] = (std::int32_t)r;
    }
  }
};

} // namespace mmkernels::MMK_ISA
