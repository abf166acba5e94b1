// The gradients of a contrastive loss: strips of images one after the other, the texts shared out to threads. Nothing
// is added to by two threads: each task has its own texts, and its own part of the strip's gradient.
#pragma once

#include <ATen/EmptyTensor.h>

#include <array>

#include "call.h"

namespace mmkernels {

class Gradients {
public:
  // needs: of image, text, hard texts; type: the results'.
  Gradients(PairCall& call, const Tensor& image, const Tensor& text, const OptionalTensor& hard,
            std::array<bool, 3> needs, at::ScalarType type)
      : call_(call), type_(type), products_(1.0 + needs[0] + (needs[1] || needs[2])) {
    PairProblem& p = call.p;
    p.need_image = needs[0];
    p.need_rows[0] = needs[1];
    p.need_rows[1] = needs[2] && hard.has_value();
    image_ = made(image, needs[0]);
    for (int side = 0; side < 2; ++side) {
      rows_[side] = p.need_rows[side] ? made(side == 0 ? text : *hard, true) : none();
      if (!p.need_rows[side]) {
        continue;
      }
      // Sums are float32: the result itself, or memory of their own.
      sums_[side] = type_ == at::kFloat ? rows_[side] : at::detail::empty_cpu(rows_[side].sizes(), at::kFloat);
      expect_writes(sums_[side].mutable_data_ptr(), static_cast<i64>(sums_[side].nbytes()));
      p.grad_rows[side] = sums_[side].mutable_data_ptr<float>();
    }
  }

  GradientSums run() {
    const PairProblem& p = call_.p;
    const PairKernels& k = call_.k;
    const i64 part = p.need_image ? k.part_floats(p) : 0;
    call_.cut(products_, part * 4, 1 << 25);
    const i64 count = static_cast<i64>(call_.tasks.size());
    const bool products = p.need_image || p.need_rows[0] || p.need_rows[1];
    const i64 panels = k.panels_bytes(p), rows = products ? k.rows_bytes(p) : 0, scratch = k.gradient_scratch(p);
    const Workspace memory(panels + rows + count * part * 4);
    char* base = memory.data();
    float *packed = reinterpret_cast<float*>(base), *parts = reinterpret_cast<float*>(base + panels + rows);
    char* packed_rows = products ? base + panels : nullptr;
    std::vector<GradientSums> sums(count);
    const i64 lanes = k.strip_lanes(p);
    for (i64 first = 0; first < p.image.count; first += lanes) {
      const Strip strip{first, std::min(lanes, p.image.count - first), packed, packed_rows};
      parallel_tasks(k.pieces(p), call_.threads, scratch,
                     [&](i64 piece, char* own) { k.pack(p, strip, piece, packed, packed_rows, own); });
      call_.run(scratch, [&](const Task& task, i64 i, char* own) {
        k.gradient(p, strip, task, first == 0, parts + i * part, sums[i], own);
        multiplied() += k.take_multiplied();
      });
      if (p.need_image) {
        const i64 share = (strip.count + call_.threads - 1) / call_.threads;
        parallel_tasks((strip.count + share - 1) / share, call_.threads, 0, [&](i64 i, char*) {
          k.merge(p, strip, parts, count, i * share, std::min(strip.count, (i + 1) * share), type_of(image_),
                  static_cast<char*>(image_.mutable_data_ptr()));
        });
      }
    }
    for (int side = 0; side < 2; ++side) {
      if (p.need_rows[side] && !sums_[side].is_same(rows_[side])) {
        const i64 total = rows_[side].size(0), share = (total + call_.threads - 1) / call_.threads;
        const i64 size = static_cast<i64>(rows_[side].element_size());
        char* to = static_cast<char*>(rows_[side].mutable_data_ptr());
        parallel_tasks(share == 0 ? 0 : (total + share - 1) / share, call_.threads, 0, [&](i64 i, char*) {
          const i64 begin = i * share;
          k.convert(p, p.grad_rows[side] + begin * p.dim, std::min(share, total - begin), type_of(rows_[side]),
                    to + begin * p.dim * size);
        });
      }
    }
    GradientSums total;
    for (const GradientSums& x : sums) {
      total.loss += x.loss;
      total.scale += x.scale;
      total.bias += x.bias;
    }
    return total;
  }

  Tensor of_image() const {
    return image_;
  }
  Tensor of_text() const {
    return rows_[0];
  }
  Tensor of_hard() const {
    return rows_[1];
  }
  Tensor none() const {
    return at::detail::empty_cpu({0}, type_);
  }

private:
  Tensor made(const Tensor& x, bool wanted) const {
    if (!wanted) {
      return none();
    }
    const Tensor grad = at::detail::empty_cpu(x.sizes(), type_);
    expect_writes(grad.mutable_data_ptr(), static_cast<i64>(grad.nbytes()));
    return grad;
  }

  PairCall& call_;
  at::ScalarType type_;
  double products_;
  Tensor image_, rows_[2], sums_[2];
};

} // namespace mmkernels
