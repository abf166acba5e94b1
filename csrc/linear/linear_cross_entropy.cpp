// linear_cross_entropy on the CPU: the loss, and its gradients with it. A chunk of tokens has its logits for all words
// once; see ops/linear/linear_cross_entropy, whose public function has checked the arguments.
#include "products_launch.h"

namespace mmkernels {
namespace {

constexpr i64 kLogitsBytes = i64(80) << 20; // of a chunk, at most
// A chunk of few tokens would spend its time on the weight and its gradient's sums. Eager keeps two matrices of logits
// for all rows: of 80 in 1024, with all else, we keep less than a twentieth. In bfloat16 products take half the time.
constexpr i64 kChunkTokens = 64, kNarrowChunkTokens = 256, kRowsOfToken = 12;
constexpr i64 kFewBytes = i64(4) << 20; // of logits that have memory of their own, which lies close together
constexpr i64 kLentTokens = 1024;       // of the first chunk: more would not fit into caches beside their products
constexpr i64 kShareOfLogits = 16;      // of the logits' bytes, for sums of the hidden states' gradient

// The dtype that gradients are kept in until backward scales them: as `kept_dtype` in Python.
at::ScalarType kept_type(const Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

// Whether bfloat16 exponentials are kept in place of float32 logits: their rounding is that of the logits' gradient,
// unless that is the small difference of a probability and a smoothed target.
bool fit_exponentials(const LinearLaunch& launch) {
  return launch.k.is_dot(launch.p) && launch.p.softcap == 0.0f && launch.p.word_weight == nullptr;
}

// How many tokens are taken together.
i64 tokens_of_chunk(const LinearLaunch& launch) {
  const LinearParams& p = launch.p;
  const auto round_up = [](i64 x, i64 to) { return (x + to - 1) / to * to; };
  const bool exponentials = fit_exponentials(launch);
  const i64 share = p.weight.type != Type::f32 && !launch.k.is_dot(p) ? 2 : 1; // eager's logits are not float32
  const i64 fit = kLogitsBytes / share / (p.words * (exponentials ? 2 : 4)) / kVectorAlign * kVectorAlign;
  const i64 few = launch.rows() / (kRowsOfToken * share) / kVectorAlign * kVectorAlign;
  const i64 wanted = std::max(few, exponentials ? kNarrowChunkTokens : kChunkTokens);
  const i64 most = std::max(std::min(fit, wanted), kVectorAlign), chunks = (p.tokens + most - 1) / most;
  return std::min(most, round_up((p.tokens + chunks - 1) / chunks, kVectorAlign));
}

// What one token gives: rows of `rows` are how its target, the weighted words and the squared lse count.
struct TokenLoss {
  double pick, spread, square, words; // words: the sum of the words' weights
  bool has_target;
  TokenState state;
  double lse = state.lse(), logprob = has_target ? state.picked - lse : std::numeric_limits<double>::quiet_NaN();

  double loss() const {
    const double average = spread == 0.0 ? 0.0 : spread * (state.total - words * lse);
    return (pick == 0.0 ? 0.0 : -pick * logprob) - average + (square == 0.0 ? 0.0 : square * lse * lse);
  }
  // target_weight: the target's as a word.
  void write_gradient(float* to, i64 stride, double target_weight) const {
    // Above the reference, as a large lse would be rounded.
    const double mass = pick + spread * words + 2.0 * square * lse;
    to[kBase * stride] = static_cast<float>(state.reference);
    to[kOfProbability * stride] = static_cast<float>(mass * std::exp(state.reference - lse));
    to[kOfEntropy * stride] = 0.0f;
    to[kOfTarget * stride] = static_cast<float>(-pick);
    to[kOfWords * stride] = static_cast<float>(-spread);
    to[kOfTargetLogit * stride] = static_cast<float>(mass * std::exp(logprob) - pick - spread * target_weight);
  }
};

class CrossEntropy {
public:
  explicit CrossEntropy(const Arguments& args)
      : input_(args.tensor("input")), weight_(args.tensor("linear_weight")), bias_(args.optional_tensor("linear_bias")),
        rows_(wide_and_dense(args.tensor("rows"))), keep_input_(args.flag("keep_input")),
        keep_weight_(args.flag("keep_linear_weight")), keep_bias_(args.flag("keep_linear_bias") && bias_.has_value()),
        launch_(input_, weight_, bias_, args.tensor("target"), args.optional_tensor("token_weight")) {
    LinearParams& p = launch_.p;
    check_sizes("rows", rows_, {3, launch_.rows()});
    p.softcap = static_cast<float>(args.number("softcap"));
    p.best = args.flag("best");
    launch_.choose_threads(1.0 + keep_input_ + keep_weight_);
    for (i64 word = 0; p.word_weight != nullptr && word < p.words; ++word) {
      words_ += p.word_weight[word];
    }
    const auto empty = [](bool need, at::IntArrayRef sizes, at::ScalarType type) {
      return expect_writes(at::detail::empty_cpu(need ? sizes : at::IntArrayRef{0}, type));
    };
    of_input_ = empty(keep_input_, input_.sizes(), kept_type(input_));
    of_weight_ = empty(keep_weight_, weight_.sizes(), kept_type(weight_));
    of_bias_ = empty(keep_bias_, {p.words}, at::kFloat);
    logprobs_ = at::detail::empty_cpu({launch_.rows()}, at::kFloat);
    lse_ = at::detail::empty_cpu({launch_.rows()}, at::kFloat);
    best_index_ = at::detail::empty_cpu({p.best ? launch_.rows() : 0}, at::kLong);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run() {
    launch_.each_ignored([&](i64 row) { write(row, 0.0, 0.0, -1); });
    if (keep_input_) {
      clear_ignored(launch_, of_input_);
    }
    if (launch_.p.tokens == 0) {
      of_weight_.zero_();
      of_bias_.zero_();
    } else {
      run_chunks();
    }
    const Tensor loss = at::detail::empty_cpu({}, at::kFloat);
    const at::ScalarType bias_type = kept_type(keep_bias_ ? *bias_ : input_);
    return {loss.fill_(static_cast<float>(loss_)),
            of_input_,
            of_weight_,
            of_bias_.to(bias_type),
            logprobs_,
            lse_,
            best_index_};
  }

private:
  bool keeps() const {
    return keep_input_ || keep_weight_ || keep_bias_;
  }

  void run_chunks() {
    LinearParams& p = launch_.p;
    p.keeps_exponentials = keeps() && fit_exponentials(launch_);
    const i64 further = std::min(tokens_of_chunk(launch_), p.tokens), lent = tokens_in_gradient(further);
    const i64 largest = std::max(further, lent), block = launch_.k.block_words(p);
    WeightSums sums = weight_sums(largest);
    Products products(launch_, largest, keep_input_, sums, part_bytes(largest));
    const i64 panels = launch_.k.panels_floats(launch_.chunk(0, largest)) * 4;
    const i64 groups = keep_weight_ ? launch_.k.groups_floats(launch_.chunk(0, largest)) * 4 : 0;
    const Workspace packed(panels + groups);
    const i64 row = logits_row(further, kept_size()), blocks = (p.words + block - 1) / block;
    const i64 kept_bytes = keeps() && lent < p.tokens ? p.words * row : 0;
    const Workspace kept(kept_bytes);
    expect_writes(kept.data(), kept_bytes);
    const Workspace exponents(p.keeps_exponentials ? blocks * padded(largest) * 4 : 0);
    for (i64 first = 0; first < p.tokens;) {
      const bool lends = first < lent;
      LinearParams chunk = launch_.chunk(first, std::min(lends ? lent : further, p.tokens - first));
      chunk.kept = lends ? lender() : (keeps() ? kept.data() : nullptr);
      chunk.kept_row = lends ? p.dim * lender_size() : row;
      chunk.exponents = reinterpret_cast<float*>(exponents.data());
      chunk.logits_row = products.by_words() ? logits_row(chunk.tokens, launch_.k.is_dot(p) ? 2 : 4) : row;
      chunk.logits = products.by_words() ? nullptr : chunk.kept;
      launch_.pack(chunk, packed.data(), keep_weight_ ? packed.data() + panels : nullptr);
      const std::vector<float> rows = add_states(chunk, StateSums(launch_, chunk));
      const bool adds = first > 0;
      first += chunk.tokens;
      if (!keeps()) {
        continue;
      }
      chunk.gradient_rows = rows.data();
      sums.add = adds;
      sums.to = converts_ && first >= p.tokens ? static_cast<char*>(of_weight_.mutable_data_ptr()) : nullptr;
      products.set_weight(sums);
      float* of_bias = keep_bias_ ? of_bias_.mutable_data_ptr<float>() : nullptr;
      products.run(chunk, {0, p.words}, false, launch_.k.logits_scratch(chunk),
                   [&](const LinearParams& some, Words words, i64 first_word, char* scratch) {
                     launch_.k.gradient_of_kept(some, words, first_word, of_bias, adds, scratch);
                   });
      products.write_hidden(chunk, of_input_);
    }
  }

  i64 kept_size() const {
    return launch_.p.keeps_exponentials ? 2 : 4;
  }
  i64 part_bytes(i64 tokens) const {
    return std::max(kPartBytes, tokens * launch_.p.words * 4 / kShareOfLogits);
  }
  // The first chunk keeps its logits in the memory of the weight's gradient, a word's in the word's row, which is
  // written only after they were read. Returns how many tokens that are; 0 if no more than another chunk has.
  i64 tokens_in_gradient(i64 further) {
    const LinearParams& p = launch_.p;
    const auto fit = [&](i64 size) {
      return std::min(p.dim * size / kept_size(), kLentTokens) / kVectorAlign * kVectorAlign;
    };
    if (!keep_weight_ || (further == p.tokens && p.words * logits_row(further, kept_size()) <= kFewBytes)) {
      return 0;
    }
    i64 most = fit(of_weight_.element_size());
    const bool in_sums = most < p.tokens;
    most = in_sums ? fit(4) : most;
    while (most > further && keep_input_ && !Products::fits(launch_, most, part_bytes(most))) {
      most = most / 2 / kVectorAlign * kVectorAlign;
    }
    const bool lends = most > further || (most >= p.tokens && most > 0);
    needs_sums_ = lends && in_sums;
    return lends ? std::min(most, p.tokens) : 0;
  }
  char* lender() const {
    return static_cast<char*>((sums_.defined() ? sums_ : of_weight_).mutable_data_ptr());
  }
  i64 lender_size() const {
    return static_cast<i64>((sums_.defined() ? sums_ : of_weight_).element_size());
  }

  // The weight's gradient itself where it is float32, else separate memory, unless one chunk needs none.
  WeightSums weight_sums(i64 step) {
    WeightSums sums;
    sums.need = keep_weight_;
    converts_ = keep_weight_ && of_weight_.scalar_type() != at::kFloat;
    sums.type = converts_ ? type_of(of_weight_) : Type::f32;
    if (keep_weight_ && (!converts_ || needs_sums_ || step < launch_.p.tokens)) {
      sums_ = converts_ ? expect_writes(at::detail::empty_cpu(of_weight_.sizes(), at::kFloat)) : of_weight_;
      sums.sums = sums_.mutable_data_ptr<float>();
    }
    return sums;
  }

  // Writes a chunk's results, and returns the rows of its gradient; padding has no probability.
  std::vector<float> add_states(const LinearParams& chunk, const StateSums& states) {
    const i64 stride = padded(chunk.tokens), count = launch_.rows();
    std::vector<float> to(kGradientRows * stride, 0.0f);
    std::fill_n(to.begin() + kBase * stride, stride, std::numeric_limits<float>::infinity());
    const float* rows = rows_.const_data_ptr<float>();
    for (i64 token = 0; token < chunk.tokens; ++token) {
      const i64 row = chunk.live[token];
      const TokenLoss x{rows[row], rows[count + row],        rows[2 * count + row],
                        words_,    chunk.target[token] >= 0, states.of(token)};
      loss_ += x.loss();
      const bool weighted = chunk.word_weight != nullptr && x.has_target;
      x.write_gradient(to.data() + token, stride, weighted ? chunk.word_weight[chunk.target[token]] : 0.0);
      write(row, x.logprob, x.lse, x.state.best_word);
    }
    return to;
  }

  void write(i64 row, double logprob, double lse, i64 best) {
    logprobs_.mutable_data_ptr<float>()[row] = static_cast<float>(logprob);
    lse_.mutable_data_ptr<float>()[row] = static_cast<float>(lse);
    if (launch_.p.best) {
      best_index_.mutable_data_ptr<i64>()[row] = best;
    }
  }

  Tensor input_, weight_;
  OptionalTensor bias_;
  Tensor rows_;
  bool keep_input_, keep_weight_, keep_bias_, converts_ = false, needs_sums_ = false;
  LinearLaunch launch_;
  double words_ = 0.0, loss_ = 0.0;
  Tensor of_input_, of_weight_, of_bias_, sums_, logprobs_, lse_, best_index_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Arguments& args) {
  return CrossEntropy(args).run();
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("linear_cross_entropy_cpu", by_name<linear_cross_entropy>());
}

} // namespace mmkernels
