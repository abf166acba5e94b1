// linear_states on the CPU: what a softmax over the words sums; see ops/linear/rows.py, whose callers have checked the
// arguments.
#include "launch.h"

namespace mmkernels {
namespace {

constexpr i64 kResultRows = 6; // reference, sum, picked, moment, total, best: as ops/linear/formula.py has them

std::tuple<Tensor, Tensor> linear_states(const Arguments& args) {
  LinearLaunch launch(args.tensor("hidden"), args.tensor("weight"), args.optional_tensor("bias"), args.tensor("target"),
                      args.optional_tensor("token_weight"));
  LinearParams& p = launch.p;
  p.softcap = static_cast<float>(args.number("softcap"));
  p.temperature = static_cast<float>(args.number("temperature"));
  p.entropy = args.flag("entropy");
  p.best = args.flag("best");
  launch.choose_threads(1.0);
  const i64 rows = launch.rows();
  const Tensor states = at::detail::empty_cpu({kResultRows, rows}, at::kFloat);
  const Tensor best_index = at::detail::empty_cpu({p.best ? rows : 0}, at::kLong);
  float* to = states.mutable_data_ptr<float>();
  i64* to_index = best_index.mutable_data_ptr<i64>();
  const auto write = [&](i64 row, const TokenState& x, i64 index) {
    const double values[kResultRows] = {x.reference, x.sum, x.picked, x.moment, x.total, x.best};
    for (i64 i = 0; i < kResultRows; ++i) {
      to[i * rows + row] = static_cast<float>(values[i]);
    }
    if (p.best) {
      to_index[row] = index;
    }
  };
  launch.each_ignored([&](i64 row) { write(row, {0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0}, -1); });
  const i64 token_bytes = std::max<i64>(launch.k.panels_floats(launch.chunk(0, 1)) * 4 / launch.k.panel_tokens(), 1);
  const i64 step = std::max(kPanelBytes / token_bytes / kTokenAlign * kTokenAlign, kTokenAlign);
  for (i64 first = 0; first < p.tokens; first += step) {
    LinearParams chunk = launch.chunk(first, std::min(step, p.tokens - first));
    const Workspace memory(launch.k.panels_floats(chunk) * 4);
    launch.pack(chunk, memory.data(), nullptr);
    const StateSums sums(launch, chunk);
    for (i64 token = 0; token < chunk.tokens; ++token) {
      TokenState x = sums.of(token);
      x.best = p.best ? x.best : 0.0;
      write(chunk.live[token], x, x.best_word);
    }
  }
  return {states, best_index};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("linear_states_cpu", by_name<linear_states>());
}

} // namespace mmkernels
