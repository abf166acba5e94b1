// sigmoid_contrastive on the CPU: the loss and its gradients in one pass. The public function has checked the
// arguments.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <utility>

#include "gradient_launch.h"

namespace mmkernels {
namespace {

// The dtype that gradients are kept in until backward scales them: as `kept_dtype` in Python.
at::ScalarType kept_type(const Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

// The sum over pairs and its gradients, all divided by `divisor`.
struct Sums {
  Tensor loss, of_image, of_text; // empty where not kept
  double of_scale, of_bias;
};

// `type`: of the features' gradients. `first_text`: of a block, see `ContrastiveParams::first_text`.
Sums sums_of(const Arguments& args, double divisor, at::ScalarType type, std::optional<i64> first_text) {
  Tensor image = args.tensor("image"), text = args.tensor("text");
  const Tensor &logit_scale = args.tensor("logit_scale"), &logit_bias = args.tensor("logit_bias");
  OptionalTensor image_ids = args.optional_tensor("image_ids"), text_ids = args.optional_tensor("text_ids");
  bool keep_image = args.flag("keep_image"), keep_text = args.flag("keep_text");
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
  if (first_text.has_value()) {
    const i64 first = std::clamp<i64>(*first_text, -INT32_MAX, INT32_MAX);
    launch.set_partners(swapped ? -first : first);
  }
  launch.set_ids(image_ids, text_ids, {}, false);
  p.sigmoid = true;
  p.factor = static_cast<float>(p.scale / divisor);
  Gradients gradients(launch, image, text, {}, {keep_image, keep_text, false}, type);
  const GradientSums sums = gradients.run();
  Tensor of_image = gradients.of_image(), of_text = gradients.of_text();
  if (swapped) {
    std::swap(of_image, of_text);
  }
  const Tensor loss = at::detail::empty_cpu({}, at::kFloat);
  return {loss.fill_(sums.loss / divisor), of_image, of_text, sums.scale / divisor, sums.bias / divisor};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results sigmoid_contrastive(const Arguments& args) {
  const Tensor& image = args.tensor("image");
  const Sums sums = sums_of(args, static_cast<double>(image.size(0)), kept_type(image), {});
  const auto scalar = [&](const char* name, double sum, bool keep) {
    const Tensor& x = args.tensor(name);
    return keep ? at::detail::empty_cpu(x.sizes(), kept_type(x)).fill_(sum)
                : at::detail::empty_cpu({0}, kept_type(image));
  };
  return {sums.loss, sums.of_image, sums.of_text, scalar("logit_scale", sums.of_scale, args.flag("keep_logit_scale")),
          scalar("logit_bias", sums.of_bias, args.flag("keep_logit_bias"))};
}

Results sigmoid_contrastive_block(const Arguments& args) {
  const Sums sums = sums_of(args, args.number("divisor"), at::kFloat, args.integer("first_text"));
  const auto scalar = [](double sum, bool keep) {
    return keep ? at::detail::empty_cpu({}, at::kFloat).fill_(sum) : at::detail::empty_cpu({0}, at::kFloat);
  };
  return {sums.loss, sums.of_image, sums.of_text, scalar(sums.of_scale, args.flag("keep_logit_scale")),
          scalar(sums.of_bias, args.flag("keep_logit_bias"))};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("sigmoid_contrastive_cpu", by_name<sigmoid_contrastive>());
  m.impl("sigmoid_contrastive_block_cpu", by_name<sigmoid_contrastive_block>());
}

} // namespace mmkernels
