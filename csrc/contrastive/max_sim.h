// max_sim: for each token of a query its best token of a document, and the sums of their products.
#pragma once

#include "../common/product.h"
#include "max_sim_params.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kBestRows = 48;         // of a tile of products: with a panel's step in the first-level cache
constexpr i64 kAskRows = 24;          // of a document that are asked of memory at a time
constexpr i64 kBestBytes = 1 << 18;   // of a document's tokens that all panels of a task meet before the next ones
constexpr i64 kPanelsBytes = 1 << 19; // of a task's panels: with the tokens in a core's cache
constexpr std::uint32_t kInfBits = 0x7f800000, kNoSign = 0x7fffffff;

MMK_INLINE bool is_dot(const MaxSimParams& p) {
  return uses_dot(p.query.type);
}
MMK_INLINE Source tokens_of(const Features& x, i64 sequence, i64 token) {
  return {x.data + (sequence * x.row + token * x.query) * bytes_of(x.type), x.type, x.query, x.column, nullptr};
}
MMK_INLINE i64 packed_floats(const MaxSimParams& p) {
  return depth_of(is_dot(p), p.dim) * kPanel;
}
inline i64 task_panels(const MaxSimParams& p) {
  return most<i64>(1, kPanelsBytes / (packed_floats(p) * 4));
}
// Tokens of a document that all panels of a task meet before the next ones, in whole tiles: one where they are copied.
inline i64 step_rows(const MaxSimParams& p) {
  const bool in_place = usable_in_place(tokens_of(p.document, 0, 0), p.dim, is_dot(p));
  const i64 fit = in_place ? kBestBytes / row_bytes(is_dot(p), p.dim) / kBestRows * kBestRows : kBestRows;
  return least(most(fit, kBestRows), round_up(p.document_tokens, kBestRows));
}

struct BestScratch : Arena {
  BestScratch(Arena memory, const MaxSimParams& p) : Arena(memory) {
    packed = take<float>(p.task_panels * packed_floats(p));
    rows = take<char>(most<i64>(step_rows(p), kPanel) * row_bytes(is_dot(p), p.dim));
    tile = take<float>(kBestRows * kPanel);
    best = take<float>(p.task_panels * kPanel);
    index = take<std::int32_t>(p.task_panels * kPanel);
  }
  float *packed = nullptr, *tile = nullptr, *best = nullptr;
  char* rows = nullptr;
  std::int32_t* index = nullptr;
};

// The tokens of a task's documents in the order of memory, asked of it a tile before they are multiplied.
struct TokensAhead {
  const MaxSimParams& p;
  i64 document, end; // the next one, and where the task's documents end
  Ahead now{};

  MMK_INLINE void ask(i64 count) {
    while (count > 0) {
      for (; now.rows == 0 && document < end; ++document) {
        now = Ahead::of(tokens_of(p.document, document, 0), p.document_length[document], p.dim);
      }
      const i64 some = least(count, now.rows);
      if (some == 0) {
        return;
      }
      now.ask(some);
      count -= some;
    }
  }
};

// Copies a panel's tokens, transposed.
inline void pack_tokens(const MaxSimParams& p, const TokenPanel& panel, char* copy, float* to) {
  const i64 stride = row_bytes(is_dot(p), p.dim);
  Rows all{copy, stride};
  for (i64 n = panel.first; n < panel.last; ++n) {
    const TokenRun& run = p.runs[n];
    char* at = copy + run.lane * stride;
    const Rows rows = fetch(tokens_of(p.query, run.query, run.first), run.count, p.dim, is_dot(p), at);
    if (panel.last - panel.first == 1) {
      all = rows;
      break;
    }
    for (i64 r = 0; rows.data != at && r < run.count; ++r) {
      std::memcpy(at + r * stride, rows.data + r * rows.stride, p.dim * (is_dot(p) ? 2 : 4));
    }
  }
  transpose_rows(all, panel.lanes, depth_of(is_dot(p), p.dim), pad_lanes(panel.lanes), to);
}

// The first token of a tile whose product is NaN becomes the best of its lane, unless an earlier tile had one.
MMK_OUTLINE void keep_first_nan(const float* tile, i64 rows, i64 first, i64 lanes, float* best, std::int32_t* index) {
  for (i64 lane = 0; lane < lanes; ++lane) {
    for (i64 r = 0; r < rows && best[lane] == best[lane]; ++r) {
      if (tile[r * kPanel + lane] != tile[r * kPanel + lane]) {
        best[lane] = tile[r * kPanel + lane];
        index[lane] = (std::int32_t)(first + r);
      }
    }
  }
}

// Compares kCols vectors of a tile, whose rows are a document's tokens from `first` on, with the best so far: of equal
// ones the first stays.
template <int kCols, bool kIndex>
MMK_INLINE void keep_best_columns(const float* tile, i64 rows, i64 first, float* best, std::int32_t* index) {
  Vec top[kCols];
  IVec where[kCols];
  UVec magnitude[kCols] = {}; // bits without the sign: NaN's are above infinity's
#pragma GCC unroll 4
  for (int n = 0; n < kCols; ++n) {
    top[n] = load(best + n * kLanes);
    where[n] = (IVec)load(index + n * kLanes);
  }
  IVec row = (std::int32_t)first - IVec{};
  for (i64 r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kCols; ++n) {
      const Vec x = load(tile + r * kPanel + n * kLanes);
      if (kIndex) {
        where[n] = x > top[n] ? row : where[n];
      }
      top[n] = max_skip_nan(top[n], x);
      const UVec bits = (UVec)x & kNoSign;
      magnitude[n] = bits > magnitude[n] ? bits : magnitude[n];
    }
    row += 1;
  }
  std::uint32_t nan = 0;
#pragma GCC unroll 4
  for (int n = 0; n < kCols; ++n) {
    store(best + n * kLanes, top[n]);
    store(index + n * kLanes, (Vec)where[n]);
    nan |= bits_of((IVec)(magnitude[n] > kInfBits));
  }
  if (nan != 0) {
    keep_first_nan(tile, rows, first, kCols * kLanes, best, index);
  }
}
template <bool kIndex>
inline void keep_best(const float* tile, i64 rows, i64 first, i64 vectors, float* best, std::int32_t* index) {
  i64 n = 0;
  const auto run = [&](auto columns) {
    constexpr int kCols = decltype(columns)::value;
    for (; n + kCols <= vectors; n += kCols) {
      keep_best_columns<kCols, kIndex>(tile + n * kLanes, rows, first, best + n * kLanes, index + n * kLanes);
    }
  };
  run(std::integral_constant<int, kVectors>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

// Products [count, lanes] of a document's tokens with a panel.
inline void token_products(const MaxSimParams& p, Rows rows, i64 count, const float* panel, i64 vectors, float* tile) {
  const i64 depth = depth_of(is_dot(p), p.dim), lanes = vectors * kLanes;
  with_pairs(is_dot(p), [&](auto pairs) {
    for (i64 k = 0; k < depth; k += kChain) {
      product<pairs()>({rows.data + k * 4, rows.stride, 4}, panel + k * lanes, lanes, tile, kPanel, count, vectors,
                       least(kChain, depth - k), k > 0);
    }
  });
}

// In double, so that how a query's tokens are cut into runs hardly matters.
inline double sum_of(const float* x, i64 count) {
  double sums[4] = {}; // so that additions do not wait for each other
  i64 i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int n = 0; n < 4; ++n) {
      sums[n] += x[i + n];
    }
  }
  for (; i < count; ++i) {
    sums[0] += x[i];
  }
  return sums[0] + sums[1] + (sums[2] + sums[3]);
}

inline void write_best(const MaxSimParams& p, const TokenPanel& panel, i64 document, const float* best,
                       const std::int32_t* index) {
  const i64 documents = p.paired ? 1 : p.document.count, at = p.paired ? 0 : document;
  for (i64 n = panel.first; n < panel.last; ++n) {
    const TokenRun& run = p.runs[n];
    const double sum = sum_of(best + run.lane, run.count);
    if (run.parts != nullptr) {
      run.parts[at] = sum;
    } else {
      p.scores[run.query * documents + at] = (float)sum;
    }
    if (p.index != nullptr) {
      std::memcpy(p.index + (run.query * documents + at) * p.query_tokens + run.first, index + run.lane,
                  run.count * sizeof(std::int32_t));
    }
  }
}

// At most a tile of a document's tokens, from `first` on, meets panel n of a task.
MMK_INLINE void meet_panel(const MaxSimParams& p, const BestScratch& s, Rows rows, i64 count, i64 first, i64 n,
                           i64 vectors, TokensAhead& ahead) {
  const i64 step = n == 0 ? kAskRows : kBestRows;
  for (i64 r = 0; r < count; r += step) {
    const i64 some = least(step, count - r);
    token_products(p, {rows.data + r * rows.stride, rows.stride}, some, s.packed + n * packed_floats(p), vectors,
                   s.tile + r * kPanel);
    if (n == 0) {
      ahead.ask(some);
    }
  }
  float* best = s.best + n * kPanel;
  std::int32_t* index = s.index + n * kPanel;
  if (p.index != nullptr) {
    keep_best<true>(s.tile, count, first, vectors, best, index);
  } else {
    keep_best<false>(s.tile, count, first, vectors, best, index);
  }
}

inline void best_of_document(const MaxSimParams& p, const MaxSimTask& task, i64 document, TokensAhead& ahead,
                             const BestScratch& s) {
  const i64 length = p.document_length[document], step = step_rows(p), panels = task.last_panel - task.first_panel;
  for (i64 i = 0; i < panels * kPanel; i += kLanes) {
    store(s.best + i, set1(-kInf));
    store(s.index + i, zero());
  }
  for (i64 first = 0; first < length; first += step) {
    const i64 count = least(step, length - first);
    const Rows rows = fetch(tokens_of(p.document, document, first), count, p.dim, is_dot(p), s.rows);
    for (i64 n = 0; n < panels; ++n) {
      const i64 vectors = vectors_of_lanes(p.panels[task.first_panel + n].lanes);
      for (i64 r = 0; r < count; r += kBestRows) {
        meet_panel(p, s, {rows.data + r * rows.stride, rows.stride}, least(kBestRows, count - r), first + r, n, vectors,
                   ahead);
      }
    }
  }
  for (i64 n = 0; n < panels; ++n) {
    write_best(p, p.panels[task.first_panel + n], document, s.best + n * kPanel, s.index + n * kPanel);
  }
}

inline void best_tokens(const MaxSimParams& p, const MaxSimTask& task, char* scratch) {
  const BestScratch s{{scratch}, p};
  for (i64 n = task.first_panel; n < task.last_panel; ++n) {
    pack_tokens(p, p.panels[n], s.rows, s.packed + (n - task.first_panel) * packed_floats(p));
  }
  TokensAhead ahead{p, task.first_document, task.last_document};
  ahead.ask(kBestRows);
  for (i64 document = task.first_document; document < task.last_document; ++document) {
    if (p.document_length[document] > 0) {
      best_of_document(p, task, document, ahead, s);
    }
  }
}

} // namespace mmkernels::MMK_ISA
