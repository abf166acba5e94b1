// One call of a contrastive op: tensors as the plain data that the kernels take, and how the work is cut.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "../common/choice.h"
#include "../common/parallel.h"
#include "../common/tensors.h"
#include "../common/work.h"
#include "problem.h"

namespace mmkernels {

#if defined(MMKERNELS_X86)
extern const PairKernels pair_kernels_avx512_bf16, pair_kernels_avx512, pair_kernels_avx2;
#endif
extern const PairKernels pair_kernels_plain;

constexpr double kLog2OfE = 1.4426950408889634, kLnOf2 = 0.6931471805599453;
constexpr i64 kAlign = 64;         // padding of arrays: whole panels of any instruction set
constexpr i64 kTaskRows = 16;      // what tasks are cut at: whole vectors of any instruction set
constexpr i64 kLongTask = 512;     // texts of a task that is worth another
constexpr double kSmallWork = 4e5; // FLOP below which one thread is faster

// float32 [count], padded, each `value`.
inline std::vector<float> array(i64 count, float value = 0.0f) {
  return std::vector<float>((count + kAlign - 1) / kAlign * kAlign, value);
}

// Labels for the ids of both sides: small numbers, the same where the ids are.
struct Labels {
  std::vector<std::int32_t> image, text;
  std::vector<std::int32_t> images, texts; // how many of each label
};

inline Labels labels_of(const Tensor& image_ids, const Tensor& text_ids) {
  const Tensor of_image = image_ids.contiguous(), of_text = text_ids.contiguous();
  const i64 *a = of_image.const_data_ptr<i64>(), *b = of_text.const_data_ptr<i64>();
  const i64 n = of_image.numel(), m = of_text.numel();
  std::vector<i64> sorted(a, a + n);
  sorted.insert(sorted.end(), b, b + m);
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  Labels found;
  found.images.resize(sorted.size());
  found.texts.resize(sorted.size());
  const auto label = [&](const i64* ids, i64 count, std::vector<std::int32_t>& to, std::vector<std::int32_t>& counts) {
    to.resize((count + kAlign - 1) / kAlign * kAlign, -1);
    for (i64 i = 0; i < count; ++i) {
      to[i] = static_cast<std::int32_t>(std::lower_bound(sorted.begin(), sorted.end(), ids[i]) - sorted.begin());
      ++counts[to[i]];
    }
  };
  label(a, n, found.image, found.images);
  label(b, m, found.text, found.texts);
  return found;
}

inline Features features_of(const Tensor& x) {
  Features f;
  f.data = static_cast<const char*>(x.const_data_ptr());
  f.type = type_of(x);
  f.count = x.size(0);
  f.row = x.stride(0);
  f.query = x.dim() == 3 ? x.stride(1) : 0;
  f.column = x.size(-1) == 1 ? 1 : x.stride(-1);
  return f;
}

// Tasks are runs of texts: few texts of many images had better take the images' part.
inline bool turned(const Tensor& image, const Tensor& text) {
  return image.dim() == 2 && text.dim() == 2 && text.size(0) * 4 < image.size(0) &&
         text.size(0) < 4 * kTaskRows * available_threads();
}

struct PairCall {
  PairProblem p{};
  const PairKernels& k = MMKERNELS_CHOSEN(pair_kernels); // once: another thread may choose otherwise meanwhile
  Labels labels;
  bool labelled = false;
  std::vector<Task> tasks;
  int threads = 1;
  double scale_log2 = 0.0; // the scale times log2(e)

  PairCall(const Tensor& image, const Tensor& text, const char* first = "image", const char* second = "text") {
    TORCH_CHECK_VALUE((image.dim() == 2 || image.dim() == 3) && image.numel() > 0 && image.device().is_cpu(), first,
                      " must be [N, d] or [N, Q, d] on the CPU, and not empty, got ", image.sizes());
    p.image = features_of(image);
    p.queries = image.dim() == 3 ? image.size(1) : 1;
    p.dim = image.size(-1);
    p.text = features_of(checked(second, text, image));
    TORCH_CHECK_VALUE(p.text.count > 0, second, " must not be empty");
    TORCH_CHECK_VALUE(p.image.count < INT32_MAX && p.text.count < INT32_MAX, "there are too many rows");
  }

  const Tensor& checked(const char* name, const Tensor& x, const Tensor& image) const {
    check_sizes(name, x, {-1, p.dim});
    TORCH_CHECK_TYPE(x.scalar_type() == image.scalar_type(), name, " must have the dtype ", image.scalar_type());
    return x;
  }

  void set_hard(const OptionalTensor& hard, const Tensor& image) {
    if (hard.has_value()) {
      p.hard = features_of(checked("hard_texts", *hard, image));
      TORCH_CHECK_VALUE(p.hard.count + p.text.count < INT32_MAX, "there are too many rows");
    }
  }
  void set_scale(const Tensor& scale) {
    TORCH_CHECK_VALUE(scale.numel() == 1, "logit_scale must have one element");
    const double value = scale.item().toDouble();
    p.scale = static_cast<float>(value);
    scale_log2 = value * kLog2OfE;
    const float near = static_cast<float>(scale_log2), least = std::copysign(FLT_MIN, near);
    const float high = std::abs(near) > std::abs(scale_log2) ? std::nextafter(near, 0.0f) : near;
    p.high = high == 0.0f ? least : high;
    p.low = static_cast<float>(scale_log2 - p.high);
    p.low = p.low == 0.0f || std::signbit(p.low) != std::signbit(p.high) ? least : p.low;
    p.hidden = std::signbit(p.high) ? INFINITY : -INFINITY;
    p.sign = value > 0.0 ? 1.0f : (value < 0.0 ? -1.0f : static_cast<float>(value)); // 0, or NaN
  }
  void set_ids(const OptionalTensor& image_ids, const OptionalTensor& text_ids, bool ignore) {
    labelled = image_ids.has_value();
    TORCH_CHECK_VALUE(labelled == text_ids.has_value(), "image_ids and text_ids must both be given, or neither");
    TORCH_CHECK_VALUE((labelled && !ignore) || p.image.count == p.text.count,
                      "without ids, or to ignore theirs, there must be as many texts as images");
    if (labelled) {
      check_sizes("image_ids", *image_ids, {p.image.count});
      check_sizes("text_ids", *text_ids, {p.text.count});
      labels = labels_of(*image_ids, *text_ids);
      p.image_label = labels.image.data();
      p.text_label = labels.text.data();
      p.ignore = ignore;
    }
  }

  // How many positives image (or text) i has, and how many columns its softmax compares.
  i64 positives(bool of_text, i64 i) const {
    if (!labelled || p.ignore) {
      return 1;
    }
    return of_text ? labels.images[labels.text[i]] : labels.texts[labels.image[i]];
  }
  i64 classes(bool of_text, i64 i) const {
    const i64 all = of_text ? p.image.count : p.text.count + p.hard.count;
    if (!labelled || !p.ignore) {
      return all;
    }
    const i64 same = of_text ? labels.images[labels.text[i]] : labels.texts[labels.image[i]];
    return all - same + (labels.image[i] == labels.text[i] ? 1 : 0);
  }

  void choose_threads(double products) {
    const i64 rows = p.text.count + p.hard.count;
    threads = products * 2.0 * p.image.count * p.queries * rows * p.dim < kSmallWork ? 1 : available_threads();
  }
  // Cuts the texts into tasks, several for each thread, of at most `bytes` in all where each keeps so many.
  void cut(double products, i64 bytes_of_task, i64 bytes) {
    choose_threads(products);
    const i64 rows = p.text.count + p.hard.count;
    // A second task for each thread evens out what else the machine does, where tasks are long.
    i64 wanted = threads == 1 ? 1 : (rows >= 2 * threads * kLongTask ? 2 * threads : threads);
    if (bytes_of_task > 0) {
      wanted = std::clamp<i64>(bytes / bytes_of_task, std::min<i64>(threads, wanted), wanted);
    }
    const i64 each = std::max<i64>((rows + wanted - 1) / wanted + kTaskRows - 1, kTaskRows) / kTaskRows * kTaskRows;
    for (int side = 0; side < 2; ++side) {
      const i64 count = side == 0 ? p.text.count : p.hard.count;
      for (i64 first = 0; first < count; first += each) {
        tasks.push_back({side, first, std::min(count, first + each)});
      }
    }
  }
  void run(i64 scratch, const std::function<void(const Task&, i64, char*)>& f) const {
    parallel_tasks(static_cast<i64>(tasks.size()), threads, scratch,
                   [&](i64 i, char* memory) { f(tasks[i], i, memory); });
  }
};

} // namespace mmkernels
