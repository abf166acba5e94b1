// One call of co_attention as its kernels see it. One of the two sides is cut into panels, whose tokens are the lanes
// of a tile, and the other one's tokens are the rows of a tile. In the names of AttentionParams the lanes are the
// queries and the rows the keys, so that the lanes' direction (each lane's softmax over the rows) is attention as
// usual.
#pragma once

#include "params.h"

namespace mmkernels {

struct CoAttentionParams : AttentionParams {
  // The rows' direction: each row's softmax over the lanes, times the lanes' values.
  std::int64_t lane_value_dim = 0;
  View lane_value, row_out;
  float* row_lse = nullptr; // [B, H, rows]

  Lines<std::uint8_t> lane_valid, row_valid; // false: not visible to the other side; its own output is computed

  // The mask of pairs, beside `dense` and `words`. Spans belong to side a, `pair_valid` to side b.
  bool swapped = false; // the lanes are side b
  Lines<std::int32_t> row_start, row_end;
  Lines<std::uint8_t> lane_pair_valid;

  std::uint32_t row_seed_low = 0, row_seed_high = 0; // of the rows' direction

  // The lanes are cut into slabs of panels, each with sums of its own for the rows: `slabs` for each (b, h).
  std::int64_t slabs = 1, slab_panels = 0;
  std::int64_t panels_together = 1; // panels that share a tile of rows, forward
  std::int64_t tile_rows = 0;       // rows of a tile, at most `max_tile_rows`
  float* row_parts = nullptr;       // [B, H, slabs, row_part] where slabs > 1
  std::int64_t row_part = 0;

  // Backward; data is null for a gradient that is not needed.
  View row_grad_out, grad_lane_value;
};

// The kernels of one instruction set. `bh` counts (batch entry, head).
struct CoAttentionKernels {
  std::int64_t max_tile_rows;
  std::int64_t (*forward_scratch)(const CoAttentionParams&);
  std::int64_t (*row_part)(const CoAttentionParams&); // floats of one slab's sums
  void (*forward)(const CoAttentionParams&, std::int64_t bh, std::int64_t slab, char* scratch);
  // Rows [begin, end) of one (b, h): the slabs' sums are merged and written.
  void (*forward_merge)(const CoAttentionParams&, std::int64_t bh, std::int64_t begin, std::int64_t end);

  std::int64_t (*backward_scratch)(const CoAttentionParams&);
  std::int64_t (*backward_row_part)(const CoAttentionParams&);
  void (*backward)(const CoAttentionParams&, std::int64_t bh, std::int64_t slab, char* scratch);
  void (*backward_merge)(const CoAttentionParams&, std::int64_t bh, std::int64_t begin, std::int64_t end);

  // The largest squared norm of rows [begin, end) of a side of one (b, h); not finite where one of them is not.
  float (*largest_norm)(const View&, std::int64_t dim, std::int64_t b, std::int64_t h, std::int64_t begin,
                        std::int64_t end);
  // Widens [low, high] to the finite ones of `count` elements, `stride` apart, from element `first` of the data on.
  void (*widen_range)(const View&, std::int64_t first, std::int64_t stride, std::int64_t count, float& low,
                      float& high);
  // The largest finite score of all pairs of one slab; -inf where there is none.
  float (*largest_score)(const CoAttentionParams&, std::int64_t bh, std::int64_t slab, char* scratch);
};

} // namespace mmkernels
