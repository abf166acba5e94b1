// Pooling on the CPU: the tokens of a result are found first, and then their channels are added some vectors at a time.
#pragma once

#include "norm.h"
#include "pool_tokens.h"
#include "stream.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kTaps = 8;        // tokens that are read side by side: more streams than the hardware follows are slow
constexpr int kPoolVectors = 4; // of channels, added at once

struct PoolScratch : Arena {
  const PoolTokens& p;
  i64 padded = round_up(p.most_taps + 1, kLanes);
  const char** source = take<const char*>(padded);
  float* weight = take<float>(padded);
  std::int32_t* token = take<std::int32_t>(padded); // its number among all that are read
  std::int32_t* local = take<std::int32_t>(padded); // backward: the number of this result among the token's taps
  float* sum = take<float>(p.channels + kLanes);
  char* line = take<char>((p.channels + kLanes) * 4);
  mutable i64 wide = 0; // taps of the result along w
};

inline i64 pool_scratch(const PoolTokens& p) {
  return scratch_bytes<PoolScratch>(p);
}

// Fills in the taps of a result of an image; returns how many there are.
inline i64 find_taps(const PoolTokens& p, const PoolImage& image, i64 result, const PoolScratch& s) {
  const i64 at[3] = {result / (image.results[1] * image.results[2]), result / image.results[2] % image.results[1],
                     result % image.results[2]};
  i64 first[3], count[3];
  const float* weights[3];
  for (int d = 0; d < 3; ++d) {
    const PoolAxis& axis = image.axis[d];
    first[d] = axis.first[at[d]];
    count[d] = axis.begin[at[d] + 1] - axis.begin[at[d]];
    weights[d] = axis.weights + axis.begin[at[d]];
  }
  s.wide = count[2];
  i64 n = 0;
  for (i64 t = 0; t < count[0]; ++t) {
    for (i64 h = 0; h < count[1]; ++h) {
      const i64 line = ((first[0] + t) * image.size[1] + first[1] + h) * image.size[2] + first[2];
      for (i64 w = 0; w < count[2]; ++w, ++n) {
        s.source[n] = image.from + (line + w) * p.stride;
        s.weight[n] = weights[0][t] * weights[1][h] * weights[2][w];
        s.token[n] = (std::int32_t)(image.token + line + w);
      }
    }
  }
  if (p.pooling == Pooling::max_backward) {
    n = 0;
    for (i64 t = first[0]; t < first[0] + count[0]; ++t) {
      for (i64 h = first[1]; h < first[1] + count[1]; ++h) {
        for (i64 w = first[2]; w < first[2] + count[2]; ++w, ++n) {
          const PoolAxis* c = image.cells;
          const i64 wide = c[2].begin[w + 1] - c[2].begin[w], high = c[1].begin[h + 1] - c[1].begin[h];
          s.local[n] =
              (std::int32_t)(((at[0] - c[0].first[t]) * high + at[1] - c[1].first[h]) * wide + at[2] - c[2].first[w]);
        }
      }
    }
  }
  return n;
}

// Calls f(first channel, vectors, channels that count) along a row: several vectors at once, then one by one.
template <typename F> MMK_INLINE void each_block(i64 channels, const F& f) {
  i64 c = 0;
  for (; c + kPoolVectors * kLanes <= channels; c += kPoolVectors * kLanes) {
    f(c, std::integral_constant<int, kPoolVectors>(), (i64)kLanes);
  }
  for (; c + kLanes <= channels; c += kLanes) {
    f(c, std::integral_constant<int, 1>(), (i64)kLanes);
  }
  if (c < channels) {
    f(c, std::integral_constant<int, 1>(), channels - c);
  }
}

// The weighted sum of n tokens.
template <Type kType> MMK_OUTLINE void weighted_sum(const PoolTokens& p, const PoolScratch& s, i64 n, char* to) {
  constexpr i64 kSize = bytes_of(kType);
  const i64 ahead = 2 * s.wide * p.stride; // what the next result of windows side by side reads
  for (i64 k = 0; k == 0 || k < n; k += kTaps) {
    const i64 taps = least(n - k, kTaps);
    const bool begins = k == 0, ends = k + kTaps >= n;
    each_block(p.channels, [&](i64 c, auto vectors, i64 count) MMK_INLINED {
      constexpr int kCount = decltype(vectors)::value;
      Vec total[kCount];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        total[i] = begins ? zero() : load_part(s.sum + c + i * kLanes, count);
      }
      for (i64 j = k; j < k + taps; ++j) {
        const Vec weight = set1(s.weight[j]);
        const char* from = s.source[j] + c * kSize;
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          if (i * kLanes * kSize % 64 == 0) {
            __builtin_prefetch(from + i * kLanes * kSize + ahead);
          }
          total[i] = fma(load_as_f32(from + i * kLanes * kSize, kType, count), weight, total[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        if (ends) {
          store_from_f32(to + (c + i * kLanes) * kSize, kType, total[i], count);
        } else {
          store_part(s.sum + c + i * kLanes, total[i], count);
        }
      }
    });
  }
}

// The largest of n tokens, NaN if one is, and which it is.
template <Type kType>
MMK_OUTLINE void largest_token(const PoolTokens& p, const PoolScratch& s, i64 n, std::int32_t* index, char* to) {
  constexpr i64 kSize = bytes_of(kType);
  each_vector(p.channels, [&](i64 c, i64 count) MMK_INLINED {
    Vec best = load_as_f32(s.source[0] + c * kSize, kType, count);
    IVec which{};
    for (i64 k = 1; k < n; ++k) {
      const Vec x = load_as_f32(s.source[k] + c * kSize, kType, count);
      const IVec takes = (x > best) | ((x != x) & (best == best));
      best = takes ? x : best;
      which = takes ? (std::int32_t)k - IVec{} : which;
    }
    store_from_f32(to + c * kSize, kType, best, count);
    store_part(index + c, (Vec)which, count);
  });
}

// Adds the gradients of those results of which this token is the largest.
template <Type kType> MMK_OUTLINE void largest_backward(const PoolTokens& p, const PoolScratch& s, i64 n, char* to) {
  constexpr i64 kSize = bytes_of(kType);
  each_vector(p.channels, [&](i64 c, i64 count) MMK_INLINED {
    Vec total = zero();
    for (i64 k = 0; k < n; ++k) {
      const IVec which = (IVec)load_part(p.index + s.token[k] * p.channels + c, count);
      const Vec grad = load_as_f32(s.source[k] + c * kSize, kType, count);
      total += which == s.local[k] ? grad : zero();
    }
    store_from_f32(to + c * kSize, kType, total, count);
  });
}

// Sets the weights of n tokens to the softmax of their scores; returns its log-sum-exp.
inline float softmax_weights(const PoolTokens& p, const PoolScratch& s, i64 n) {
  float top = -kInf, total = 0.0f;
  for (i64 k = 0; k < n; ++k) {
    s.weight[k] = p.scores[s.token[k]];
    top = s.weight[k] > top || s.weight[k] != s.weight[k] ? s.weight[k] : top;
  }
  for (i64 k = 0; k < n; k += kLanes) { // NaN where all are -inf, as PyTorch has it
    store(s.weight + k, exp2((load(s.weight + k) - set1(top)) * set1(kLog2e)));
  }
  for (i64 k = 0; k < n; ++k) {
    total += s.weight[k];
  }
  for (i64 k = 0; k < n; ++k) {
    s.weight[k] /= total;
  }
  return top + __builtin_logf(total);
}

template <Type kType> float dot_rows(const char* a, const char* b, i64 channels) {
  constexpr i64 kSize = bytes_of(kType);
  return sum_along(channels, [&](i64 c, i64 count) MMK_INLINED {
    return load_as_f32(a + c * kSize, kType, count) * load_as_f32(b + c * kSize, kType, count);
  });
}

template <Type kType> void pool_row(const PoolTokens& p, const PoolImage& image, i64 row, const PoolScratch& s) {
  constexpr i64 kSize = bytes_of(kType);
  const i64 n = find_taps(p, image, row - image.row, s);
  char* to = p.to != nullptr ? p.to + row * p.channels * kSize : s.line;
  char* line = p.past_caches ? s.line : to;
  switch (p.pooling) {
  case Pooling::linear:
    weighted_sum<kType>(p, s, n, line);
    break;
  case Pooling::max:
    largest_token<kType>(p, s, n, p.new_index + row * p.channels, line);
    break;
  case Pooling::max_backward:
    largest_backward<kType>(p, s, n, line);
    break;
  case Pooling::attention:
    p.new_lse[row] = softmax_weights(p, s, n);
    weighted_sum<kType>(p, s, n, line);
    break;
  case Pooling::attention_backward: {
    for (i64 k = 0; k < n; k += kLanes) {
      for (i64 j = k; j < k + kLanes; ++j) {
        s.weight[j] = j < n ? p.scores[row] - p.lse[s.token[j]] : 0.0f;
      }
      store(s.weight + k, exp2(load(s.weight + k) * set1(kLog2e)));
    }
    if (p.pairs != nullptr) {
      const char* x = image.x + (row - image.row) * p.x_stride;
      PoolPair* pairs = p.pairs + row * p.most_taps;
      for (i64 k = 0; k < p.most_taps; ++k) {
        pairs[k] = k < n ? PoolPair{s.weight[k], dot_rows<kType>(s.source[k], x, p.channels), s.token[k]}
                         : PoolPair{0.0f, 0.0f, -1};
      }
    }
    weighted_sum<kType>(p, s, n, line);
    break;
  }
  }
  if (line != to) {
    copy_row(to, line, p.channels * kSize, true);
  }
}

inline void pool_tokens(const PoolTokens& p, i64 first, i64 last, char* memory) {
  const PoolScratch s{{memory}, p};
  with_type(p.type, [&](auto kind) {
    each_row_of_images(p.images, p.image_count, first, last,
                       [&](const PoolImage& image, i64 row) { pool_row<decltype(kind)::value>(p, image, row, s); });
  });
  end_stream(p.past_caches);
}

} // namespace mmkernels::MMK_ISA
