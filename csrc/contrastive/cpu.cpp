// The contrastive ops on the CPU: work to threads. Arguments were checked by the public functions.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <numeric>
#include <string>

#include "gradients.h"

namespace mmkernels {
namespace {

// Sums of one direction, running: of all texts, or of all images for one task.
struct Side {
  std::vector<float> reference, sum, positives, all, best;
  std::vector<std::int32_t> place, before;

  Side(i64 count, bool smooth, bool ranks)
      : reference(array(count, -INFINITY)), sum(array(count)), positives(array(count)),
        all(smooth ? array(count) : array(0)), best(ranks ? array(count, -INFINITY) : array(0)), place(best.size()),
        before(best.size()) {}
  Sums sums() {
    return {reference.data(), sum.data(), positives.data(), all.empty() ? nullptr : all.data()};
  }
  Ranks ranks() {
    return best.empty() ? Ranks{} : Ranks{best.data(), place.data(), before.data()};
  }

  // Another task's sums of the same images.
  void add(const Side& other, i64 count) {
    for (i64 i = 0; i < count; ++i) {
      const float top = std::max(reference[i], other.reference[i]), base = top == -INFINITY ? 0.0f : top;
      sum[i] = sum[i] * std::exp2(reference[i] - base) + other.sum[i] * std::exp2(other.reference[i] - base);
      reference[i] = top;
      positives[i] += other.positives[i];
    }
    for (i64 i = 0; i < static_cast<i64>(all.size()); ++i) {
      all[i] += other.all[i];
    }
    for (i64 i = 0; i < static_cast<i64>(before.size()); ++i) {
      before[i] += other.before[i];
    }
  }
  // Its best positives: those of lower numbers are in this one.
  void add_best(const Side& other) {
    for (std::size_t i = 0; i < best.size(); ++i) {
      if (other.best[i] > best[i] || std::isnan(other.best[i])) {
        best[i] = other.best[i];
        place[i] = other.place[i];
      }
    }
  }
};

// A dot's logit in base 2, as the kernels have it (power_of).
double logit_of(const PairCall& call, double dot) {
  const double rounded = static_cast<float>(static_cast<float>(dot) * call.p.high),
               rest = dot * call.scale_log2 - rounded;
  return std::abs(rounded) > (1 << 22) && std::abs(rest) > 0.75 ? rounded : dot * call.scale_log2;
}

// Losses [count] and states [4, count] of one direction.
std::tuple<Tensor, Tensor> finish(const PairCall& call, const Side& side, bool of_text, i64 count, double smoothing) {
  const Tensor loss = at::detail::empty_cpu({count}, at::kFloat), state = at::detail::empty_cpu({4, count}, at::kFloat);
  float *to = loss.mutable_data_ptr<float>(), *of = state.mutable_data_ptr<float>();
  for (i64 i = 0; i < count; ++i) {
    const i64 positives = call.positives(of_text, i), classes = call.classes(of_text, i);
    // In double: both terms may be near 100 and their difference near 0.
    double target = (1.0 - smoothing) * side.positives[i] / static_cast<double>(std::max<i64>(positives, 1));
    if (smoothing > 0.0) {
      target += smoothing * side.all[i] / static_cast<double>(classes);
    }
    target = logit_of(call, target);
    const double lse = side.reference[i] + std::log2(static_cast<double>(side.sum[i]));
    // Only rounding makes a cross-entropy negative, or of one class other than 0; NaN stays.
    const double found = kLnOf2 * (lse - target) * (classes == 1 ? 0.0 : 1.0);
    to[i] = positives > 0 && !(found <= 0.0) ? static_cast<float>(found) : 0.0f;
    of[i] = side.reference[i];
    of[count + i] = side.sum[i];
    of[2 * count + i] = static_cast<float>(positives);
    of[3 * count + i] = static_cast<float>(classes);
  }
  return {loss, state};
}

// A row without a positive has the rank -1; one whose best positive is NaN stands behind all its negatives.
Tensor finish_ranks(const PairCall& call, const Side& side, bool of_text, i64 count) {
  const Tensor ranks = at::detail::empty_cpu({count}, at::kLong);
  i64* to = ranks.mutable_data_ptr<i64>();
  for (i64 i = 0; i < count; ++i) {
    const i64 positives = call.positives(of_text, i), negatives = call.classes(of_text, i) - positives;
    to[i] = positives == 0 ? -1 : (std::isnan(side.best[i]) ? negatives : side.before[i]);
  }
  return ranks;
}

// From the rows' losses to one number, and back: what each direction's rows are multiplied by.
double row_weight(const PairCall& call, bool of_text, i64 count, double image_weight, const std::string& reduction) {
  if (reduction == "none") {
    return 0.0;
  }
  const double weight = of_text ? 1.0 - image_weight : image_weight;
  if (reduction == "sum") {
    return weight;
  }
  i64 rows = 0;
  for (i64 i = 0; i < count; ++i) {
    rows += call.positives(of_text, i) > 0;
  }
  return weight / static_cast<double>(std::max<i64>(rows, 1));
}
double total(const Tensor& loss) {
  const float* x = loss.const_data_ptr<float>();
  return std::accumulate(x, x + loss.numel(), 0.0);
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven info_nce(const Tensor& image, const Tensor& text, const Tensor& logit_scale, const OptionalTensor& image_ids,
               const OptionalTensor& text_ids, const OptionalTensor& hard_texts, bool ignore, double label_smoothing,
               double image_weight, const std::string& reduction, bool stats) {
  if (!hard_texts.has_value() && turned(image, text)) {
    const auto [loss, text_loss, image_loss, text_state, image_state, text_ranks, image_ranks] =
        info_nce(text, image, logit_scale, text_ids, image_ids, {}, ignore, label_smoothing, 1.0 - image_weight,
                 reduction, stats);
    return {loss, image_loss, text_loss, image_state, text_state, image_ranks, text_ranks};
  }
  PairCall call(image, text);
  PairProblem& p = call.p;
  call.set_scale(logit_scale);
  call.set_hard(hard_texts, image);
  call.set_ids(image_ids, text_ids, ignore);
  const i64 n = p.image.count, m = p.text.count;
  const bool smooth = label_smoothing > 0.0;
  call.cut(1.0, n * (12 + (smooth ? 4 : 0) + (stats ? 12 : 0)), 1 << 25);
  Side texts(m, smooth, stats);
  std::vector<Side> images(call.tasks.size(), Side(n, smooth, stats));
  p.text_sums = texts.sums();
  p.text_ranks = texts.ranks();
  const i64 scratch = call.k.softmax_scratch(p);
  if (stats) {
    call.run(scratch, [&](const Task& task, i64 i, char* memory) {
      call.k.best_positives(p, task, images[i].ranks(), memory);
      multiplied() += call.k.take_multiplied();
    });
    for (std::size_t i = 1; i < images.size(); ++i) {
      images[0].add_best(images[i]);
    }
    for (std::size_t i = 1; i < images.size(); ++i) {
      images[i].best = images[0].best;
      images[i].place = images[0].place;
    }
  }
  call.run(scratch, [&](const Task& task, i64 i, char* memory) {
    call.k.softmax(p, task, images[i].sums(), images[i].ranks(), memory);
    multiplied() += call.k.take_multiplied();
  });
  for (std::size_t i = 1; i < images.size(); ++i) {
    images[0].add(images[i], n);
  }
  const auto [image_loss, image_state] = finish(call, images[0], false, n, label_smoothing);
  const auto [text_loss, text_state] = finish(call, texts, true, m, label_smoothing);
  const Tensor none = at::detail::empty_cpu({0}, at::kLong), loss = at::detail::empty_cpu({}, at::kFloat);
  *loss.mutable_data_ptr<float>() =
      static_cast<float>(row_weight(call, false, n, image_weight, reduction) * total(image_loss) +
                         row_weight(call, true, m, image_weight, reduction) * total(text_loss));
  return {loss,
          image_loss,
          text_loss,
          image_state,
          text_state,
          stats ? finish_ranks(call, images[0], false, n) : none,
          stats ? finish_ranks(call, texts, true, m) : at::detail::empty_cpu({0}, at::kLong)};
}

// Weights of one direction's gradients; none where nothing flows back to it.
struct WeightArrays {
  std::vector<float> reference, softmax, positive, even;

  // The gradient of each row's own loss, and `all` for each that has a positive.
  WeightArrays(const OptionalTensor& grad, double all, const Tensor& state, i64 count, double smoothing) {
    check_sizes("state", state, {4, count});
    if (!grad.has_value() && all == 0.0) {
      return;
    }
    const Tensor rows = state.to(at::kFloat).contiguous(),
                 given = grad.has_value() ? grad->to(at::kFloat).contiguous() : Tensor();
    if (given.defined()) {
      check_sizes("the losses' gradient", given, {count});
    }
    const float *of = rows.const_data_ptr<float>(), *g = given.defined() ? given.const_data_ptr<float>() : nullptr;
    reference = array(count);
    softmax = array(count);
    positive = array(count);
    even = array(smoothing > 0.0 ? count : 0);
    for (i64 i = 0; i < count; ++i) {
      // One class alone has the probability 1, whatever its logit.
      const bool counts = of[2 * count + i] > 0.0f && of[3 * count + i] > 1.0f;
      const double own = g != nullptr ? g[i] : 0.0, weight = counts ? own + all : 0.0;
      // A whole reference, whoever wrote the state.
      reference[i] = std::nearbyint(of[i]);
      softmax[i] = static_cast<float>(weight / of[count + i] * std::exp2(static_cast<double>(reference[i]) - of[i]));
      positive[i] = static_cast<float>((1.0 - smoothing) * weight / std::max(of[2 * count + i], 1.0f));
      if (smoothing > 0.0) {
        even[i] = static_cast<float>(smoothing * weight / of[3 * count + i]);
      }
    }
  }
  Weights weights() const {
    const auto data = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
    return {data(reference), data(softmax), data(positive), data(even)};
  }
};

// A dot of the size that counts. Each row's gradients sum to 0, so that the scale's gradient may count dots from
// anywhere; here from between the mean of a row's and its largest.
float middle_dot(const PairCall& call, const WeightArrays& side, const Tensor& state) {
  const i64 count = state.size(1);
  const Tensor rows = state.to(at::kFloat).contiguous();
  const float* of = rows.const_data_ptr<float>();
  double total = 0.0, counted = 0.0;
  for (i64 i = 0; i < count; ++i) {
    if (side.softmax[i] != 0.0f) {
      total += of[i] + std::log2(static_cast<double>(of[count + i]) / of[3 * count + i]);
      counted += 1.0;
    }
  }
  const float middle = static_cast<float>(total / (counted * call.scale_log2));
  return std::isfinite(middle) ? middle : 0.0f;
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
info_nce_backward(const Tensor& image, const Tensor& text, const Tensor& logit_scale, const OptionalTensor& image_ids,
                  const OptionalTensor& text_ids, const OptionalTensor& hard_texts, const Tensor& image_state,
                  const Tensor& text_state, const OptionalTensor& grad_loss, const OptionalTensor& grad_image_loss,
                  const OptionalTensor& grad_text_loss, bool ignore, double label_smoothing, double image_weight,
                  const std::string& reduction, std::array<bool, 4> needs) {
  if (!hard_texts.has_value() && turned(image, text)) {
    const auto [of_text, of_image, of_scale, of_hard] = info_nce_backward(
        text, image, logit_scale, text_ids, image_ids, {}, text_state, image_state, grad_loss, grad_text_loss,
        grad_image_loss, ignore, label_smoothing, 1.0 - image_weight, reduction, {needs[1], needs[0], needs[2], false});
    return {of_image, of_text, of_scale, of_hard};
  }
  PairCall call(image, text);
  PairProblem& p = call.p;
  call.set_scale(logit_scale);
  call.set_hard(hard_texts, image);
  call.set_ids(image_ids, text_ids, ignore);
  const double flows = grad_loss.has_value() ? grad_loss->item().toDouble() : 0.0;
  const auto arrays = [&](const OptionalTensor& grad, const Tensor& state, bool of_text, i64 count) {
    const double weight = flows * row_weight(call, of_text, count, image_weight, reduction);
    return WeightArrays(grad, weight, state, count, label_smoothing);
  };
  const WeightArrays of_images = arrays(grad_image_loss, image_state, false, p.image.count);
  const WeightArrays of_texts = arrays(grad_text_loss, text_state, true, p.text.count);
  p.of_images = of_images.weights();
  p.of_texts = of_texts.weights();
  p.factor = p.scale;
  if (!of_images.reference.empty()) {
    p.middle = middle_dot(call, of_images, image_state);
  } else if (!of_texts.reference.empty()) {
    p.middle = middle_dot(call, of_texts, text_state);
  }
  Gradients gradients(call, image, text, hard_texts, {needs[0], needs[1], needs[3]}, image.scalar_type());
  const GradientSums sums = gradients.run();
  const Tensor of_scale =
      needs[2] ? at::detail::empty_cpu(logit_scale.sizes(), logit_scale.scalar_type()) : gradients.none();
  if (needs[2]) {
    of_scale.fill_(sums.scale);
  }
  return {gradients.of_image(), gradients.of_text(), of_scale, gradients.of_hard()};
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The sum over pairs, divided by `count`.
Five sigmoid_loss(const Tensor& image, const Tensor& text, const Tensor& logit_scale, const Tensor& logit_bias,
                  const OptionalTensor& image_ids, const OptionalTensor& text_ids, double count,
                  std::array<bool, 4> needs) {
  if (turned(image, text)) {
    const auto [loss, of_text, of_image, of_scale, of_bias] = sigmoid_loss(
        text, image, logit_scale, logit_bias, text_ids, image_ids, count, {needs[1], needs[0], needs[2], needs[3]});
    return {loss, of_image, of_text, of_scale, of_bias};
  }
  PairCall call(image, text);
  PairProblem& p = call.p;
  call.set_scale(logit_scale);
  TORCH_CHECK_VALUE(logit_bias.numel() == 1, "logit_bias must have one element");
  p.bias = static_cast<float>(logit_bias.item().toDouble());
  call.set_ids(image_ids, text_ids, false);
  p.sigmoid = true;
  p.factor = static_cast<float>(p.scale / count);
  // As Python's kept_dtype has it.
  const auto kept = [](const Tensor& x) { return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type(); };
  Gradients gradients(call, image, text, {}, {needs[0], needs[1], false}, kept(image));
  const GradientSums sums = gradients.run();
  const auto scalar = [&](const Tensor& x, double value, bool wanted) {
    return wanted ? at::detail::empty_cpu(x.sizes(), kept(x)).fill_(value / count) : gradients.none();
  };
  const Tensor loss = at::detail::empty_cpu({}, at::kFloat);
  return {loss.fill_(sums.loss / count), gradients.of_image(), gradients.of_text(),
          scalar(logit_scale, sums.scale, needs[2]), scalar(logit_bias, sums.bias, needs[3])};
}

Five sigmoid_contrastive(const Tensor& image, const Tensor& text, const Tensor& logit_scale, const Tensor& logit_bias,
                         const OptionalTensor& image_ids, const OptionalTensor& text_ids, std::array<bool, 4> needs) {
  const auto count = static_cast<double>(image.size(0));
  return sigmoid_loss(image, text, logit_scale, logit_bias, image_ids, text_ids, count, needs);
}

Tensor retrieval_ranks(const Tensor& query, const Tensor& gallery, const Tensor& target) {
  const Tensor ranks = at::detail::empty_cpu({query.size(0)}, at::kLong);
  if (ranks.numel() == 0) {
    return ranks;
  }
  TORCH_CHECK_VALUE(query.dim() == 2, "query must be [N, d], got ", query.sizes());
  PairCall call(query, gallery, "query", "gallery");
  PairProblem& p = call.p;
  const i64 n = p.image.count, m = p.text.count;
  check_sizes("target", target, {n});
  const Tensor targets = target.contiguous();
  const i64* at = targets.const_data_ptr<i64>();
  const i64 lanes = call.k.strip_lanes(p), strips = (n + lanes - 1) / lanes;
  const i64 panels = call.k.panels_bytes(p), scratch = panels + call.k.gradient_scratch(p);
  call.choose_threads(1.0);
  // Few strips share the gallery out.
  const i64 wanted = call.threads == 1 ? 1 : (2 * call.threads + strips - 1) / strips;
  const i64 each = std::max((m + wanted - 1) / wanted, std::min(m, kLongTask)), runs = (m + each - 1) / each;
  std::vector<std::int32_t> before(runs * n); // -1: the target's score is NaN
  parallel_tasks(strips * runs, call.threads, scratch, [&](i64 number, char* memory) {
    const i64 run = number % runs, first = number / runs * lanes;
    const Strip strip{first, std::min(lanes, n - first), reinterpret_cast<float*>(memory), nullptr};
    std::vector<float> best = array(strip.count);
    std::vector<std::int32_t> place(best.size()), counts(best.size());
    for (i64 i = 0; i < strip.count; ++i) {
      const i64 item = at[strip.first + i];
      TORCH_CHECK_VALUE(item >= 0 && item < m, "target must be from 0 to ", m - 1, ", got ", item);
      place[i] = static_cast<std::int32_t>(item);
    }
    for (i64 piece = 0; piece < call.k.pieces(p); ++piece) {
      call.k.pack(p, strip, piece, reinterpret_cast<float*>(memory), nullptr, memory + panels);
    }
    const Ranks of{best.data(), place.data(), counts.data()};
    call.k.target_scores(p, strip, of, memory + panels);
    call.k.count_before(p, strip, {0, run * each, std::min(m, (run + 1) * each)}, of, memory + panels);
    multiplied() += call.k.take_multiplied();
    for (i64 i = 0; i < strip.count; ++i) {
      before[run * n + first + i] = std::isnan(best[i]) ? -1 : counts[i];
    }
  });
  i64* to = ranks.mutable_data_ptr<i64>();
  for (i64 i = 0; i < n; ++i) {
    i64 rank = 0;
    for (i64 run = 0; run < runs; ++run) {
      rank += before[run * n + i];
    }
    to[i] = before[i] < 0 ? m - 1 : rank;
  }
  return ranks;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  const std::string pair = "Tensor image, Tensor text, Tensor logit_scale, ",
                    ids = "Tensor? image_ids, Tensor? text_ids", all = pair + ids + ", Tensor? hard_texts, ";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("info_nce_cpu(" + all +
         "bool ignore, float label_smoothing, float image_weight, str reduction, bool stats) -> "
         "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  define("info_nce_backward_cpu(" + all +
         "Tensor image_state, Tensor text_state, Tensor? grad_loss, Tensor? grad_image_loss, Tensor? grad_text_loss, "
         "bool ignore, float label_smoothing, float image_weight, str reduction, bool[4] needs) -> "
         "(Tensor, Tensor, Tensor, Tensor)");
  define("sigmoid_contrastive_cpu(" + pair + "Tensor logit_bias, " + ids +
         ", bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  define("retrieval_ranks_cpu(Tensor query, Tensor gallery, Tensor target) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("info_nce_cpu", info_nce);
  m.impl("info_nce_backward_cpu", info_nce_backward);
  m.impl("sigmoid_contrastive_cpu", sigmoid_contrastive);
  m.impl("retrieval_ranks_cpu", retrieval_ranks);
}

} // namespace mmkernels
