// info_nce on the CPU: the rows' losses and states, and the features' gradients; both with the reduction to one number,
// as ops/contrastive/info_nce/reduction.py defines it. The public function has checked the arguments.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>

#include <utility>

#include "gradient_launch.h"
#include "softmax_launch.h"

namespace mmkernels {
namespace {

// The arguments of both passes. `swapped`: images and texts are exchanged, and so must be what comes back.
struct Inputs {
  Tensor image, text, logit_scale;
  OptionalTensor image_ids, text_ids, hard_texts, hard_text_ids;
  bool ignore, swapped, reduced, mean;
  double label_smoothing, image_weight;

  explicit Inputs(const Arguments& args)
      : image(args.tensor("image")), text(args.tensor("text")), logit_scale(args.tensor("logit_scale")),
        image_ids(args.optional_tensor("image_ids")), text_ids(args.optional_tensor("text_ids")),
        hard_texts(args.optional_tensor("hard_texts")), hard_text_ids(args.optional_tensor("hard_text_ids")),
        ignore(args.flag("ignore")), swapped(!hard_texts.has_value() && better_swapped(image, text)),
        reduced(args.text("reduction") != "none"), mean(args.text("reduction") == "mean"),
        label_smoothing(args.number("label_smoothing")), image_weight(args.number("image_weight")) {
    if (swapped) {
      std::swap(image, text);
      std::swap(image_ids, text_ids);
      image_weight = 1.0 - image_weight;
    }
  }

  ContrastiveLaunch launch() const {
    ContrastiveLaunch launch(image, text);
    launch.set_scale(logit_scale);
    launch.set_hard(hard_texts);
    launch.set_ids(image_ids, text_ids, hard_text_ids, ignore);
    return launch;
  }

  // What each row's loss is multiplied by in the reduced loss. Of a mean only rows that have a positive count.
  double row_weight(const ContrastiveLaunch& launch, Direction direction) const {
    if (!reduced) {
      return 0.0;
    }
    const bool of_images = direction == Direction::image_to_text;
    const double weight = of_images ? image_weight : 1.0 - image_weight;
    return mean ? weight / std::max<i64>(launch.rows_with_positive(direction), 1) : weight;
  }
};

// A dot's logit in base 2, as the kernels compute it (power_of).
double logit_of(const ContrastiveLaunch& launch, double dot) {
  const double rounded = static_cast<float>(static_cast<float>(dot) * launch.p.high),
               rest = dot * launch.scale_log2 - rounded;
  return std::abs(rounded) > (1 << 22) && std::abs(rest) > 0.75 ? rounded : dot * launch.scale_log2;
}

// What the op returns for one direction: loss [count], state [4, count], ranks [count] or [0]; and the sum of losses.
struct Rows {
  Tensor loss, state, ranks;
  double total;
};

// A row without a positive has the rank -1; one whose best positive is NaN ranks behind all its negatives.
Tensor ranks_of(const ContrastiveLaunch& launch, const DirectionState& rows, Direction direction, i64 count) {
  const Tensor ranks = at::detail::empty_cpu({rows.best.empty() ? 0 : count}, at::kLong);
  i64* to = ranks.mutable_data_ptr<i64>();
  for (i64 i = 0; i < ranks.numel(); ++i) {
    const i64 positives = launch.positives(direction, i), negatives = launch.classes(direction, i) - positives;
    to[i] = positives == 0 ? -1 : (std::isnan(rows.best[i]) ? negatives : rows.before[i]);
  }
  return ranks;
}

Rows rows_of(const ContrastiveLaunch& launch, const DirectionState& rows, Direction direction, i64 count,
             double smoothing) {
  const Tensor loss = at::detail::empty_cpu({count}, at::kFloat), state = at::detail::empty_cpu({4, count}, at::kFloat);
  float *to_loss = loss.mutable_data_ptr<float>(), *to_state = state.mutable_data_ptr<float>();
  double total = 0.0;
  for (i64 i = 0; i < count; ++i) {
    const i64 positives = launch.positives(direction, i), classes = launch.classes(direction, i);
    // In double: both terms may be near 100 and their difference near 0.
    double target = (1.0 - smoothing) * rows.positives[i] / static_cast<double>(std::max<i64>(positives, 1));
    if (smoothing > 0.0) {
      target += smoothing * rows.all[i] / static_cast<double>(classes);
    }
    target = logit_of(launch, target);
    const double lse = rows.reference[i] + std::log2(static_cast<double>(rows.sum[i]));
    // A cross-entropy is at least 0, and 0 for a single class: anything else is rounding, but NaN stays.
    const double cross_entropy = kLnOf2 * (lse - target) * (classes == 1 ? 0.0 : 1.0);
    to_loss[i] = positives > 0 && !(cross_entropy <= 0.0) ? static_cast<float>(cross_entropy) : 0.0f;
    total += to_loss[i];
    to_state[i] = rows.reference[i];
    to_state[count + i] = rows.sum[i];
    to_state[2 * count + i] = static_cast<float>(positives);
    to_state[3 * count + i] = static_cast<float>(classes);
  }
  return {loss, state, ranks_of(launch, rows, direction, count), total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(const Arguments& args) {
  const Inputs inputs(args);
  const bool ranks = args.flag("stats"), smooth = inputs.label_smoothing > 0.0;
  ContrastiveLaunch launch = inputs.launch();
  const i64 n = launch.p.image.count, m = launch.p.text.count;
  Softmaxes softmaxes(launch, smooth, ranks);
  if (ranks) {
    softmaxes.find_best();
  }
  softmaxes.run();
  Rows of_images = rows_of(launch, softmaxes.images(), Direction::image_to_text, n, inputs.label_smoothing);
  Rows of_texts = rows_of(launch, softmaxes.texts(), Direction::text_to_image, m, inputs.label_smoothing);
  const Tensor loss = at::detail::empty_cpu({}, at::kFloat);
  *loss.mutable_data_ptr<float>() =
      inputs.reduced ? static_cast<float>(inputs.row_weight(launch, Direction::image_to_text) * of_images.total +
                                          inputs.row_weight(launch, Direction::text_to_image) * of_texts.total)
                     : 0.0f;
  if (inputs.swapped) {
    std::swap(of_images, of_texts);
  }
  return {loss, of_images.loss, of_texts.loss, of_images.state, of_texts.state, of_images.ranks, of_texts.ranks};
}

// A typical dot. Each row's gradients by its logits sum to 0, so that the scale's gradient may measure dots from any
// point; this one lies between the mean of a row's dots and the largest.
float middle_dot(const ContrastiveLaunch& launch, const LogitGradientArrays& gradient, const Tensor& state) {
  const i64 count = state.size(1);
  const Tensor wide_state = state.to(at::kFloat).contiguous();
  const float* of = wide_state.const_data_ptr<float>();
  double total = 0.0, counted = 0.0;
  for (i64 i = 0; i < count; ++i) {
    if (gradient.of_softmax[i] != 0.0f) {
      total += of[i] + std::log2(static_cast<double>(of[count + i]) / of[3 * count + i]);
      counted += 1.0;
    }
  }
  const float middle = static_cast<float>(total / (counted * launch.scale_log2));
  return std::isfinite(middle) ? middle : 0.0f;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward(const Arguments& args) {
  const Inputs inputs(args);
  Tensor image_state = args.tensor("image_state"), text_state = args.tensor("text_state");
  OptionalTensor grad_image_loss = args.optional_tensor("grad_image_loss"),
                 grad_text_loss = args.optional_tensor("grad_text_loss");
  bool need_image = args.flag("need_image"), need_text = args.flag("need_text");
  if (inputs.swapped) {
    std::swap(image_state, text_state);
    std::swap(grad_image_loss, grad_text_loss);
    std::swap(need_image, need_text);
  }
  ContrastiveLaunch launch = inputs.launch();
  ContrastiveParams& p = launch.p;
  const OptionalTensor grad_loss = args.optional_tensor("grad_loss");
  const double grad_reduced = grad_loss.has_value() ? grad_loss->item().toDouble() : 0.0;
  const LogitGradientArrays of_images(grad_image_loss,
                                      grad_reduced * inputs.row_weight(launch, Direction::image_to_text), image_state,
                                      p.image.count, inputs.label_smoothing);
  const LogitGradientArrays of_texts(grad_text_loss, grad_reduced * inputs.row_weight(launch, Direction::text_to_image),
                                     text_state, p.text.count, inputs.label_smoothing);
  p.of_images = of_images.pointers();
  p.of_texts = of_texts.pointers();
  p.factor = p.scale;
  if (!of_images.reference.empty()) {
    p.middle = middle_dot(launch, of_images, image_state);
  } else if (!of_texts.reference.empty()) {
    p.middle = middle_dot(launch, of_texts, text_state);
  }
  Gradients gradients(launch, inputs.image, inputs.text, inputs.hard_texts,
                      {need_image, need_text, args.flag("need_hard_texts")}, inputs.image.scalar_type());
  const GradientSums sums = gradients.run();
  Tensor of_image = gradients.of_image(), of_text = gradients.of_text(), of_scale = gradients.none();
  if (args.flag("need_logit_scale")) {
    const Tensor& scale = inputs.logit_scale;
    of_scale = at::detail::empty_cpu(scale.sizes(), scale.scalar_type()).fill_(sums.scale);
  }
  if (inputs.swapped) {
    std::swap(of_image, of_text);
  }
  return {of_image, of_text, of_scale, gradients.of_hard()};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("info_nce_cpu", by_name<info_nce>());
  m.impl("info_nce_backward_cpu", by_name<info_nce_backward>());
}

} // namespace mmkernels
