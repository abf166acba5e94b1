// pool_tokens on the CPU. The public function has checked the arguments.
#include "pool_tokens.h"

#include "launch.h"
#include "pool_axes.h"

namespace mmkernels {

MMK_TABLES(PoolTokensKernels, pool_tokens_kernels)

namespace {

class PoolLaunch {
public:
  PoolTokens p{};
  const PoolTokensKernels& k = pool_tokens_kernels(); // once: another thread may choose another instruction set
  std::vector<PoolImage> images;
  i64 tokens = 0, rows = 0; // of x, of y

  explicit PoolLaunch(const Arguments& args)
      : x(with_dense_channels(args.tensor("x"))), scores_(args.optional_tensor("scores")), grid_(args.sizes("grid")),
        out_(args.sizes("out")), window_(args.sizes("window")), mode(args.text("mode")),
        axes_(mode, args.flag("antialias")) {
    TORCH_CHECK_VALUE((x.dim() == 2 || x.dim() == 3) && x.device().is_cpu(),
                      "x must be [tokens, C] or [images, tokens, C] on the CPU, got ", x.sizes());
    TORCH_CHECK_VALUE(grid_.size() % 3 == 0 && out_.size() == grid_.size() && (window_.empty() || window_.size() == 3),
                      "grid and out must be (t, h, w) for each image");
    window_.resize(3);
    p.channels = x.size(-1);
    p.type = type_of(x);
    images.resize(grid_.size() / 3);
    for (PoolImage& image : images) {
      image = {};
      image.token = tokens;
      image.row = rows;
      const i64* grid = &grid_[3 * (&image - images.data())];
      const i64* out = &out_[3 * (&image - images.data())];
      for (int d = 0; d < 3; ++d) {
        TORCH_CHECK_VALUE(grid[d] > 0 && out[d] > 0 && (window_[d] <= 0 || (out[d] - 1) * window_[d] < grid[d]),
                          "grid, out and window must be positive, and match");
      }
      const i64 count = grid[0] * grid[1] * grid[2];
      TORCH_CHECK_VALUE(x.dim() == 2 || count == x.size(1), "grid must match x's tokens");
      tokens += count;
      rows += out[0] * out[1] * out[2];
    }
    TORCH_CHECK_VALUE(tokens == x.numel() / std::max<i64>(p.channels, 1), "grid must match x's tokens, got ", tokens);
    TORCH_CHECK_VALUE(tokens < INT32_MAX && rows < INT32_MAX, "there are too many tokens");
    if (mode == "attention") {
      TORCH_CHECK_VALUE(scores_.has_value() && scores_->numel() == tokens, "scores must be one for each token");
      wide_scores_ = scores_->to(at::kFloat).contiguous();
      p.scores = wide_scores_.const_data_ptr<float>();
    }
    p.images = images.data();
    p.image_count = static_cast<i64>(images.size());
  }

  // Reads x, and writes y.
  void forward() {
    p.stride = x.stride(-2) * x.element_size();
    for (PoolImage& image : images) {
      image.from = x_of(image);
      set(image, false);
    }
  }
  // Reads grad_y, and writes the gradient of x.
  void backward(const Tensor& grad_y) {
    p.stride = grad_y.stride(0) * grad_y.element_size();
    p.x_stride = x.stride(-2) * x.element_size();
    for (PoolImage& image : images) {
      image.from = static_cast<const char*>(grad_y.const_data_ptr()) + image.row * p.stride;
      image.x = x_of(image);
      set(image, true);
      std::swap(image.token, image.row);
    }
  }
  void run() const {
    const i64 results =
        p.pooling == Pooling::max_backward || p.pooling == Pooling::attention_backward || backward_ ? tokens : rows;
    const int threads = threads_for_bytes(static_cast<double>((tokens + rows) * p.channels * x.element_size()));
    each_range(results, threads == 1 ? 1 : 4 * threads, threads, k.scratch(p),
               [&](i64 first, i64 last, i64, char* scratch) { k.pool(p, first, last, scratch); });
  }

  const Tensor x;

private:
  const char* x_of(const PoolImage& image) const {
    const i64 i = &image - images.data();
    const i64 at = x.dim() == 3 ? i * x.stride(0) : image.token * x.stride(0);
    return static_cast<const char*>(x.const_data_ptr()) + at * x.element_size();
  }
  void set(PoolImage& image, bool backward) {
    backward_ = backward;
    const i64 i = &image - images.data();
    i64 taps = 1;
    for (int d = 0; d < 3; ++d) {
      const i64 size = grid_[3 * i + d], out = out_[3 * i + d];
      const AxisMemory& axis = axes_.axis(size, out, window_[d]);
      const AxisMemory& used = backward ? axes_.transposed(size, out, window_[d]) : axis;
      image.cells[d] = axis.view();
      image.axis[d] = used.view();
      image.size[d] = backward ? out : size;
      image.results[d] = backward ? size : out;
      taps *= used.most();
    }
    p.most_taps = std::max(p.most_taps, taps);
  }

  OptionalTensor scores_;
  std::vector<i64> grid_, out_, window_;

public:
  const std::string mode;

private:
  PoolAxes axes_;
  Tensor wide_scores_;
  bool backward_ = false;
};

std::tuple<Tensor, Tensor, Tensor> pool_tokens(const Arguments& args) {
  PoolLaunch launch(args);
  PoolTokens& p = launch.p;
  const bool max = launch.mode == "max", attention = launch.mode == "attention";
  p.pooling = max ? Pooling::max : attention ? Pooling::attention : Pooling::linear;
  const Tensor y = expect_writes(at::detail::empty_cpu({launch.rows, p.channels}, launch.x.scalar_type()));
  const Tensor which =
      max ? at::detail::empty_cpu({launch.rows, p.channels}, at::kInt) : at::detail::empty_cpu({0}, at::kInt);
  const Tensor lse = at::detail::empty_cpu({attention ? launch.rows : 0}, at::kFloat);
  p.to = static_cast<char*>(y.mutable_data_ptr());
  p.new_index = which.mutable_data_ptr<std::int32_t>();
  p.new_lse = lse.mutable_data_ptr<float>();
  p.past_caches = static_cast<i64>(y.nbytes()) > kCacheBytes;
  launch.forward();
  launch.run();
  return {y, which, lse};
}

// Gradients of the scores of tokens. The mean product of a window is that of its tokens' products, not grad_y . y: y
// may be rounded to 16 bits, which is off by more than what is left where one token has all of the weight.
void softmax_gradient(const std::vector<PoolPair>& pairs, i64 most_taps, i64 windows, float* grad_scores) {
  std::vector<float> mean(windows);
  for (const PoolPair& pair : pairs) {
    if (pair.window >= 0) {
      mean[pair.window] += pair.weight * pair.dot;
    }
  }
  for (std::size_t n = 0; n < pairs.size(); n += most_taps) {
    float sum = 0.0f;
    for (i64 k = 0; k < most_taps && pairs[n + k].window >= 0; ++k) {
      const PoolPair& pair = pairs[n + k];
      sum += pair.weight * (pair.dot - mean[pair.window]);
    }
    grad_scores[n / most_taps] = sum;
  }
}

std::tuple<Tensor, Tensor> pool_tokens_backward(const Arguments& args) {
  PoolLaunch launch(args);
  PoolTokens& p = launch.p;
  const Tensor which = args.tensor("which").contiguous();
  const Tensor lse = args.tensor("lse").contiguous(), grad_y = with_dense_channels(args.tensor("grad_y"));
  const bool max = launch.mode == "max", attention = launch.mode == "attention";
  const bool need_x = args.flag("need_x"), need_scores = args.flag("need_scores") && attention;
  p.pooling = max ? Pooling::max_backward : attention ? Pooling::attention_backward : Pooling::linear;
  check_sizes("grad_y", grad_y, {launch.rows, p.channels});
  TORCH_CHECK_TYPE(grad_y.scalar_type() == launch.x.scalar_type(), "grad_y must have x's dtype");
  launch.backward(grad_y);
  const Tensor none = at::detail::empty_cpu({0}, launch.x.scalar_type());
  const Tensor grad_x = need_x ? expect_writes(at::detail::empty_cpu(launch.x.sizes(), launch.x.scalar_type())) : none;
  std::vector<PoolPair> pairs;
  Tensor grad_scores = none;
  if (max) {
    check_sizes("which", which, {launch.rows, p.channels});
    p.index = which.const_data_ptr<std::int32_t>();
  } else if (attention) {
    check_sizes("lse", lse, {launch.rows});
    p.lse = lse.const_data_ptr<float>();
    if (need_scores) {
      grad_scores = at::detail::empty_cpu(args.optional_tensor("scores")->sizes(), at::kFloat);
      pairs.resize(grad_scores.numel() * p.most_taps);
      p.pairs = pairs.data();
    }
  }
  p.to = need_x ? static_cast<char*>(grad_x.mutable_data_ptr()) : nullptr;
  p.past_caches = need_x && static_cast<i64>(grad_x.nbytes()) > kCacheBytes;
  launch.run();
  if (p.pairs != nullptr) {
    softmax_gradient(pairs, p.most_taps, launch.rows, grad_scores.mutable_data_ptr<float>());
  }
  return {grad_x, grad_scores.to(launch.x.scalar_type())};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("pool_tokens_cpu", by_name<pool_tokens>());
  m.impl("pool_tokens_backward_cpu", by_name<pool_tokens_backward>());
}

} // namespace mmkernels
