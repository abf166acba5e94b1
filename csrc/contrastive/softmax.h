// The softmax sums of both directions from one pass over tiles of logits.
#pragma once

#include "dots.h"

namespace mmkernels::MMK_ISA {

// A smaller sum of a tile's row or column may have lost terms that matter: the tile's largest logit is too far above.
constexpr float kSmall = 8.271806125530277e-25f; // 2^-80

// Adds sums `more`, relative to `base`, to the running sums of kLanes texts or images. All references are whole
// numbers.
MMK_INLINE void add_sums(float* reference, float* sum, Vec base, Vec more) {
  const Vec old = load(reference), now = max_skip_nan(old, base);
  const Vec zeroed = now == -kInf ? zero() : now; // no logit above -inf yet
  store(sum, load(sum) * exp2(old - zeroed) + more * exp2(base - zeroed));
  store(reference, now);
}

// A tile of logits, and the running sums of its rows and columns. kCount: the vectors that have images.
template <int kCount> struct SoftmaxTile : LogitTile {
  Sums texts, images; // from the first ones on
  Ranks text_ranks, image_ranks;

  // A whole index near the largest logit in base 2, ignoring NaN. Hides the lanes without an image.
  float largest_logit() const {
    const Vec scale = set1(p.high);
    Vec top[kCount];
    for (int v = 0; v < kCount; ++v) {
      top[v] = set1(-kInf);
    }
    for (i64 r = 0; r < rows; ++r) {
      for (i64 i = lanes; i < kCount * kLanes; ++i) {
        dots[r * kPanel + i] = p.hidden;
      }
      for (int v = 0; v < kCount; ++v) {
        top[v] = max_skip_nan(top[v], load(dots + r * kPanel + v * kLanes) * scale);
      }
    }
    for (int v = 1; v < kCount; ++v) {
      top[0] = max_skip_nan(top[0], top[v]);
    }
    return largest(round_to_whole(top[0]));
  }

  // Adds all dots that are not hidden to their sums, for label smoothing.
  void add_all(float* of_texts) const {
    const bool hides = p.ignore && may_match();
    Vec columns[kCount] = {};
    for (i64 r = 0; r < rows; ++r) {
      Vec line = zero();
      for (int v = 0; v < kCount; ++v) {
        std::uint32_t visible = live(v);
        if (hides) {
          visible &= ~matches(r, v) | diagonal(r, v);
        }
        const Vec x = choose(visible, load(dots + r * kPanel + v * kLanes), zero());
        columns[v] += x;
        line += x;
      }
      of_texts[r] += sum(line);
    }
    for (int v = 0; v < kCount; ++v) {
      store(images.all + v * kLanes, load(images.all + v * kLanes) + columns[v]);
    }
  }

  // Adds the positives' dots to their sums, and hides the other pairs of the same label.
  void add_positives(float* text_positives) const {
    for (i64 r = 0; r < rows; ++r) {
      const std::int32_t label_of_text = label(r);
      for (int v = 0; v < kCount; ++v) {
        for (std::uint32_t bits = matches(r, v, label_of_text); bits != 0; bits &= bits - 1) {
          const i64 i = v * kLanes + __builtin_ctz(bits);
          float& x = dots[r * kPanel + i];
          if (!p.ignore || (!hard && partner + r == lane + i)) {
            text_positives[r] += x;
            images.positives[i] += x;
          } else {
            x = p.hidden;
          }
        }
      }
    }
  }

  // Adds the exponentials to both directions' sums, relative to the tile's largest logit: one exponential a pair.
  // Returns false, and adds nothing, where that is not exact.
  bool add_together(float top) const {
    const Vec base = set1(top), small = set1(kSmall);
    Vec columns[kCount] = {};
    float text_sums[kMaxRows];
    bool exact = true;
    for (i64 r = 0; r < rows; r += kLanes) {
      Vec lines[kLanes];
      for (i64 n = 0; n < kLanes; ++n) {
        lines[n] = set1(1.0f);
        if (r + n < rows) {
          const float* at = dots + (r + n) * kPanel;
          Vec line = zero();
          for (int v = 0; v < kCount; ++v) {
            const Vec e = power_of(p, load(at + v * kLanes)).over(base);
            columns[v] += e;
            line += e;
          }
          lines[n] = line;
        }
      }
      const Vec sums = sum_each(lines);
      store(text_sums + r, sums);
      exact = exact && bits_of(sums >= small) == kAllLanes;
    }
    for (int v = 0; v < kCount; ++v) {
      exact = exact && (bits_of(columns[v] >= small) & live(v)) == live(v);
    }
    if (!exact) {
      return false;
    }
    for (int v = 0; v < kCount; ++v) {
      add_sums(images.reference + v * kLanes, images.sum + v * kLanes, base, columns[v]);
    }
    if (!hard) {
      for (i64 r = 0; r < rows; r += kLanes) {
        add_sums(texts.reference + r, texts.sum + r, base, load(text_sums + r));
      }
    }
    return true;
  }

  // The same with two exponentials a pair, each relative to the largest logit of its row or column.
  void add_apart() const {
    const Vec scale = set1(p.high);
    for (int v = 0; v < kCount; ++v) {
      const float* column = dots + v * kLanes;
      Vec top = load(images.reference + v * kLanes), more = zero();
      for (i64 r = 0; r < rows; ++r) {
        top = max_skip_nan(top, round_to_whole(load(column + r * kPanel) * scale));
      }
      const Vec base = top == -kInf ? zero() : top;
      for (i64 r = 0; r < rows; ++r) {
        more += power_of(p, load(column + r * kPanel)).over(base);
      }
      add_sums(images.reference + v * kLanes, images.sum + v * kLanes, top, more);
    }
    for (i64 r = 0; !hard && r < rows; ++r) {
      const float* line = dots + r * kPanel;
      Vec top = set1(-kInf), more = zero();
      for (int v = 0; v < kCount; ++v) {
        top = max_skip_nan(top, round_to_whole(load(line + v * kLanes) * scale));
      }
      const float most_of_row = most(texts.reference[r], largest(top));
      const float base = most_of_row == -kInf ? 0.0f : most_of_row;
      for (int v = 0; v < kCount; ++v) {
        more += power_of(p, load(line + v * kLanes)).over(set1(base));
      }
      texts.sum[r] = texts.sum[r] * exp2(set1(texts.reference[r] - base))[0] + sum(more);
      texts.reference[r] = most_of_row;
    }
  }

  // Counts the negatives that rank before each row's best positive. Among equals the lower index comes first.
  void count_before() const {
    const float* best = image_ranks.best;
    for (i64 r = 0; r < rows; ++r) {
      const float best_of_text = !hard ? text_ranks.best[r] : kInf;
      const std::int32_t best_image = !hard ? text_ranks.index[r] : 0;
      // Hard texts come after the batch's.
      const std::int32_t index = (std::int32_t)((!hard ? 0 : p.text.count) + row + r);
      std::int32_t count = 0;
      for (int v = 0; v < kCount; ++v) {
        const Vec x = load(dots + r * kPanel + v * kLanes) * set1(p.sign), best_of_image = load(best + v * kLanes);
        const std::uint32_t counted = live(v) & ~matches(r, v);
        IVec lower;
        for (int n = 0; n < kLanes; ++n) {
          lower[n] = (std::int32_t)(lane + v * kLanes + n);
        }
        const std::uint32_t before_text = bits_of((x > best_of_text) | ((x == best_of_text) & (lower < best_image)));
        count += __builtin_popcount(before_text & counted);
        const IVec best_text = (IVec)load(image_ranks.index + v * kLanes);
        const std::uint32_t before_image =
            bits_of((x > best_of_image) | ((x == best_of_image) & (index < best_text))) & counted;
        const Vec one = (Vec)(1 - IVec{}), none = zero();
        const IVec more = (IVec)choose(before_image, one, none);
        store(image_ranks.before + v * kLanes, (Vec)((IVec)load(image_ranks.before + v * kLanes) + more));
      }
      if (!hard) {
        text_ranks.before[r] += count;
      }
    }
  }
};

// Scratch of one task. Members are taken in the order of their declaration.
struct SoftmaxScratch : Arena {
  const ContrastiveParams& p;
  const i64 rows = block_rows(p);
  float* panel = take<float>(in_steps(p) ? kDepthStep * kPanel : p.queries * depth_of(p) * panel_lanes(p));
  float* dots = take<float>(rows * kPanel);
  float* other = take<float>(p.queries > 1 ? rows * kPanel : 0);
  char* copy = take<char>(copy_bytes(p, kPanel));
  char* texts = take<char>(copy_bytes(p, rows));
  std::int32_t* labels = take<std::int32_t>(kPanel);
  float* positives = take<float>(rows); // sums of a block of hard texts, which nothing uses
};

// Calls f(tile) for each tile of all images and a task's texts; its dots are not computed yet.
template <typename F>
void each_tile(const ContrastiveParams& p, const Task& task, const SoftmaxScratch& s, const F& f) {
  for (i64 lane = 0; lane < p.image.count; lane += kPanel) {
    const i64 lanes = least<i64>(kPanel, p.image.count - lane);
    for (i64 query = 0; query < p.queries && !in_steps(p); ++query) {
      float* panel = s.panel + query * depth_of(p) * panel_lanes(p);
      pack_panel(p, source_of(p.image, lane, query), lanes, p.dim, panel_lanes(p), panel, s.copy);
    }
    panel_labels(p, lane, lanes, s.labels);
    for (i64 row = task.first; row < task.last; row += s.rows) {
      f(LogitTile{p, task.hard, row, least(s.rows, task.last - row), lane, lanes, s.labels, s.dots});
    }
  }
}
// Computes the dots of texts first to first + count of a tile, from the tile's first row on.
inline void tile_dots(const LogitTile& tile, const SoftmaxScratch& s, i64 first, i64 count) {
  const ContrastiveParams& p = tile.p;
  const Source source = source_of(texts_of(p, tile.hard), tile.row + first);
  const Panel panel{in_steps(p) ? nullptr : s.panel, tile.lane, tile.lanes};
  panel_dots(p, source, fetch_whole(p, source, count, s.texts), count, panel, s.dots, s.other, nullptr,
             {s.panel, s.copy, s.texts});
}

MMK_INLINE Sums from(const Sums& x, i64 n) {
  return {x.reference + n, x.sum + n, x.positives + n, x.all == nullptr ? nullptr : x.all + n};
}
MMK_INLINE Ranks from(const Ranks& x, i64 n) {
  return x.best == nullptr ? Ranks{} : Ranks{x.best + n, x.index + n, x.before + n};
}

// Adds a tile, whose dots are computed, to the sums of both directions.
template <int kCount>
void add_tile(const LogitTile& logits, const Sums& images, const Ranks& image_ranks, const SoftmaxScratch& s) {
  const ContrastiveParams& p = logits.p;
  const bool of_batch = !logits.hard;
  const SoftmaxTile<kCount> tile{logits, of_batch ? from(p.text_sums, logits.row) : Sums{}, from(images, logits.lane),
                                 of_batch ? from(p.text_ranks, logits.row) : Ranks{}, from(image_ranks, logits.lane)};
  const float top = tile.largest_logit();
  if (images.all != nullptr) {
    if (of_batch) {
      tile.add_all(tile.texts.all);
    } else {
      std::memset(s.positives, 0, tile.rows * sizeof(float));
      tile.add_all(s.positives);
    }
  }
  if (image_ranks.best != nullptr) {
    tile.count_before();
  }
  if (tile.may_match()) {
    tile.add_positives(of_batch ? tile.texts.positives : s.positives);
  }
  if (!tile.add_together(top)) {
    tile.add_apart();
  }
}

// The images' arrays are padded to whole panels, the texts' to whole vectors past the end of each task.
inline void softmax(const ContrastiveParams& p, const Task& task, const Sums& images, const Ranks& image_ranks,
                    char* scratch) {
  const SoftmaxScratch s{{scratch}, p};
  each_tile(p, task, s, [&](const LogitTile& tile) {
    tile_dots(tile, s, 0, tile.rows);
    if (tile.lanes <= kLanes) {
      add_tile<1>(tile, images, image_ranks, s);
    } else {
      add_tile<kVectors>(tile, images, image_ranks, s);
    }
  });
}

// The texts of a tile that have a positive in it; returns how many there are.
inline i64 matching_texts(const LogitTile& tile, std::int32_t* texts) {
  i64 count = 0;
  for (i64 r = 0; r < tile.rows; ++r) {
    std::uint32_t any = 0;
    for (int v = 0; v < kVectors; ++v) {
      any |= tile.matches(r, v);
    }
    texts[count] = (std::int32_t)r;
    count += any != 0 ? 1 : 0;
  }
  return count;
}

// Finds each row's best positive, before ranks can be counted, from the same products in the same order, so that scores
// are bit-equal. Only texts with a positive in the panel are multiplied.
inline void best_positives(const ContrastiveParams& p, const Task& task, const Ranks& images, char* scratch) {
  const SoftmaxScratch s{{scratch}, p};
  // Indices rise in both directions, so that the first of equals stays.
  const auto keep_best = [](const Ranks& ranks, i64 row, float x, i64 index) {
    if (x > ranks.best[row] || x != x) {
      ranks.best[row] = x;
      ranks.index[row] = (std::int32_t)index;
    }
  };
  each_tile(p, task, s, [&](const LogitTile& tile) {
    if (!tile.may_match() || (task.hard && p.ignore)) {
      return;
    }
    std::int32_t matching[kMaxRows];
    const i64 count = matching_texts(tile, matching);
    // A single row costs about four times its share of a whole tile, and would pack a deep panel for itself.
    const bool whole = count * 4 > tile.rows || (in_steps(p) && count > 0);
    if (whole) {
      tile_dots(tile, s, 0, tile.rows);
    }
    for (i64 at = 0; at < count; ++at) {
      const i64 r = matching[at], text = tile.row + r;
      if (!whole) {
        tile_dots(tile, s, r, 1);
      }
      const float* dots = s.dots + (whole ? r * kPanel : 0);
      for (int v = 0; v < kVectors; ++v) {
        for (std::uint32_t bits = tile.matches(r, v); bits != 0; bits &= bits - 1) {
          const i64 n = v * kLanes + __builtin_ctz(bits), image = tile.lane + n;
          if (task.hard) {
            keep_best(images, image, dots[n] * p.sign, p.text.count + text);
          } else if (!p.ignore || image == p.first_text + text) {
            keep_best(images, image, dots[n] * p.sign, text);
            keep_best(p.text_ranks, text, dots[n] * p.sign, image);
          }
        }
      }
    }
  });
}

} // namespace mmkernels::MMK_ISA
