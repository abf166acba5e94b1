// One call of a contrastive op: its tensors as the plain data that the kernels take, and how the work is cut.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "../common/arguments.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "../common/work.h"
#include "params.h"

namespace mmkernels {

MMK_TABLES(ContrastiveKernels, contrastive_kernels)

constexpr double kLog2OfE = 1.4426950408889634, kLnOf2 = 0.6931471805599453;
constexpr i64 kAlign = 64;     // arrays are padded to this: whole panels of any instruction set
constexpr i64 kTaskRows = 16;  // tasks begin at multiples of this: whole vectors of any instruction set
constexpr i64 kLongTask = 512; // a second task for each thread has at least so many texts

// float32 [count], padded, each `value`.
inline std::vector<float> padded_array(i64 count, float value = 0.0f) {
  return std::vector<float>((count + kAlign - 1) / kAlign * kAlign, value);
}

// Small numbers in place of ids, equal where the ids are equal.
struct Labels {
  std::vector<std::int32_t> image, text, hard;                   // padded
  std::vector<std::int32_t> image_count, text_count, hard_count; // how many rows each label has
};

inline Labels labels_of(const Tensor& image_ids, const Tensor& text_ids, const OptionalTensor& hard_ids) {
  const Tensor images = image_ids.contiguous(), texts = text_ids.contiguous();
  const Tensor hards = hard_ids.has_value() ? hard_ids->contiguous() : images.slice(0, 0, 0);
  std::vector<i64> distinct;
  for (const Tensor& ids : {images, texts, hards}) {
    distinct.insert(distinct.end(), ids.const_data_ptr<i64>(), ids.const_data_ptr<i64>() + ids.numel());
  }
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  const auto label = [&](const Tensor& rows, std::vector<std::int32_t>& to, std::vector<std::int32_t>& counts) {
    const i64* ids = rows.const_data_ptr<i64>();
    const i64 count = rows.numel();
    counts.resize(distinct.size());
    to.resize((count + kAlign - 1) / kAlign * kAlign, -1);
    auto found = distinct.begin();
    for (i64 i = 0; i < count; ++i) {
      if (*found < ids[i] && found + 1 != distinct.end()) { // ids often rise
        ++found;
      }
      if (*found != ids[i]) {
        found = std::lower_bound(distinct.begin(), distinct.end(), ids[i]);
      }
      to[i] = static_cast<std::int32_t>(found - distinct.begin());
      ++counts[to[i]];
    }
  };
  Labels labels;
  label(images, labels.image, labels.image_count);
  label(texts, labels.text, labels.text_count);
  label(hards, labels.hard, labels.hard_count);
  return labels;
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

// Whether images and texts had better be exchanged: tasks are runs of texts, so that few texts give the threads too
// little to do.
inline bool better_swapped(const Tensor& image, const Tensor& text) {
  return image.dim() == 2 && text.dim() == 2 && text.size(0) * 4 < image.size(0) &&
         text.size(0) < 4 * kTaskRows * available_threads();
}

enum class Direction { image_to_text, text_to_image };

class ContrastiveLaunch {
public:
  ContrastiveParams p{};
  const ContrastiveKernels& k = contrastive_kernels(); // once: another thread may choose another instruction set
  std::vector<Task> tasks;
  int threads = 1;
  double scale_log2 = 0.0; // the scale times log2(e)

  ContrastiveLaunch(const Tensor& image, const Tensor& text, const char* image_name = "image",
                    const char* text_name = "text")
      : type_(image.scalar_type()) {
    TORCH_CHECK_VALUE((image.dim() == 2 || image.dim() == 3) && image.numel() > 0 && image.device().is_cpu(),
                      image_name, " must be [N, d] or [N, Q, d] on the CPU, and not empty, got ", image.sizes());
    p.image = features_of(image);
    p.queries = image.dim() == 3 ? image.size(1) : 1;
    p.dim = image.size(-1);
    p.text = texts_of(text_name, text);
    TORCH_CHECK_VALUE(p.text.count > 0, text_name, " must not be empty");
    TORCH_CHECK_VALUE(p.image.count < INT32_MAX && p.text.count < INT32_MAX, "there are too many rows");
  }

  void set_hard(const OptionalTensor& hard) {
    if (hard.has_value()) {
      p.hard = texts_of("hard_texts", *hard);
      TORCH_CHECK_VALUE(p.hard.count + p.text.count < INT32_MAX, "there are too many rows");
    }
  }

  // Each query's right answer, [N, d].
  void set_right(const Tensor& right) {
    p.right = texts_of("right", right);
    check_sizes("right", right, {p.image.count, p.dim});
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

  // Text j's partner is the image first_text + j; of a call with all pairs the image j.
  void set_partners(i64 first_text) {
    all_pairs_ = false;
    const i64 n = p.image.count, m = p.text.count;
    TORCH_CHECK_VALUE(n + m < INT32_MAX, "there are too many rows");
    p.first_text = first_text >= n || first_text <= -m ? n : first_text;
  }

  // After `set_hard` and `set_partners`.
  void set_ids(const OptionalTensor& image_ids, const OptionalTensor& text_ids, const OptionalTensor& hard_text_ids,
               bool ignore) {
    has_ids_ = image_ids.has_value();
    TORCH_CHECK_VALUE(has_ids_ == text_ids.has_value(), "image_ids and text_ids must both be given, or neither");
    TORCH_CHECK_VALUE((has_ids_ && !ignore) || !all_pairs_ || p.image.count == p.text.count,
                      "without ids, or to ignore theirs, there must be as many texts as images");
    TORCH_CHECK_VALUE(has_ids_ || !hard_text_ids.has_value(), "hard_text_ids must come with image_ids");
    if (has_ids_) {
      check_sizes("image_ids", *image_ids, {p.image.count});
      check_sizes("text_ids", *text_ids, {p.text.count});
      if (hard_text_ids.has_value()) {
        check_sizes("hard_text_ids", *hard_text_ids, {p.hard.count});
      }
      labels_ = labels_of(*image_ids, *text_ids, hard_text_ids);
      p.hard_label = hard_text_ids.has_value() ? labels_.hard.data() : nullptr;
      p.image_label = labels_.image.data();
      p.text_label = labels_.text.data();
      p.ignore = ignore;
    }
  }

  // How many positives row i of a direction has, and how many columns its softmax compares.
  i64 positives(Direction direction, i64 i) const {
    return !has_ids_ || p.ignore ? (partner(direction, i) >= 0 ? 1 : 0) : same_label(direction, i);
  }
  i64 rows_with_positive(Direction direction) const {
    const i64 count = direction == Direction::image_to_text ? p.image.count : p.text.count;
    if (!has_ids_ || p.ignore) {
      return count;
    }
    i64 rows = 0;
    for (i64 i = 0; i < count; ++i) {
      rows += same_label(direction, i) > 0;
    }
    return rows;
  }
  i64 classes(Direction direction, i64 i) const {
    const i64 columns = direction == Direction::image_to_text ? p.text.count + p.hard.count : p.image.count;
    if (!has_ids_ || !p.ignore) {
      return columns;
    }
    const i64 other = partner(direction, i);
    const bool of_image = direction == Direction::image_to_text;
    const i64 image = of_image ? i : other, text = of_image ? other : i;
    return columns - same_label(direction, i) + (other >= 0 && labels_.image[image] == labels_.text[text] ? 1 : 0);
  }

  // `products`: how many matrix products of all pairs there are.
  void choose_threads(double products) {
    threads = threads_for(products * 2.0 * p.image.count * p.queries * (p.text.count + p.hard.count) * p.dim);
  }
  // Cuts the texts into tasks, of which each keeps `bytes_of_task`: so many that all keep at most `bytes`, or one for
  // each thread.
  void cut_tasks(double products, i64 bytes_of_task, i64 bytes) {
    choose_threads(products);
    const i64 rows = p.text.count + p.hard.count;
    // Where tasks are long, two for each thread balance what other processes take of the cores.
    i64 wanted = threads == 1 ? 1 : (rows >= 2 * threads * kLongTask ? 2 * threads : threads);
    if (bytes_of_task > 0) {
      wanted = std::clamp<i64>(bytes / bytes_of_task, std::min<i64>(threads, wanted), wanted);
    }
    const i64 each = std::max<i64>((rows + wanted - 1) / wanted + kTaskRows - 1, kTaskRows) / kTaskRows * kTaskRows;
    for (const bool hard : {false, true}) {
      const i64 count = hard ? p.hard.count : p.text.count;
      for (i64 first = 0; first < count; first += each) {
        tasks.push_back({hard, first, std::min(count, first + each)});
      }
    }
  }
  // Calls run(task, its index, scratch of so many bytes) for each task, and counts the products.
  void run_tasks(i64 scratch_bytes, const std::function<void(const Task&, i64, char*)>& run) const {
    parallel_tasks(static_cast<i64>(tasks.size()), threads, scratch_bytes, [&](i64 i, char* scratch) {
      run(tasks[i], i, scratch);
      multiplied() += k.take_multiplied();
    });
  }

private:
  Features texts_of(const char* name, const Tensor& x) const {
    check_sizes(name, x, {-1, p.dim});
    TORCH_CHECK_TYPE(x.scalar_type() == type_, name, " must have the dtype ", type_);
    return features_of(x);
  }
  // The column that row i's partner is; -1: it has none.
  i64 partner(Direction direction, i64 i) const {
    const bool of_image = direction == Direction::image_to_text;
    const i64 other = of_image ? i - p.first_text : i + p.first_text, count = of_image ? p.text.count : p.image.count;
    return other >= 0 && other < count ? other : -1;
  }
  // How many columns have the label of row i.
  i64 same_label(Direction direction, i64 i) const {
    if (direction == Direction::text_to_image) {
      return labels_.image_count[labels_.text[i]];
    }
    const std::int32_t label = labels_.image[i];
    return static_cast<i64>(labels_.text_count[label]) + labels_.hard_count[label];
  }

  at::ScalarType type_;
  Labels labels_;
  bool has_ids_ = false, all_pairs_ = true;
};

} // namespace mmkernels
