// linear_gradients on the CPU: the gradients of hidden states, weight and bias from each token's states over all words;
// see ops/linear/rows.py, whose callers have checked the arguments.
#include "products_launch.h"

namespace mmkernels {
namespace {

constexpr i64 kStripBytes = i64(32) << 20; // of the logits' gradient, where columns are shared out

// [kGradientRows, padded] of all tokens that take part; padding has no probability.
// `softmax`: a reference m and the log of the sum of exp(y - m), by which exp(y - m) is still to be divided.
std::vector<float> gradient_rows(const LinearParams& p, const Tensor& softmax, const Tensor& rows) {
  const i64 stride = padded(p.tokens), count = softmax.size(1);
  std::vector<float> to(kGradientRows * stride, 0.0f);
  std::fill_n(to.begin() + kBase * stride, stride, std::numeric_limits<float>::infinity());
  const Tensor wide_softmax = wide_and_dense(softmax), wide_rows = wide_and_dense(rows);
  const float *of_softmax = wide_softmax.const_data_ptr<float>(), *from = wide_rows.const_data_ptr<float>();
  for (i64 token = 0; token < p.tokens; ++token) {
    const i64 row = p.live[token];
    const double log_sum = of_softmax[count + row], share = std::exp(-log_sum);
    const double of_entropy = p.entropy ? from[count + row] : 0.0;
    to[kBase * stride + token] = of_softmax[row];
    to[kOfProbability * stride + token] = static_cast<float>((from[row] - of_entropy * log_sum) * share);
    to[kOfEntropy * stride + token] = static_cast<float>(of_entropy * share);
    to[kOfTarget * stride + token] = from[2 * count + row];
    to[kOfWords * stride + token] = from[3 * count + row];
  }
  return to;
}

std::tuple<Tensor, Tensor, Tensor> linear_gradients(const Arguments& args) {
  const Tensor &hidden = args.tensor("hidden"), &weight = args.tensor("weight");
  const OptionalTensor bias = args.optional_tensor("bias");
  LinearLaunch launch(hidden, weight, bias, args.tensor("target"), args.optional_tensor("token_weight"));
  LinearParams& p = launch.p;
  const Tensor &softmax = args.tensor("softmax"), &rows = args.tensor("rows");
  check_sizes("softmax", softmax, {2, launch.rows()});
  check_sizes("rows", rows, {4, launch.rows()});
  p.softcap = static_cast<float>(args.number("softcap"));
  p.temperature = static_cast<float>(args.number("temperature"));
  p.entropy = args.flag("entropy");
  const bool wide = args.flag("wide"), need_hidden = args.flag("need_hidden"), need_weight = args.flag("need_weight"),
             need_bias = args.flag("need_bias") && bias.has_value();
  launch.choose_threads(1.0 + need_hidden + need_weight);
  const auto empty = [](bool need, at::IntArrayRef sizes, at::ScalarType type) {
    return expect_writes(at::detail::empty_cpu(need ? sizes : at::IntArrayRef{0}, type));
  };
  const Tensor of_hidden = empty(need_hidden, hidden.sizes(), wide ? at::kFloat : hidden.scalar_type());
  const Tensor of_weight = empty(need_weight, weight.sizes(), weight.scalar_type());
  const Tensor bias_sums = empty(need_bias, {p.words}, at::kFloat);
  if (need_hidden) {
    clear_ignored(launch, of_hidden);
  }
  if (p.tokens == 0) {
    of_weight.zero_();
    bias_sums.zero_();
  } else if (need_hidden || need_weight || need_bias) {
    const std::vector<float> token_rows = gradient_rows(p, softmax, rows);
    p.gradient_rows = token_rows.data();
    const i64 panels = launch.k.panels_floats(p) * 4, groups = need_weight ? launch.k.groups_floats(p) * 4 : 0;
    const Workspace memory(panels + groups);
    launch.pack(p, memory.data(), need_weight ? memory.data() + panels : nullptr);
    WeightSums sums;
    sums.need = need_weight;
    if (need_weight && weight.scalar_type() == at::kFloat) {
      sums.sums = of_weight.mutable_data_ptr<float>();
    } else if (need_weight) {
      sums.to = static_cast<char*>(of_weight.mutable_data_ptr());
      sums.type = type_of(of_weight);
    }
    Products products(launch, p.tokens, need_hidden, sums);
    p.logits_row = logits_row(p.tokens, launch.k.is_dot(p) ? 2 : 4);
    float* of_bias = need_bias ? bias_sums.mutable_data_ptr<float>() : nullptr;
    const i64 block = launch.k.product_words(p);
    const i64 fit = std::max<i64>(kStripBytes / p.logits_row / block, 1) * block;
    const i64 step = products.by_words() ? p.words : std::min(fit, p.words);
    const Workspace strip(products.by_words() ? 0 : step * p.logits_row);
    p.logits = products.by_words() ? nullptr : strip.data();
    for (i64 first = 0; first < p.words; first += step) {
      products.run(p, {first, std::min(p.words, first + step)}, first > 0, launch.k.logits_scratch(p),
                   [&](const LinearParams& some, Words words, i64 first_word, char* scratch) {
                     launch.k.gradient(some, words, first_word, of_bias, scratch);
                   });
    }
    products.write_hidden(p, of_hidden);
  }
  return {of_hidden, of_weight, need_bias ? bias_sums.to(bias->scalar_type()) : bias_sums};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("linear_gradients_cpu", by_name<linear_gradients>());
}

} // namespace mmkernels
