// merge_patches on the CPU. The public function has checked the arguments.
#include "merge_patches.h"

#include "launch.h"

namespace mmkernels {

MMK_TABLES(MergePatchesKernels, merge_patches_kernels)

namespace {

class MergeLaunch {
public:
  MergePatches p{};
  const MergePatchesKernels& k = merge_patches_kernels(); // once: another thread may choose another instruction set
  i64 rows = 0, width = 0;                                // of the output
  int threads = 1;

  explicit MergeLaunch(const Arguments& args) : x_(with_dense_channels(args.tensor("x"))) {
    weight_ = args.optional_tensor("weight");
    bias_ = args.optional_tensor("bias");
    grid_ = args.sizes("grid");
    const std::vector<i64> window = args.sizes("window");
    const std::string& order = args.text("order");
    const std::string& norm = args.text("norm");
    p.first = args.flag("norm_first");
    p.eps = static_cast<float>(args.number("eps"));
    TORCH_CHECK_VALUE((x_.dim() == 2 || x_.dim() == 3) && x_.device().is_cpu() && window.size() == 3,
                      "x must be [tokens, C] or [images, tokens, C] on the CPU, got ", x_.sizes());
    p.channels = x_.size(-1);
    for (int axis = 0; axis < 3; ++axis) {
      TORCH_CHECK_VALUE(window[axis] > 0, "window must be positive");
      p.window[axis] = window[axis];
      p.patches *= window[axis];
    }
    p.type = type_of(x_);
    p.channel_major = order == "channel";
    p.grouped = order == "grouped";
    p.norm = !norm.empty();
    p.centred = norm == "layer";
    width = p.channels * p.patches;
    set_images();
    p.weight = parameter("weight", weight_, wide_weight_);
    p.bias = parameter("bias", bias_, wide_bias_);
    p.past_caches = static_cast<i64>(x_.nbytes()) > kCacheBytes;
    threads = threads_for_bytes(2.0 * x_.nbytes());
  }

  const Tensor& x() const {
    return x_;
  }
  void set_grad_x(const Tensor& grad_x) {
    char* to = static_cast<char*>(grad_x.mutable_data_ptr());
    for (std::size_t i = 0; i < images_.size(); ++i) {
      images_[i].grad_x = to;
      to += tokens_[i] * p.channels * x_.element_size();
    }
  }
  // The gradient of a weight or bias from the sums of all tasks, [tasks, length]; empty if not needed.
  Tensor reduced(const OptionalTensor& like, const std::vector<float>& sums, bool needed) const {
    if (!needed || !like.has_value()) {
      return at::detail::empty_cpu({0}, x_.scalar_type());
    }
    const Tensor grad = at::detail::empty_cpu({length()}, at::kFloat);
    float* to = grad.mutable_data_ptr<float>();
    for (i64 i = 0; i < length(); ++i) {
      float total = 0.0f;
      for (std::size_t task = 0; task * length() < sums.size(); ++task) {
        total += sums[task * length() + i];
      }
      to[place(i)] = total;
    }
    return grad.to(like->scalar_type());
  }
  i64 length() const {
    return p.first ? p.channels : width;
  }
  const OptionalTensor& weight() const {
    return weight_;
  }
  const OptionalTensor& bias() const {
    return bias_;
  }

private:
  void set_images() {
    TORCH_CHECK_VALUE(grid_.size() % 3 == 0, "grid must be (t, h, w) for each image");
    const i64 count = static_cast<i64>(grid_.size()) / 3;
    const char* from = static_cast<const char*>(x_.const_data_ptr());
    p.x_stride = x_.stride(-2) * x_.element_size();
    p.y_stride = width * x_.element_size();
    images_.resize(count);
    tokens_.resize(count);
    i64 all = 0;
    for (i64 i = 0; i < count; ++i) {
      PatchImage& image = images_[i];
      image = {};
      image.x = x_.dim() == 3 ? from + i * x_.stride(0) * x_.element_size() : from + all * p.x_stride;
      image.row = rows;
      i64 merged = 1;
      tokens_[i] = 1;
      for (int axis = 0; axis < 3; ++axis) {
        image.size[axis] = grid_[3 * i + axis];
        TORCH_CHECK_VALUE(image.size[axis] > 0, "grid must be positive");
        image.rows[axis] = (image.size[axis] + p.window[axis] - 1) / p.window[axis];
        tokens_[i] *= image.size[axis];
        merged *= image.rows[axis];
      }
      TORCH_CHECK_VALUE(!p.grouped || merged * p.patches == tokens_[i], "grid must be divisible by window");
      TORCH_CHECK_VALUE(x_.dim() == 2 || tokens_[i] == x_.size(1), "grid must match x's tokens");
      rows += merged;
      all += tokens_[i];
    }
    TORCH_CHECK_VALUE(all == x_.numel() / std::max<i64>(p.channels, 1), "grid must match x's tokens, got ", all);
    p.images = images_.data();
    p.image_count = count;
  }
  // Where element i of a row by patches lies in the op's order.
  i64 place(i64 i) const {
    return p.channel_major && !p.first ? i % p.channels * p.patches + i / p.channels : i;
  }
  const float* parameter(const char* name, const OptionalTensor& given, Tensor& wide) {
    if (!given.has_value()) {
      return nullptr;
    }
    check_sizes(name, *given, {length()});
    wide = given->to(at::kFloat).contiguous();
    const float* from = wide.const_data_ptr<float>();
    if (p.channel_major && !p.first) {
      const Tensor placed = at::detail::empty_cpu({length()}, at::kFloat);
      float* to = placed.mutable_data_ptr<float>();
      for (i64 i = 0; i < length(); ++i) {
        to[i] = from[place(i)];
      }
      wide = placed;
      from = to;
    }
    return from;
  }

  Tensor x_, wide_weight_, wide_bias_;
  OptionalTensor weight_, bias_;
  std::vector<i64> grid_, tokens_;
  std::vector<PatchImage> images_;
};

Tensor merge_patches(const Arguments& args) {
  MergeLaunch launch(args);
  MergePatches& p = launch.p;
  const Tensor y = expect_writes(at::detail::empty_cpu({launch.rows, launch.width}, launch.x().scalar_type()));
  p.y = static_cast<char*>(y.mutable_data_ptr());
  const i64 tasks = launch.threads == 1 ? 1 : 4 * launch.threads;
  each_range(launch.rows, tasks, launch.threads, launch.k.scratch(p),
             [&](i64 first, i64 last, i64, char* scratch) { launch.k.merge(p, first, last, scratch); });
  return y;
}

constexpr i64 kChain = 64; // rows that are summed one after the other: a longer chain of additions rounds more

// Sums of rows for the gradient of a weight or bias, [tasks, length], each of chains of rows; none if not needed.
struct SumsOfRows {
  SumsOfRows(bool needed, i64 tasks, i64 length)
      : length(length), sums(needed ? tasks * length : 0), chains(needed ? tasks * length : 0) {}
  float* chain(i64 task) {
    return chains.empty() ? nullptr : chains.data() + task * length;
  }
  void end_chain(i64 task) {
    if (!chains.empty()) {
      for (i64 i = task * length; i < (task + 1) * length; ++i) {
        sums[i] += chains[i];
        chains[i] = 0.0f;
      }
    }
  }
  const i64 length;
  std::vector<float> sums, chains;
};

std::tuple<Tensor, Tensor, Tensor> merge_patches_backward(const Arguments& args) {
  MergeLaunch launch(args);
  MergePatches& p = launch.p;
  const Tensor grad_y = with_dense_channels(args.tensor("grad_y"));
  const bool need_x = args.flag("need_x"), need_weight = args.flag("need_weight"), need_bias = args.flag("need_bias");
  check_sizes("grad_y", grad_y, {launch.rows, launch.width});
  TORCH_CHECK_TYPE(grad_y.scalar_type() == launch.x().scalar_type(), "grad_y must have x's dtype");
  p.grad_y = static_cast<const char*>(grad_y.const_data_ptr());
  p.y_stride = grad_y.stride(0) * grad_y.element_size();
  Tensor grad_x = at::detail::empty_cpu({0}, launch.x().scalar_type());
  if (need_x) {
    grad_x = expect_writes(at::detail::empty_cpu(launch.x().sizes(), launch.x().scalar_type()));
    launch.set_grad_x(grad_x);
  }
  // A range of rows for each thread, whose sums are added in order: the same bits whichever thread is first.
  const i64 tasks = launch.threads, length = launch.length();
  SumsOfRows of_weight(need_weight && launch.weight(), tasks, length),
      of_bias(need_bias && launch.bias(), tasks, length);
  each_range(
      launch.rows, tasks, launch.threads, launch.k.scratch(p), [&](i64 first, i64 last, i64 task, char* scratch) {
        for (i64 at = first; at < last; at += kChain) {
          launch.k.backward(p, at, std::min(last, at + kChain), of_weight.chain(task), of_bias.chain(task), scratch);
          of_weight.end_chain(task);
          of_bias.end_chain(task);
        }
      });
  return {grad_x, launch.reduced(launch.weight(), of_weight.sums, need_weight),
          launch.reduced(launch.bias(), of_bias.sums, need_bias)};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("merge_patches_cpu", by_name<merge_patches>());
  m.impl("merge_patches_backward_cpu", by_name<merge_patches_backward>());
}

} // namespace mmkernels
