// frame_difference on the CPU. The public function has checked the arguments.
//
// The least time is that of reading x once: 4 FLOP an element are far below what a core computes meanwhile. Measured on
// Zen 5, one thread, out of the caches: float32 at 85 % of the speed at which `max` reads x, bfloat16 at 60 %.
#include <ATen/EmptyTensor.h>

#include <limits>

#include "cosine_params.h"
#include "launch.h"
#include "pieces.h"

namespace mmkernels {

MMK_TABLES(CosineKernels, cosine_kernels)

namespace {

constexpr i64 kTileBytes = i64{128} << 10; // of one frame: two of them stay in a core's caches
constexpr i64 kTasks = 4;                  // of a thread, at least, so that all end together
constexpr i64 kFrames = 32;                // of a task, at least: it reads the frame before them too

// What the threads do: positions cut so that a frame's rows are still in the caches when the next frame's are read, and
// frames, where positions alone are too few tasks.
std::vector<FrameTask> tasks_of(const std::vector<FrameTask>& videos, int threads) {
  i64 tiles = 0;
  const auto rows_of = [](const FrameTask& v) {
    return std::max<i64>(kTileBytes / std::max<i64>(v.x.row_bytes, 1), 1);
  };
  for (const FrameTask& v : videos) {
    tiles += (v.positions + rows_of(v) - 1) / rows_of(v);
  }
  const i64 parts = threads == 1 ? 1 : (kTasks * threads + tiles - 1) / std::max<i64>(tiles, 1);
  std::vector<FrameTask> tasks;
  for (const FrameTask& v : videos) {
    const i64 frames = std::max(kFrames, (v.last_frame + parts - 1) / parts);
    for (i64 first = 0; first < v.positions; first += rows_of(v)) {
      for (i64 frame = 1; frame < v.last_frame; frame += frames) {
        FrameTask task = v;
        task.first = first;
        task.last = std::min(v.positions, first + rows_of(v));
        task.first_frame = frame;
        task.last_frame = std::min(v.last_frame, frame + frames);
        tasks.push_back(task);
      }
    }
  }
  return tasks;
}

Tensor frame_difference(const Arguments& args) {
  const Tensor x = with_dense_channels(args.tensor("x"));
  const std::vector<i64> grid = args.sizes("grid");
  TORCH_CHECK_VALUE(grid.size() % 3 == 0, "grid must be (t, h, w) for each image, got ", grid);
  std::vector<i64> lengths;
  for (std::size_t at = 0; at < grid.size(); at += 3) {
    TORCH_CHECK_VALUE(grid[at] > 0 && grid[at + 1] > 0 && grid[at + 2] > 0, "grid must be 1 or more, got ", grid);
    lengths.push_back(grid[at] * grid[at + 1] * grid[at + 2]);
  }
  const std::vector<TokenMatrix> images = matrices_of("x", x, lengths);
  const Tensor out = at::detail::empty_cpu({count_of(lengths)}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  std::vector<FrameTask> videos;
  i64 scratch = 0;
  for (std::size_t image = 0; image < images.size(); ++image) {
    const i64 frames = grid[3 * image], positions = grid[3 * image + 1] * grid[3 * image + 2];
    std::fill(to, to + positions, std::numeric_limits<float>::infinity());
    videos.push_back({images[image], positions, 0, positions, 1, frames, to});
    to += lengths[image];
  }
  const std::vector<FrameTask> tasks = tasks_of(videos, available_threads());
  const CosineKernels& k = cosine_kernels();
  for (const FrameTask& task : tasks) {
    scratch = std::max(scratch, k.frame_scratch(task));
  }
  parallel_tasks(static_cast<i64>(tasks.size()), threads_for_bytes(static_cast<double>(x.nbytes())), scratch,
                 [&](i64 task, char* own) { k.frame_difference(tasks[task], own); });
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("frame_difference_cpu", by_name<frame_difference>());
}

} // namespace mmkernels
