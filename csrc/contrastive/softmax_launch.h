// The softmaxes of both directions on the CPU: the state of rows over all tasks, and the weights of their gradients.
#pragma once

#include "launch.h"

namespace mmkernels {

// Running state of one direction's rows: of all texts, or of all images for one task.
struct DirectionState {
  std::vector<float> reference, sum, positives, all, best;
  std::vector<std::int32_t> index, before;

  DirectionState(i64 count, bool smooth, bool ranks)
      : reference(padded_array(count, -INFINITY)), sum(padded_array(count)), positives(padded_array(count)),
        all(padded_array(smooth ? count : 0)), best(padded_array(ranks ? count : 0, -INFINITY)), index(best.size()),
        before(best.size()) {}

  Sums sums() {
    return {reference.data(), sum.data(), positives.data(), all.empty() ? nullptr : all.data()};
  }
  Ranks ranks() {
    return best.empty() ? Ranks{} : Ranks{best.data(), index.data(), before.data()};
  }

  // Adds another task's state of the same images.
  void add(const DirectionState& other, i64 count) {
    for (i64 i = 0; i < count; ++i) {
      const float top = std::max(reference[i], other.reference[i]), base = top == -INFINITY ? 0.0f : top;
      sum[i] = sum[i] * std::exp2(reference[i] - base) + other.sum[i] * std::exp2(other.reference[i] - base);
      reference[i] = top;
      positives[i] += other.positives[i];
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i] += other.all[i];
    }
    for (std::size_t i = 0; i < before.size(); ++i) {
      before[i] += other.before[i];
    }
  }
  // Takes another task's better positives; its texts come after this one's, so that the first of equals stays.
  void add_best(const DirectionState& other) {
    for (std::size_t i = 0; i < best.size(); ++i) {
      if (other.best[i] > best[i] || std::isnan(other.best[i])) {
        best[i] = other.best[i];
        index[i] = other.index[i];
      }
    }
  }
};

// Both directions' sums over all pairs of a call.
class Softmaxes {
public:
  // After the launch has everything but its tasks. `smooth`: sums of all dots are wanted.
  Softmaxes(ContrastiveLaunch& launch, bool smooth, bool ranks)
      : launch_(launch), texts_(launch.p.text.count, smooth, ranks) {
    ContrastiveParams& p = launch_.p;
    const i64 n = p.image.count;
    launch_.cut_tasks(1.0, n * (12 + (smooth ? 4 : 0) + (ranks ? 12 : 0)), 1 << 25);
    images_.assign(launch_.tasks.size(), DirectionState(n, smooth, ranks));
    p.text_sums = texts_.sums();
    p.text_ranks = texts_.ranks();
    scratch_bytes_ = launch_.k.softmax_scratch(p);
  }

  // Finds the best positive of each row, for all tasks.
  void find_best() {
    launch_.run_tasks(scratch_bytes_, [&](const Task& task, i64 i, char* scratch) {
      launch_.k.best_positives(launch_.p, task, images_[i].ranks(), scratch);
    });
    for (std::size_t i = 1; i < images_.size(); ++i) {
      images_[0].add_best(images_[i]);
    }
    share_best();
  }
  // Gives the first task's best positives to all tasks.
  void share_best() {
    for (std::size_t i = 1; i < images_.size(); ++i) {
      images_[i].best = images_[0].best;
      images_[i].index = images_[0].index;
    }
  }
  void run() {
    launch_.run_tasks(scratch_bytes_, [&](const Task& task, i64 i, char* scratch) {
      launch_.k.softmax(launch_.p, task, images_[i].sums(), images_[i].ranks(), scratch);
    });
    for (std::size_t i = 1; i < images_.size(); ++i) {
      images_[0].add(images_[i], launch_.p.image.count);
    }
  }

  DirectionState& images() {
    return images_[0];
  }
  DirectionState& texts() {
    return texts_;
  }

private:
  ContrastiveLaunch& launch_;
  DirectionState texts_;
  std::vector<DirectionState> images_; // one for each task
  i64 scratch_bytes_ = 0;
};

// The weights of one direction's gradients by its logits; empty where no gradient flows to it.
struct LogitGradientArrays {
  std::vector<float> reference, of_softmax, of_positive, of_class;

  // grad: of each row's loss, [count], to which `each` is added; state: the forward pass's, [4, count].
  LogitGradientArrays(const OptionalTensor& grad, double each, const Tensor& state, i64 count, double smoothing) {
    check_sizes("state", state, {4, count});
    if (!grad.has_value() && each == 0.0) {
      return;
    }
    const Tensor wide_state = state.to(at::kFloat).contiguous();
    const float* of = wide_state.const_data_ptr<float>();
    const float *references = of, *sums = of + count, *positives = of + 2 * count, *classes = of + 3 * count;
    Tensor wide_grad;
    const float* grads = nullptr;
    if (grad.has_value()) {
      check_sizes("the losses' gradient", *grad, {count});
      wide_grad = grad->to(at::kFloat).contiguous();
      grads = wide_grad.const_data_ptr<float>();
    }
    reference = padded_array(count);
    of_softmax = padded_array(count);
    of_positive = padded_array(count);
    of_class = padded_array(smoothing > 0.0 ? count : 0);
    for (i64 i = 0; i < count; ++i) {
      // A single class has the probability 1, whatever its logit.
      const double weight = positives[i] > 0.0f && classes[i] > 1.0f ? each + (grads == nullptr ? 0.0 : grads[i]) : 0.0;
      // Kernels need a whole reference; another backend's state may have another.
      reference[i] = std::nearbyint(references[i]);
      of_softmax[i] =
          static_cast<float>(weight / sums[i] * std::exp2(static_cast<double>(reference[i]) - references[i]));
      of_positive[i] = static_cast<float>((1.0 - smoothing) * weight / std::max(positives[i], 1.0f));
      if (smoothing > 0.0) {
        of_class[i] = static_cast<float>(smoothing * weight / classes[i]);
      }
    }
  }
  LogitGradient pointers() const {
    const auto data = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
    return {data(reference), data(of_softmax), data(of_positive), data(of_class)};
  }
};

} // namespace mmkernels
