// Ranks of retrieval_ranks: queries are lanes, the gallery is rows.
#pragma once

#include "gradient.h"

namespace mmkernels::MMK_ISA {

// Each query's score with its target, from the same products in the same order as all others, so that equal scores are
// bit-equal.
inline void target_scores(const ContrastiveParams& p, const Strip& strip, const Ranks& ranks, char* scratch) {
  const GradientScratch s{{scratch}, p};
  for (i64 first = 0; first < strip.count; first += kLanes) { // one vector of images with all of its targets
    const i64 count = least<i64>(kLanes, strip.count - first);
    if (has_few_rows(p)) {
      const Vec dots = paired_dots(p, ranks.index + first, strip.first + first, count, s.step());
      for (i64 i = 0; i < count; ++i) {
        ranks.best[first + i] = dots[i];
      }
      continue;
    }
    Source items = p.right.data != nullptr ? source_of(p.right, strip.first + first) : source_of(p.text, 0);
    items.index = p.right.data != nullptr ? nullptr : ranks.index + first;
    Panel panel = panel_of(p, strip, first / kPanel * kPanel, count);
    panel.packed = panel.packed == nullptr ? nullptr : panel.packed + first % kPanel;
    panel.first = strip.first + first;
    panel_dots(p, items, fetch_whole(p, items, count, s.texts), count, panel, s.dots, s.other, nullptr, s.step());
    for (i64 i = 0; i < count; ++i) {
      ranks.best[first + i] = s.dots[i * kPanel + i];
    }
  }
}

inline void count_before(const ContrastiveParams& p, const Strip& strip, const Task& task, const Ranks& ranks,
                         char* scratch) {
  const GradientScratch s{{scratch}, p};
  const i64 step = block_rows(p);
  for (i64 row = task.first; row < task.last; row += step) {
    const i64 rows = least(step, task.last - row);
    const Source source = source_of(p.text, row);
    const Rows items = fetch_whole(p, source, rows, s.texts);
    for (i64 lane = 0; lane < strip.count; lane += kPanel) {
      const i64 lanes = least<i64>(kPanel, strip.count - lane);
      panel_dots(p, source, items, rows, panel_of(p, strip, lane, lanes), s.dots, s.other, nullptr, s.step());
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
