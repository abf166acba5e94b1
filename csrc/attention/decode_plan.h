// The decode kernels' sizes and launches, computed without a GPU, and one call as plain data.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define MMK_HOST_DEVICE __host__ __device__
#else
#define MMK_HOST_DEVICE
#endif

namespace mmkernels {

constexpr int kDecodeWarps = 4, kDecodeThreads = 32 * kDecodeWarps;
constexpr int kSliceKeys = 16;                        // that one warp loads and multiplies at a time
constexpr int kStageKeys = kDecodeWarps * kSliceKeys; // keys in one stage of the pipeline
constexpr int kStages = 3;                            // in shared memory: one in use, two in flight
constexpr int kTileRows = 16;                         // queries x heads of one matrix instruction
constexpr int kMaxDecodeRows = 64, kMaxDecodeQueries = 8;
constexpr int kMinSplitKeys = 256, kMaxSplits = 128; // shorter splits mostly start and finish
constexpr int kMergeRows = 4;                        // rows of one block that merges splits: one a warp

// One call. Strides are in elements, 0 where a dim is shared.
struct DecodeProblem {
  const void *query, *key, *value;
  std::int64_t query_b, query_h, query_i, key_b, key_h, key_j, value_b, value_h, value_j;
  const std::int32_t *start, *end; // both or neither
  std::int64_t start_b, start_i, end_b, end_i;
  const std::uint8_t* key_valid; // may be null
  std::int64_t valid_b, valid_j;
  const void* gate; // may be null
  bool gate_is_float;
  std::int64_t gate_h;
  float scale; // times log2(e): exponentials are powers of two
  void* out;   // [B, Lq, Hq, D]
  float* lse;  // [B, Hq, Lq]
  // With more than one split: sums [B, Hkv, splits, rows, D], then their (largest score, sum of exponentials).
  float* partial;
  std::int32_t batch, heads, key_heads, q_len, k_len, splits;
};

// Rows of a block: all queries of all heads that attend to one key head, query fastest.
constexpr int decode_rows(int heads, int key_heads, int q_len) {
  return heads / key_heads * q_len;
}

// Warps that share their keys and differ in rows, a tile of 16 each: 1, 2 or 4. The other warps take other keys.
constexpr int decode_row_tiles(int rows) {
  return rows <= kTileRows ? 1 : rows <= 2 * kTileRows ? 2 : 4;
}

// Shared memory: keys and values of all stages; then for each slice the keys that exist, as bits; then softmax's sums.
MMK_HOST_DEVICE constexpr int decode_slices_offset(int dim) {
  return kStages * kStageKeys * 2 * dim * 2;
}
MMK_HOST_DEVICE constexpr int decode_stats_offset(int dim) {
  return decode_slices_offset(dim) + kStages * kDecodeWarps * 4;
}
MMK_HOST_DEVICE constexpr int decode_shared_bytes(int dim) {
  return decode_stats_offset(dim) + kDecodeWarps * kTileRows * 2 * 4;
}

// Blocks that fit a multiprocessor of 228 KiB (sm_90, sm_100), for __launch_bounds__. A fourth at D 64 would leave a
// thread 128 registers, too few for sm_100's code.
constexpr int decode_resident(int dim) {
  return dim <= 96 ? 3 : 2;
}

constexpr bool decode_takes_dim(int dim) {
  return dim == 64 || dim == 80 || dim == 96 || dim == 128;
}

struct DecodePlan {
  int splits;
  std::int64_t blocks, merge_blocks; // merge_blocks: 0 with one split
  std::int64_t partial_floats;
};

// How many blocks share the keys of one key head. Few, since each writes a partial result, which is read again, but so
// many that the last wave of blocks leaves few multiprocessors idle.
inline int decode_splits(std::int64_t heads, std::int64_t k_len, std::int64_t room) {
  const std::int64_t most = std::clamp<std::int64_t>(k_len / kMinSplitKeys, 1, kMaxSplits);
  const auto filled = [&](std::int64_t splits) { // the share of the waves' block slots that hold a block
    const std::int64_t blocks = heads * splits, waves = (blocks + room - 1) / room;
    return static_cast<double>(blocks) / static_cast<double>(waves * room);
  };
  double best = 0.0;
  for (std::int64_t splits = 1; splits <= most; ++splits) {
    best = std::max(best, filled(splits));
  }
  for (std::int64_t splits = 1; splits < most; ++splits) {
    if (filled(splits) >= 0.9 * best) {
      return static_cast<int>(splits);
    }
  }
  return static_cast<int>(most);
}

// `shared_per_sm`: bytes of shared memory that a multiprocessor has.
inline DecodePlan plan_decode(std::int64_t batch, std::int64_t heads, std::int64_t key_heads, std::int64_t q_len,
                              std::int64_t k_len, int dim, int sms, int shared_per_sm) {
  constexpr int reserved = 1024; // of each block, by CUDA
  const int resident = std::clamp(shared_per_sm / (decode_shared_bytes(dim) + reserved), 1, decode_resident(dim));
  DecodePlan plan{};
  plan.splits = batch * key_heads == 0 ? 1 : decode_splits(batch * key_heads, k_len, std::int64_t{resident} * sms);
  plan.blocks = batch * key_heads * plan.splits;
  if (plan.splits > 1) {
    const std::int64_t rows = batch * heads * q_len;
    plan.partial_floats = rows * plan.splits * (dim + 2);
    plan.merge_blocks = (rows + kMergeRows - 1) / kMergeRows;
  }
  return plan;
}

// Blocks are one dimension of a grid, keys are counted in 32 bits.
constexpr std::int64_t kMaxDecodeKeys = std::numeric_limits<std::int32_t>::max() - (kStages + 1) * kStageKeys;
constexpr std::int64_t kMaxOutputRows = std::numeric_limits<std::int32_t>::max() / kMaxSplits;

constexpr bool decode_fits(std::int64_t batch, std::int64_t heads, std::int64_t q_len, std::int64_t k_len) {
  return batch * heads * q_len <= kMaxOutputRows && k_len <= kMaxDecodeKeys;
}

} // namespace mmkernels
