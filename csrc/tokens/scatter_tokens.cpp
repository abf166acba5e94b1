// scatter_tokens on the CPU. The public function has checked shapes and dtypes; positions are checked here, before any
// memory for results is taken.
#include <ATen/EmptyTensor.h>

#include <limits>

#include "../common/arguments.h"
#include "rows_launch.h"

namespace mmkernels {
namespace {

// For each of `tokens` rows which visual token it gets, or -1; and back: which row each visual token goes to.
struct Places {
  std::int32_t *source, *home;
};

void from_mask(const Tensor& mask, i64 visual, Places to) {
  const Tensor whole = mask.contiguous();
  const bool* data = whole.const_data_ptr<bool>();
  i64 found = 0;
  for (i64 row = 0; row < whole.numel(); ++row) {
    if (data[row] && found < visual) {
      to.home[found] = static_cast<std::int32_t>(row);
    }
    to.source[row] = data[row] ? static_cast<std::int32_t>(found) : -1;
    found += data[row];
  }
  TORCH_CHECK_VALUE(found == visual, "positions must be true ", visual, " times, once for each row of visual, got ",
                    found);
}

void from_positions(const Tensor& positions, i64 tokens, Places to) {
  const Tensor whole = positions.contiguous();
  const i64 *data = whole.const_data_ptr<i64>(), visual = whole.numel();
  std::fill(to.source, to.source + tokens, -1);
  for (i64 v = 0; v < visual; ++v) {
    const i64 row = data[v];
    TORCH_CHECK_VALUE(row >= 0 && row < tokens, "positions must be from 0 to ", tokens - 1, ", got ", row);
    TORCH_CHECK_VALUE(to.source[row] < 0, "positions must differ from each other, got ", row, " twice, at ",
                      to.source[row], " and ", v);
    to.source[row] = static_cast<std::int32_t>(v);
    to.home[v] = static_cast<std::int32_t>(row);
  }
}

// The record's positions as `Places`.
class Lookup {
public:
  explicit Lookup(const Arguments& args)
      : embeddings(args.tensor("embeddings")), visual(args.tensor("visual")), positions(args.tensor("positions")) {
    TORCH_CHECK_VALUE(embeddings.dim() == 2 || embeddings.dim() == 3, "embeddings must be [T, C] or [B, L, C], got ",
                      embeddings.sizes());
    const i64 channels = embeddings.size(-1);
    check_sizes("visual", visual, {-1, channels});
    tokens = embeddings.dim() == 3 ? embeddings.size(0) * embeddings.size(1) : embeddings.size(0);
    const i64 count = visual.size(0);
    TORCH_CHECK_VALUE(std::max(tokens, count) <= std::numeric_limits<std::int32_t>::max(),
                      "embeddings and visual must have fewer than 2^31 rows, got ", tokens, " and ", count);
    memory_.emplace(static_cast<i64>(sizeof(std::int32_t)) * (tokens + count));
    places.source = reinterpret_cast<std::int32_t*>(memory_->data());
    places.home = places.source + tokens;
    if (positions.scalar_type() == at::kBool) {
      check_sizes("positions", positions, embeddings.sizes().slice(0, embeddings.dim() - 1));
      from_mask(positions, count, places);
    } else {
      check_sizes("positions", positions, {count});
      from_positions(positions, tokens, places);
    }
  }

  const Tensor &embeddings, &visual, &positions;
  i64 tokens;
  Places places;

private:
  std::optional<Workspace> memory_;
};

Tensor like(const Tensor& x) {
  return at::detail::empty_cpu(x.sizes(), x.scalar_type());
}

Tensor scatter_tokens(const Arguments& args) {
  const Lookup lookup(args);
  const Tensor embeddings = with_dense_channels(lookup.embeddings), visual = with_dense_channels(lookup.visual);
  const Tensor out = like(embeddings);
  ComposeParams p{};
  p.base = rows_of(embeddings), p.picked = rows_of(visual);
  p.source = lookup.places.source;
  p.add = args.text("mode") == "add";
  compose(p, out);
  return out;
}

std::tuple<Tensor, Tensor> scatter_tokens_backward(const Arguments& args) {
  const Lookup lookup(args);
  const Tensor grad = with_dense_channels(args.tensor("grad_out"));
  check_sizes("grad_out", grad, lookup.embeddings.sizes());
  const Tensor none = at::detail::empty_cpu({0}, grad.scalar_type());
  Tensor of_embeddings = none, of_visual = none;
  ComposeParams p{};
  if (args.flag("need_embeddings")) { // in mode "replace": rows that were replaced get zeros
    of_embeddings = like(lookup.embeddings);
    p.base = rows_of(grad);
    p.source = lookup.places.source;
    compose(p, of_embeddings);
  }
  if (args.flag("need_visual")) {
    of_visual = like(lookup.visual);
    p.base = {}, p.picked = rows_of(grad);
    p.source = lookup.places.home;
    compose(p, of_visual);
  }
  return {of_embeddings, of_visual};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("scatter_tokens_cpu", by_name<scatter_tokens>());
  m.impl("scatter_tokens_backward_cpu", by_name<scatter_tokens_backward>());
}

} // namespace mmkernels
