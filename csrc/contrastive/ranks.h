// Ranks of retrieval_ranks: queries are lanes, the gallery is rows.
#pragma once

#include "gradient.h"

namespace mmkernels::MMK_ISA {

// Each query's score with its target, from the same products in the same order as all others, so that equal scores are
// bit-equal.
inline void target_scores(const ContrastiveParams& p, const Strip& strip, const Ranks& ranks, char* scratch) {
  const GradientScratch s{{scratch}, p};
  for (i64 i = 0; i < strip.count; ++i) {
    const i64 lane = i / kPanel * kPanel, in_panel = i % kPanel / kLanes * kLanes; // the image's vector in its panel
    const Rows item = fetch(source_of(p.text, ranks.index[i]), 1, p.dim, is_dot(p), s.texts);
    panel_dots(p, item, 1, strip.panels + lane * depth_of(p) + in_panel, kLanes, s.dots, s.other, nullptr);
    ranks.best[i] = s.dots[i % kLanes];
  }
}

inline void count_before(const ContrastiveParams& p, const Strip& strip, const Task& task, const Ranks& ranks,
                         char* scratch) {
  const GradientScratch s{{scratch}, p};
  const i64 step = block_rows(p);
  for (i64 row = task.first; row < task.last; row += step) {
    const i64 rows = least(step, task.last - row);
    const Rows items = fetch(source_of(p.text, row), rows, p.dim, is_dot(p), s.texts);
    for (i64 lane = 0; lane < strip.count; lane += kPanel) {
      const i64 lanes = least<i64>(kPanel, strip.count - lane);
      panel_dots(p, items, rows, strip.panels + lane * depth_of(p), lanes, s.dots, s.other, nullptr);
      for (int v = 0; v < vectors_of_lanes(lanes); ++v) {
        const i64 at = lane + v * kLanes;
        const Vec best = load(ranks.best + at);
        const IVec targets = (IVec)load(ranks.index + at);
        IVec count = (IVec)load(ranks.before + at);
        for (i64 r = 0; r < rows; ++r) {
          const Vec x = load(s.dots + r * kPanel + v * kLanes);
          const IVec item = (std::int32_t)(row + r) - IVec{};
          count -= (x > best) | ((x == best) & (item < targets)); // a true lane is -1
        }
        store(ranks.before + at, (Vec)count);
      }
    }
  }
}

} // namespace mmkernels::MMK_ISA
