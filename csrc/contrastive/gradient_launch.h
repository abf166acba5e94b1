// The gradients of a contrastive loss: strips of images one after the other, the texts shared out to the threads. No
// two threads add to the same element: each task has its texts, and its part of the strip's gradient.
#pragma once

#include <ATen/EmptyTensor.h>

#include <array>

#include "launch.h"

namespace mmkernels {

class Gradients {
public:
  // What is needed: the gradients of image, text and hard texts, in the dtype `type`.
  Gradients(ContrastiveLaunch& launch, const Tensor& image, const Tensor& text, const OptionalTensor& hard,
            std::array<bool, 3> needs, at::ScalarType type)
      : launch_(launch), type_(type) {
    const auto [need_image, need_text, need_hard] = needs;
    products_ = 1.0 + need_image + (need_text || need_hard);
    launch.p.need_image = need_image;
    image_ = need_image ? expect_writes(at::detail::empty_cpu(image.sizes(), type_)) : none();
    add_rows(false, need_text, text);
    add_rows(true, need_hard && hard.has_value(), hard.has_value() ? *hard : text);
  }

  GradientSums run() {
    const ContrastiveParams& p = launch_.p;
    const ContrastiveKernels& k = launch_.k;
    const i64 part = p.need_image ? k.part_floats(p) : 0;
    launch_.cut_tasks(products_, part * 4, 1 << 25);
    const i64 count = static_cast<i64>(launch_.tasks.size());
    const bool products = p.need_image || p.need_rows[false] || p.need_rows[true];
    const i64 panels = k.panels_bytes(p), rows = products ? k.rows_bytes(p) : 0, scratch_bytes = k.gradient_scratch(p);
    const Workspace memory(panels + rows + count * part * 4);
    float* packed = reinterpret_cast<float*>(memory.data());
    float* parts = reinterpret_cast<float*>(memory.data() + panels + rows);
    char* packed_rows = products ? memory.data() + panels : nullptr;
    std::vector<GradientSums> sums(count);
    const i64 lanes = k.strip_lanes(p);
    for (i64 first = 0; first < p.image.count; first += lanes) {
      const Strip strip{first, std::min(lanes, p.image.count - first), packed, packed_rows};
      parallel_tasks(k.pieces(p), launch_.threads, scratch_bytes,
                     [&](i64 piece, char* scratch) { k.pack(p, strip, piece, packed, packed_rows, scratch); });
      launch_.run_tasks(scratch_bytes, [&](const Task& task, i64 i, char* scratch) {
        k.gradient(p, strip, task, first == 0, parts + i * part, sums[i], scratch);
      });
      if (p.need_image) {
        in_shares(strip.count, [&](i64 begin, i64 end) {
          k.merge(p, strip, parts, count, begin, end, type_of(image_), static_cast<char*>(image_.mutable_data_ptr()));
        });
      }
    }
    convert_rows();
    GradientSums total;
    for (const GradientSums& x : sums) {
      total.loss += x.loss;
      total.scale += x.scale;
      total.bias += x.bias;
    }
    return total;
  }

  // Empty where not needed.
  const Tensor& of_image() const {
    return image_;
  }
  const Tensor& of_text() const {
    return rows_[false];
  }
  const Tensor& of_hard() const {
    return rows_[true];
  }
  Tensor none() const {
    return at::detail::empty_cpu({0}, type_);
  }

private:
  // The gradient of texts, and its float32 sums: the gradient itself, or separate memory.
  void add_rows(bool hard, bool need, const Tensor& texts) {
    launch_.p.need_rows[hard] = need;
    rows_[hard] = need ? expect_writes(at::detail::empty_cpu(texts.sizes(), type_)) : none();
    if (need) {
      sums_[hard] = type_ == at::kFloat ? rows_[hard] : expect_writes(at::detail::empty_cpu(texts.sizes(), at::kFloat));
      launch_.p.grad_rows[hard] = sums_[hard].mutable_data_ptr<float>();
    }
  }

  void convert_rows() {
    const ContrastiveParams& p = launch_.p;
    for (const bool hard : {false, true}) {
      if (!p.need_rows[hard] || sums_[hard].is_same(rows_[hard])) {
        continue;
      }
      const i64 row_bytes = p.dim * static_cast<i64>(rows_[hard].element_size());
      char* to = static_cast<char*>(rows_[hard].mutable_data_ptr());
      in_shares(rows_[hard].size(0), [&](i64 begin, i64 end) {
        launch_.k.convert(p, p.grad_rows[hard] + begin * p.dim, end - begin, type_of(rows_[hard]),
                          to + begin * row_bytes);
      });
    }
  }

  // Calls run(begin, end) for equal shares of `count` rows, one for each thread.
  template <typename F> void in_shares(i64 count, const F& run) const {
    const i64 share = (count + launch_.threads - 1) / launch_.threads;
    parallel_tasks(share == 0 ? 0 : (count + share - 1) / share, launch_.threads, 0,
                   [&](i64 i, char*) { run(i * share, std::min(count, (i + 1) * share)); });
  }

  ContrastiveLaunch& launch_;
  at::ScalarType type_;
  double products_;
  Tensor image_, rows_[2], sums_[2]; // [2]: of the batch's texts, of hard texts
};

} // namespace mmkernels
