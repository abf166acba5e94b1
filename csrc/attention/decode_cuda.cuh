// Attention of few queries to long keys and values, for sm_80 and newer. Untested on a GPU;
// tests/ops/attention/test_cuda_decode.py runs the same source on the host.
//
// The lower bound is the time to read keys and values once: B 32, 8 key heads, Lk 4096, D 128 in 16 bits are 512 MiB,
// 160 us at an H100's 3.35 TB/s. What it takes to approach it:
// - Bytes in flight. 3.35 TB/s times about 0.8 us of loaded latency are 2.7 MB, 20 KiB a multiprocessor; two to
//   three times that leaves no gaps. A block has two of three stages in flight, 2 x 32 KiB at D 128, and two blocks fit
//   (2 x 97 KiB of 228), so 128 KiB; at D 64 three blocks, 96 KiB. One block of D 128, 64 KiB, fits an A100 and an
//   sm_86, sm_89 or sm_120 (97 of 99 KiB).
// - No barriers in the loop. With up to 16 rows, a warp loads and multiplies keys that no other warp uses; warps merge
//   once at the end.
// - Few instructions. 16 keys of D 128 are 8 KiB, 565 cycles of an H100 multiprocessor's share of the bandwidth. They
//   cost a warp about 450 issue slots, 32 of them matrix instructions, and there are four schedulers: a fifth of
//   the slots. So padded rows do not matter; 64 rows multiply four times as much, and approach the limit.
// - Keys in 16-byte pieces by cp.async past the L1 cache, swizzled so that ldmatrix has no bank conflicts.
#pragma once

#include "decode_tiles.cuh"

namespace mmkernels {

// Merges partial softmaxes of one row over different keys: `count` pairs (largest, sum), at a stride of `apart` floats.
struct Merged {
  float largest = -kInfinity, base = 0.0f, sum = 0.0f;
  bool sees = false;

  MMK_DEVICE Merged(const float* stats, int count, std::int64_t apart) {
    for (int n = 0; n < count; ++n) {
      largest = fmaxf(largest, stats[n * apart]);
    }
    base = fabsf(largest) == kInfinity ? 0.0f : largest;
    for (int n = 0; n < count; ++n) {
      const float part = stats[n * apart + 1];
      sum += part * exp2f(stats[n * apart] - base);
      sees |= !(part == 0.0f);
    }
  }
  MMK_DEVICE float weight(const float* stats) const {
    return exp2f(*stats - base);
  }
  MMK_DEVICE float output(float x) const {
    return sum == 0.0f ? (sees ? kNan : 0.0f) : x / sum;
  }
  MMK_DEVICE float log_sum_exp() const {
    return sum == 0.0f ? -kInfinity : (base + log2f(sum)) * kLn2;
  }
};

// Writes two columns of a row; with the first two, its log-sum-exp too.
template <class T>
MMK_DEVICE void write_row(const DecodeProblem& p, int b, int h, int i, int dim, int column, const Merged& row, float x,
                          float y) {
  float factor = 1.0f;
  if (p.gate != nullptr) {
    const float gate = p.gate_is_float ? load_global(static_cast<const float*>(p.gate) + h * p.gate_h)
                                       : widen(load_global(static_cast<const T*>(p.gate) + h * p.gate_h));
    factor = tanhf(gate);
  }
  const std::int64_t at = (static_cast<std::int64_t>(b) * p.q_len + i) * p.heads + h;
  store_global(reinterpret_cast<std::uint32_t*>(static_cast<T*>(p.out) + at * dim + column),
               pack(T{}, row.output(x) * factor, row.output(y) * factor));
  if (column == 0) {
    store_global(p.lse + (static_cast<std::int64_t>(b) * p.heads + h) * p.q_len + i, row.log_sum_exp());
  }
}

// A warp's slices of keys and values on their way to shared memory: in each tile of the block's split the warp loads
// one, `kStages - 1` tiles ahead of the products.
template <class T, int D> struct SlicePipeline {
  static constexpr int kSliceBytes = kSliceKeys * D * 2, kStageBytes = 2 * kDecodeWarps * kSliceBytes;

  const DecodeProblem& p;
  int b, warp, lane;
  BlockSpan all;
  int first_tile, last_tile;
  const T *key, *value;
  std::uint32_t stages, slices; // addresses in shared memory
  bool valid;                   // key lane % 16 of the slice that is loaded next

  MMK_DEVICE SlicePipeline(const DecodeProblem& p, int b, int kv, int split, std::uint32_t shared)
      : p(p), b(b), warp(threadIdx.x / 32), lane(threadIdx.x % 32), all(block_span(p, b)),
        key(static_cast<const T*>(p.key) + b * p.key_b + kv * p.key_h),
        value(static_cast<const T*>(p.value) + b * p.value_b + kv * p.value_h), stages(shared),
        slices(shared + decode_slices_offset(D)) {
    const std::int64_t tiles = (all.last - all.first + kStageKeys - 1) / kStageKeys;
    first_tile = static_cast<int>(tiles * split / p.splits);
    last_tile = static_cast<int>(tiles * (split + 1) / p.splits);
    valid = key_valid(slice_key(first_tile, warp));
  }

  MMK_DEVICE int slice_key(int tile, int slice) const {
    return all.first + tile * kStageKeys + slice * kSliceKeys;
  }
  MMK_DEVICE std::uint32_t keys_at(int stage, int slice) const { // their values follow
    return stages + stage * kStageBytes + slice * 2 * kSliceBytes;
  }
  // The keys of a slice that are read, as bits.
  MMK_DEVICE std::uint32_t existing_keys(int stage, int slice) const {
    return load_shared(slices + (stage * kDecodeWarps + slice) * 4);
  }

  // Starts the copies of the warp's slice of a tile as one group, an empty one past the end.
  MMK_DEVICE void start_load(int tile) {
    if (tile < last_tile) {
      const int stage = (tile - first_tile) % kStages, first = slice_key(tile, warp);
      const std::uint32_t existing = vote(lane < kSliceKeys && valid && first + lane < all.last);
      const std::uint32_t keys = keys_at(stage, warp);
      valid = key_valid(first + kStageKeys);
      load_slice<D>(keys, keys + kSliceBytes, key, value, p, first, existing, lane);
      if (lane == 0) {
        store_shared(slices + (stage * kDecodeWarps + warp) * 4, existing);
      }
    }
    copy_commit();
  }

private:
  // Whether key first + lane % 16 is valid.
  MMK_DEVICE bool key_valid(int first) const {
    const int j = first + lane % kSliceKeys;
    return p.key_valid == nullptr || (j < all.last && load_global(p.key_valid + b * p.valid_b + j * p.valid_j) != 0);
  }
};

// Merges the warps' results in shared memory, to the output, or to the workspace where keys are split over blocks.
template <class T, int D, int kRowTiles>
MMK_DEVICE void finish_block(const DecodeProblem& p, int b, int kv, std::int64_t head, int split, const float* stats,
                             const float* sums) {
  constexpr int teams = kDecodeWarps / kRowTiles, team_rows = kRowTiles * kTileRows;
  const int group = p.heads / p.key_heads, rows = group * p.q_len;
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < rows * (D / 2); at += kDecodeThreads) {
    const int row = at / (D / 2), column = at % (D / 2) * 2;
    const float* row_stats = stats + 2 * row;
    const Merged merged(row_stats, teams, 2 * team_rows);
    float x = 0.0f, y = 0.0f;
#pragma unroll
    for (int team = 0; team < teams; ++team) {
      const float weight = merged.weight(row_stats + team * 2 * team_rows);
      const float* part = sums + (team * team_rows + row) * kSumRow<D> + column;
      x += weight * part[0];
      y += weight * part[1];
    }
    if (p.splits == 1) {
      write_row<T>(p, b, kv * group + row / p.q_len, row % p.q_len, D, column, merged, x, y);
      continue;
    }
    const std::int64_t total = static_cast<std::int64_t>(p.batch) * p.key_heads * p.splits * rows;
    const std::int64_t place = (head * p.splits + split) * rows + row;
    store_global(p.partial + place * D + column, x);
    store_global(p.partial + place * D + column + 1, y);
    if (column == 0) {
      const bool nothing_finite = merged.sum == 0.0f && merged.sees; // the encoding of RowTile::store
      store_global(p.partial + total * D + 2 * place, merged.largest);
      store_global(p.partial + total * D + 2 * place + 1, nothing_finite ? 1.0f : merged.sum);
    }
  }
}

// A block: one key head of one batch entry, and one split of the keys that its queries see.
template <class T, int D, int kRowTiles>
__global__ void __launch_bounds__(kDecodeThreads, decode_resident(D))
    decode_kernel(const __grid_constant__ DecodeProblem p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp / kRowTiles;
  const int split = static_cast<int>(blockIdx.x % p.splits);
  const std::int64_t head = blockIdx.x / p.splits;
  const int b = static_cast<int>(head / p.key_heads), kv = static_cast<int>(head % p.key_heads);
  char* const shared = dynamic_shared();
  SlicePipeline<T, D> pipeline(p, b, kv, split, shared_address(shared));
  const auto sync_team = [] { kRowTiles == 1 ? sync_warp() : __syncthreads(); };

#pragma unroll 1
  for (int n = 0; n < kStages - 1; ++n) {
    pipeline.start_load(pipeline.first_tile + n);
  }
  RowTile<T, D> rows;
  rows.load(p, b, kv, warp % kRowTiles * kTileRows, lane);
#pragma unroll 1
  for (int tile = pipeline.first_tile; tile < pipeline.last_tile; ++tile) {
    copy_wait<kStages - 2>();
    sync_team(); // all copies of the tile have landed, and no warp still reads the stage that is filled next
    pipeline.start_load(tile + kStages - 1);
    const int stage = (tile - pipeline.first_tile) % kStages;
#pragma unroll 1
    for (int n = 0; n < kRowTiles; ++n) {
      const int slice = team * kRowTiles + n;
      const std::uint32_t keys = pipeline.keys_at(stage, slice), existing = pipeline.existing_keys(stage, slice);
      rows.attend_slice(keys, keys + pipeline.kSliceBytes, pipeline.slice_key(tile, slice), existing, pipeline.all,
                        p.scale, lane);
    }
  }
  copy_wait<0>();
  __syncthreads(); // the stages are free for the warps' sums
  static_assert(kDecodeWarps * kTileRows * kSumRow<D> * 4 <= decode_slices_offset(D));
  auto* const sums = reinterpret_cast<float*>(shared);
  auto* const stats = reinterpret_cast<float*>(shared + decode_stats_offset(D));
  rows.store(stats + warp * kTileRows * 2, sums + warp * kTileRows * kSumRow<D>, lane);
  __syncthreads();
  finish_block<T, D, kRowTiles>(p, b, kv, head, split, stats, sums);
}

// Merges the splits of each row; one warp a row.
template <class T>
__global__ void __launch_bounds__(32 * kMergeRows)
    decode_merge_kernel(const __grid_constant__ DecodeProblem p, int dim) {
  const int group = p.heads / p.key_heads, rows = group * p.q_len;
  const std::int64_t heads = static_cast<std::int64_t>(p.batch) * p.key_heads;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kMergeRows + threadIdx.x / 32;
  if (at >= heads * rows) {
    return;
  }
  const std::int64_t head = at / rows, place = head * p.splits * rows + at % rows;
  const int b = static_cast<int>(head / p.key_heads), kv = static_cast<int>(head % p.key_heads);
  const int row = static_cast<int>(at % rows);
  const float* stats = p.partial + heads * p.splits * rows * dim + 2 * place;
  const Merged merged(stats, p.splits, 2 * rows);
  for (int column = threadIdx.x % 32 * 2; column < dim; column += 64) {
    float x = 0.0f, y = 0.0f;
    for (int n = 0; n < p.splits; ++n) {
      const float weight = merged.weight(stats + static_cast<std::int64_t>(n) * 2 * rows);
      const float* part = p.partial + (place + static_cast<std::int64_t>(n) * rows) * dim + column;
      x += weight * part[0];
      y += weight * part[1];
    }
    write_row<T>(p, b, kv * group + row / p.q_len, row % p.q_len, dim, column, merged, x, y);
  }
}

} // namespace mmkernels
