// sigmoid_contrastive on the CPU: the loss and its gradients in one pass. The public function has checked the
// arguments.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>

#include <utility>

#include "gradient_launch.h"

namespace mmkernels {
namespace {

// The dtype that gradients are kept in until backward scales them: as `kept_dtype` in Python.
at::ScalarType kept_type(const Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

// The sum over pairs, divided by the number of images, and its gradients.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_contrastive(const Arguments& args) {
  Tensor image = args.tensor("image"), text = args.tensor("text");
  const Tensor &logit_scale = args.tensor("logit_scale"), &logit_bias = args.tensor("logit_bias");
  OptionalTensor image_ids = args.optional_tensor("image_ids"), text_ids = args.optional_tensor("text_ids");
  bool keep_image = args.flag("keep_image"), keep_text = args.flag("keep_text");
  const auto count = static_cast<double>(image.size(0));
  const bool swapped = better_swapped(image, text);
  if (swapped) {
    std::swap(image, text);
    std::swap(image_ids, text_ids);
    std::swap(keep_image, keep_text);
  }
  ContrastiveLaunch launch(image, text);
  ContrastiveParams& p = launch.p;
  launch.set_scale(logit_scale);
  TORCH_CHECK_VALUE(logit_bias.numel() == 1, "logit_bias must have one element");
  p.bias = static_cast<float>(logit_bias.item().toDouble());
  launch.set_ids(image_ids, text_ids, {}, false);
  p.sigmoid = true;
  p.factor = static_cast<float>(p.scale / count);
  Gradients gradients(launch, image, text, {}, {keep_image, keep_text, false}, kept_type(image));
  const GradientSums sums = gradients.run();
  const auto scalar = [&](const Tensor& x, double sum, bool need) {
    const Tensor grad = need ? at::detail::empty_cpu(x.sizes(), kept_type(x)) : gradients.none();
    return grad.fill_(sum / count);
  };
  Tensor of_image = gradients.of_image(), of_text = gradients.of_text();
  if (swapped) {
    std::swap(of_image, of_text);
  }
  const Tensor loss = at::detail::empty_cpu({}, at::kFloat);
  return {loss.fill_(sums.loss / count), of_image, of_text,
          scalar(logit_scale, sums.scale, args.flag("keep_logit_scale")),
          scalar(logit_bias, sums.bias, args.flag("keep_logit_bias"))};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("sigmoid_contrastive_cpu", by_name<sigmoid_contrastive>());
}

} // namespace mmkernels
