// A block of info_nce on the CPU: this process's images and some texts from anywhere; see
// ops/contrastive/info_nce/block.py. Images and texts are exchanged where the kernels had better take them so.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <utility>

#include "gradient_launch.h"
#include "softmax_launch.h"

namespace mmkernels {
namespace {

struct Inputs {
  Tensor image, text;
  OptionalTensor image_ids, text_ids;
  i64 first_text;
  bool swapped;
  ContrastiveLaunch launch;

  // `compared`: scores are compared with those of other blocks, whose counts must not matter to their last bits.
  Inputs(const Arguments& args, bool compared)
      : image(args.tensor("image")), text(args.tensor("text")), image_ids(args.optional_tensor("image_ids")),
        text_ids(args.optional_tensor("text_ids")),
        first_text(std::clamp<i64>(args.integer("first_text"), -INT32_MAX, INT32_MAX)), swapped(swap()),
        launch(image, text) {
    launch.p.few_images = launch.p.few_texts = !compared;
    launch.set_scale(args.tensor("logit_scale"));
    launch.set_partners(first_text);
    launch.set_ids(image_ids, text_ids, {}, args.flag("ignore"));
  }

  // Exchanges what belongs to the first and the second side of a block, if its images and texts are.
  template <typename T> void order(T& of_images, T& of_texts) const {
    if (swapped) {
      std::swap(of_images, of_texts);
    }
  }

private:
  bool swap() {
    if (!better_swapped(image, text)) {
      return false;
    }
    std::swap(image, text);
    std::swap(image_ids, text_ids);
    first_text = -first_text;
    return true;
  }
};

// Writes the sums of one direction, [6, count].
Tensor sums_of(const ContrastiveLaunch& launch, const DirectionState& rows, Direction direction, i64 count) {
  const Tensor sums = at::detail::empty_cpu({6, count}, at::kFloat);
  float* to = sums.mutable_data_ptr<float>();
  for (i64 i = 0; i < count; ++i) {
    to[i] = rows.reference[i];
    to[count + i] = rows.sum[i];
    to[2 * count + i] = static_cast<float>(launch.positives(direction, i));
    to[3 * count + i] = static_cast<float>(launch.classes(direction, i));
    to[4 * count + i] = rows.positives[i];
    to[5 * count + i] = rows.all.empty() ? 0.0f : rows.all[i];
  }
  return sums;
}

template <typename From> Tensor integers(const std::vector<From>& from, i64 count) {
  const Tensor x = at::detail::empty_cpu({count}, at::kLong);
  std::copy_n(from.begin(), count, x.mutable_data_ptr<i64>());
  return x;
}

// Takes the best positives of one direction from tensors. An index outside of the block keeps its order.
void set_best(DirectionState& rows, const OptionalTensor& best, const OptionalTensor& index, i64 count) {
  TORCH_CHECK_VALUE(best.has_value() && index.has_value(), "the best positives must all be given, or none");
  check_sizes("the best positives", *best, {count});
  check_sizes("the best positives' indices", *index, {count});
  const Tensor scores = best->to(at::kFloat).contiguous(), places = index->to(at::kLong).contiguous();
  std::copy_n(scores.const_data_ptr<float>(), count, rows.best.begin());
  std::transform(places.const_data_ptr<i64>(), places.const_data_ptr<i64>() + count, rows.index.begin(),
                 [](i64 place) { return static_cast<std::int32_t>(std::clamp<i64>(place, INT32_MIN, INT32_MAX)); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_best(const Arguments& args) {
  Inputs inputs(args, true);
  Softmaxes softmaxes(inputs.launch, false, true);
  softmaxes.find_best();
  const auto tensors = [](const DirectionState& rows, i64 count) {
    const Tensor best = at::detail::empty_cpu({count}, at::kFloat);
    std::copy_n(rows.best.begin(), count, best.mutable_data_ptr<float>());
    return std::pair(best, integers(rows.index, count));
  };
  auto of_images = tensors(softmaxes.images(), inputs.launch.p.image.count);
  auto of_texts = tensors(softmaxes.texts(), inputs.launch.p.text.count);
  inputs.order(of_images, of_texts);
  return {of_images.first, of_images.second, of_texts.first, of_texts.second};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_block(const Arguments& args) {
  auto of_images = std::pair(args.optional_tensor("image_best"), args.optional_tensor("image_index"));
  auto of_texts = std::pair(args.optional_tensor("text_best"), args.optional_tensor("text_index"));
  const bool ranks = of_images.first.has_value();
  Inputs inputs(args, ranks);
  inputs.order(of_images, of_texts);
  const i64 n = inputs.launch.p.image.count, m = inputs.launch.p.text.count;
  Softmaxes softmaxes(inputs.launch, args.flag("smooth"), ranks);
  DirectionState &images = softmaxes.images(), &texts = softmaxes.texts();
  if (ranks) {
    set_best(images, of_images.first, of_images.second, n);
    set_best(texts, of_texts.first, of_texts.second, m);
    softmaxes.share_best();
  }
  softmaxes.run();
  Tensor image_sums = sums_of(inputs.launch, images, Direction::image_to_text, n);
  Tensor text_sums = sums_of(inputs.launch, texts, Direction::text_to_image, m);
  Tensor image_before = integers(images.before, ranks ? n : 0), text_before = integers(texts.before, ranks ? m : 0);
  inputs.order(image_sums, text_sums);
  inputs.order(image_before, text_before);
  return {image_sums, text_sums, image_before, text_before};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_block_backward(const Arguments& args) {
  // The dots have the bits that are in the sums: where a probability is near 1, what they differ by does not cancel.
  Inputs inputs(args, args.flag("ranked"));
  Tensor image_state = args.tensor("image_state"), text_state = args.tensor("text_state");
  OptionalTensor grad_image_loss = args.optional_tensor("grad_image_loss"),
                 grad_text_loss = args.optional_tensor("grad_text_loss");
  bool need_image = args.flag("need_image"), need_text = args.flag("need_text");
  inputs.order(image_state, text_state);
  inputs.order(grad_image_loss, grad_text_loss);
  inputs.order(need_image, need_text);
  ContrastiveParams& p = inputs.launch.p;
  const double smoothing = args.number("label_smoothing");
  const LogitGradientArrays of_images(grad_image_loss, 0.0, image_state, p.image.count, smoothing);
  const LogitGradientArrays of_texts(grad_text_loss, 0.0, text_state, p.text.count, smoothing);
  p.of_images = of_images.pointers();
  p.of_texts = of_texts.pointers();
  p.factor = p.scale;
  p.middle = static_cast<float>(args.number("middle"));
  Gradients gradients(inputs.launch, inputs.image, inputs.text, {}, {need_image, need_text, false}, at::kFloat);
  const GradientSums sums = gradients.run();
  Tensor of_image = gradients.of_image(), of_text = gradients.of_text(), of_scale = gradients.none();
  if (args.flag("need_logit_scale")) {
    of_scale = at::detail::empty_cpu({}, at::kFloat).fill_(sums.scale);
  }
  inputs.order(of_image, of_text);
  return {of_image, of_text, of_scale};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("info_nce_best_cpu", by_name<info_nce_best>());
  m.impl("info_nce_block_cpu", by_name<info_nce_block>());
  m.impl("info_nce_block_backward_cpu", by_name<info_nce_block_backward>());
}

} // namespace mmkernels
