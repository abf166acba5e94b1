// The gradients of max_sim: sums of the rows that were each other's best, without a product.
#pragma once

#include "max_sim.h"

namespace mmkernels::MMK_ISA {

// kCount vectors of a sum of thousands of rows. A chain adds 64 of them at most, then 64 of such sums, as rounding
// errors grow with a chain.
template <int kCount> struct Sum {
  static constexpr i64 kChain = 64;
  Vec few[kCount] = {}, many[kCount] = {}, all[kCount] = {};
  i64 rows = 0;

  MMK_INLINE void added_row() {
    if (++rows % kChain == 0) {
      fold(few, many);
      if (rows % (kChain * kChain) == 0) {
        fold(many, all);
      }
    }
  }
  MMK_INLINE static void fold(Vec* from, Vec* to) {
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) {
      to[n] += from[n];
      from[n] = zero();
    }
  }
};

// Writes columns [first, last) of a sum of weighted rows. each(add) calls add(row, weight) for each of them, in an
// order that does not depend on the columns.
template <typename F> MMK_INLINE void sum_rows(Type type, i64 first, i64 last, char* to, const F& each) {
  with_type(type, [&](auto kind) {
    constexpr Type kType = decltype(kind)::value;
    constexpr i64 kSize = bytes_of(kType);
    i64 c = first;
    const auto run = [&](auto vectors, i64 lanes) __attribute__((always_inline)) {
      constexpr int kCount = decltype(vectors)::value;
      Sum<kCount> sum;
      each([&](const char* row, float weight) __attribute__((always_inline)) {
        const Vec w = set1(weight);
#pragma GCC unroll 8
        for (int n = 0; n < kCount; ++n) {
          sum.few[n] = fma(w, load_as_f32(row + (c + n * kLanes) * kSize, kType, lanes), sum.few[n]);
        }
        sum.added_row();
      });
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) {
        store_from_f32(to + (c + n * kLanes) * kSize, kType, sum.all[n] + (sum.many[n] + sum.few[n]), lanes);
      }
      c += kCount * kLanes;
    };
    while (c + 8 * kLanes <= last) {
      run(std::integral_constant<int, 8>(), kLanes);
    }
    while (c + 4 * kLanes <= last) {
      run(std::integral_constant<int, 4>(), kLanes);
    }
    while (c + kLanes <= last) {
      run(std::integral_constant<int, 1>(), kLanes);
    }
    if (c < last) {
      run(std::integral_constant<int, 1>(), last - c);
    }
  });
}

MMK_INLINE const char* token_row(const Features& x, i64 sequence, i64 token) {
  return x.data + (sequence * x.row + token * x.query) * bytes_of(x.type);
}
// The document tokens of a pair that each of the query's tokens took.
MMK_INLINE const std::int32_t* index_of(const MaxSimParams& p, i64 query, i64 document) {
  return p.index + (p.paired ? query : query * p.document.count + document) * p.query_tokens;
}
MMK_INLINE bool is_token(const MaxSimParams& p, std::int32_t token) {
  return token >= 0 && token < p.document_tokens;
}

inline void query_gradient(const MaxSimParams& p, i64 query, i64 first, i64 last) {
  const i64 begin = p.paired ? query : 0, end = p.paired ? query + 1 : p.document.count;
  for (i64 i = first; i < last; ++i) {
    char* to = p.grad_query + (query * p.query_tokens + i) * p.dim * bytes_of(p.query.type);
    sum_rows(p.query.type, 0, p.dim, to, [&](const auto& add) __attribute__((always_inline)) {
      for (i64 document = begin; document < end && i < p.query_length[query]; ++document) {
        const float weight = p.grad[query * p.grad_row + document * p.grad_column];
        const std::int32_t token = index_of(p, query, document)[i];
        if (weight != 0.0f && is_token(p, token)) {
          add(token_row(p.document, document, token), weight);
        }
      }
    });
  }
}

// A token of a query.
struct Winner {
  std::int32_t query, token;
};
struct WinnersScratch : Arena {
  WinnersScratch(Arena memory, const MaxSimParams& p) : Arena(memory) {
    ends = take<std::int32_t>(p.document_tokens);
    winners = take<Winner>((p.paired ? 1 : p.query.count) * p.query_tokens);
  }
  std::int32_t* ends = nullptr; // by token of the document, where its winners end
  Winner* winners = nullptr;    // by token of the document, then in the order of queries and their tokens
};

// Calls f(query, token, token of the document) for each winner of a document, in order.
template <typename F> MMK_INLINE void each_winner(const MaxSimParams& p, i64 document, const F& f) {
  const i64 begin = p.paired ? document : 0, end = p.paired ? document + 1 : p.query.count;
  for (i64 query = begin; query < end; ++query) {
    const std::int32_t* index = index_of(p, query, document);
    if (p.grad[query * p.grad_row + document * p.grad_column] == 0.0f) {
      continue;
    }
    for (i64 i = 0; i < p.query_length[query]; ++i) {
      if (is_token(p, index[i])) {
        f((std::int32_t)query, (std::int32_t)i, index[i]);
      }
    }
  }
}

inline i64 document_scratch(const MaxSimParams& p) {
  return scratch_bytes<WinnersScratch>(p);
}

inline void document_gradient(const MaxSimParams& p, const DocumentTask& task, char* scratch) {
  const WinnersScratch s{{scratch}, p};
  const i64 document = task.document;
  std::memset(s.ends, 0, p.document_tokens * sizeof(std::int32_t));
  each_winner(p, document, [&](std::int32_t, std::int32_t, std::int32_t to) { ++s.ends[to]; });
  std::int32_t before = 0;
  for (i64 j = 0; j < p.document_tokens; ++j) {
    const std::int32_t count = s.ends[j];
    s.ends[j] = before;
    before += count;
  }
  each_winner(p, document, [&](std::int32_t query, std::int32_t token, std::int32_t to) {
    s.winners[s.ends[to]++] = {query, token};
  });
  const Winner* winner = s.winners;
  for (i64 j = 0; j < p.document_tokens; ++j) {
    const Winner* end = s.winners + s.ends[j];
    char* to = p.grad_document + (document * p.document_tokens + j) * p.dim * bytes_of(p.document.type);
    sum_rows(p.document.type, task.first, task.last, to, [&](const auto& add) __attribute__((always_inline)) {
      for (const Winner* w = winner; w < end; ++w) {
        add(token_row(p.query, w->query, w->token), p.grad[w->query * p.grad_row + document * p.grad_column]);
      }
    });
    winner = end;
  }
}

} // namespace mmkernels::MMK_ISA
