// grouped_linear and its gradients on the CPU; see ops/linear/grouped_linear, whose callers have checked the arguments.
#include "grouped_params.h"
#include "launch.h"

namespace mmkernels {

MMK_TABLES(GroupedKernels, grouped_kernels)

namespace {

constexpr i64 kTaskRows = 256;        // at most: so many rows, packed, stay in a cache beside a block of the matrix
constexpr i64 kTasksOfThread = 8;     // about: the last of them end at about the same time
constexpr i64 kMemoryRows = 16;       // fewer rows take as long as reading their matrix does
constexpr i64 kFewTaskColumns = 64;   // of a task that streams its matrix: some 100 KB or more, at least
constexpr i64 kManyTaskColumns = 512; // of a task that packs its rows for them, at least

Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {
  return expect_writes(at::detail::empty_cpu(sizes, type));
}
i64 stride_of(const Tensor& x, i64 dim) {
  return x.size(dim) == 1 ? 1 : x.stride(dim);
}
Matrix rows_of(const Tensor& x) {
  return {static_cast<const char*>(x.const_data_ptr()), type_of(x), x.stride(0), stride_of(x, 1)};
}

// The tensors of a call, and where each group's rows begin.
struct Groups {
  explicit Groups(const Arguments& args)
      : x(args.tensor("x")), weight(args.tensor("weight")), bias(args.optional_tensor("bias")) {
    const Tensor& lengths = args.tensor("lengths");
    check_sizes("x", x, {-1, -1});
    check_sizes("weight", weight, {-1, -1, x.size(1)});
    check_sizes("lengths", lengths, {weight.size(0)});
    if (bias.has_value()) {
      check_sizes("bias", *bias, {weight.size(0), weight.size(1)});
    }
    TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "weight must have the dtype ", x.scalar_type());
    const Tensor wide = lengths.to(at::kLong).contiguous();
    const i64* lengths_of = wide.const_data_ptr<i64>();
    first.resize(weight.size(0) + 1, 0);
    for (std::size_t g = 0; g + 1 < first.size(); ++g) {
      TORCH_CHECK_VALUE(lengths_of[g] >= 0, "lengths must be 0 or more, got ",
                        *std::min_element(lengths_of, lengths_of + weight.size(0)));
      first[g + 1] = first[g] + std::min(lengths_of[g], std::numeric_limits<i64>::max() - first[g]);
    }
    TORCH_CHECK_VALUE(first.back() <= x.size(0), "lengths must sum to at most ", x.size(0), ", the rows of x, got ",
                      first.back());
  }

  i64 count() const {
    return static_cast<i64>(first.size()) - 1;
  }
  i64 rows(i64 group) const {
    return first[group + 1] - first[group];
  }
  double flops() const {
    return 2.0 * static_cast<double>(first.back()) * weight.size(1) * weight.size(2);
  }

  const Tensor &x, &weight;
  const OptionalTensor bias;
  std::vector<i64> first; // [groups + 1]
};

// Tasks of about the same time: rows of one group, no more than kTaskRows, and some of the result's columns. A group
// whose rows are all there are is cut by columns too.
std::vector<GroupedTask> tasks_of(const Groups& groups, const GroupedKernels& k, const GroupedParams& p, int threads) {
  const auto cost = [](i64 rows) { return std::max(rows, kMemoryRows); }; // of a column
  i64 total = 0;
  const auto each_part = [&](const auto& f) { // of a group's rows
    for (i64 group = 0; group < groups.count(); ++group) {
      const i64 rows = groups.rows(group), parts = (rows + kTaskRows - 1) / kTaskRows;
      for (i64 part = 0; part < parts; ++part) {
        const i64 begin = rows * part / parts;
        f(group, groups.first[group] + begin, rows * (part + 1) / parts - begin);
      }
    }
  };
  each_part([&](i64, i64, i64 rows) { total += cost(rows) * p.width; });
  const i64 wanted = threads == 1 ? total : std::max<i64>(total / (threads * kTasksOfThread), 1);
  const i64 step = k.column_step(p);
  std::vector<GroupedTask> tasks;
  each_part([&](i64 group, i64 row, i64 rows) {
    const i64 least = rows <= k.few_rows(p) ? kFewTaskColumns : kManyTaskColumns;
    const i64 fit = std::clamp(wanted / cost(rows), least, std::max(least, p.width));
    const i64 parts = std::max<i64>(p.width / fit, 1), columns = (p.width / parts + step) / step * step;
    for (i64 first = 0; first < p.width; first += columns) {
      tasks.push_back({group, row, rows, first, std::min(columns, p.width - first)});
    }
  });
  return tasks;
}

// Writes [R, width]: each group's rows times its matrix, 0 in rows without a group.
void multiply(const Groups& groups, const GroupedParams& p, const Tensor& out) {
  const GroupedKernels& k = grouped_kernels();
  const i64 used = groups.first.back(), row_bytes = p.width * out.element_size();
  std::memset(p.out + used * row_bytes, 0, (out.size(0) - used) * row_bytes);
  const int threads = threads_for(groups.flops());
  const std::vector<GroupedTask> tasks = tasks_of(groups, k, p, threads);
  i64 rows = 0, columns = 0;
  for (const GroupedTask& task : tasks) {
    rows = std::max(rows, task.rows);
    columns = std::max(columns, task.columns);
  }
  parallel_tasks(static_cast<i64>(tasks.size()), threads, k.scratch(p, rows, columns), [&](i64 i, char* scratch) {
    k.multiply(p, tasks[i], scratch);
    multiplied() += k.take_multiplied();
  });
}

Tensor grouped_linear(const Arguments& args) {
  const Groups groups(args);
  const Tensor &x = groups.x, &weight = groups.weight;
  const Tensor out = empty({x.size(0), weight.size(1)}, x.scalar_type());
  Tensor bias;
  GroupedParams p;
  p.depth = x.size(1), p.width = weight.size(1);
  p.rows = rows_of(x);
  p.matrices = {static_cast<const char*>(weight.const_data_ptr()), type_of(weight), stride_of(weight, 1),
                stride_of(weight, 2)};
  p.matrix_step = weight.stride(0);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.out_type = type_of(out);
  if (groups.bias.has_value()) {
    bias = wide_and_dense(*groups.bias);
    p.bias = bias.const_data_ptr<float>();
  }
  multiply(groups, p, out);
  return out;
}

// The gradient of the weight, of which groups without rows get zeros; and of the bias, where that is wanted.
void weight_gradient(const Groups& groups, const Tensor& grad, const Tensor& of_weight, bool need_weight,
                     const Tensor& bias_sums, bool need_bias) {
  const GroupedKernels& k = grouped_kernels();
  MatrixGradientParams p;
  p.width = groups.weight.size(1), p.depth = groups.weight.size(2);
  p.flow = rows_of(grad);
  p.rows = rows_of(groups.x);
  p.to = static_cast<char*>(of_weight.mutable_data_ptr());
  p.type = type_of(of_weight);
  std::vector<GroupedTask> tasks;
  i64 rows = 0;
  for (i64 group = 0; group < groups.count(); ++group) {
    rows = std::max(rows, groups.rows(group));
    for (i64 first = 0; need_weight && first < p.width; first += k.gradient_step()) {
      tasks.push_back(
          {group, groups.first[group], groups.rows(group), first, std::min(k.gradient_step(), p.width - first)});
    }
  }
  const int threads = threads_for(groups.flops() + static_cast<double>(of_weight.numel()));
  const i64 count = static_cast<i64>(tasks.size()), of_bias = need_bias ? groups.count() : 0;
  float* to_bias = need_bias ? bias_sums.mutable_data_ptr<float>() : nullptr;
  parallel_tasks(count + of_bias, threads, k.gradient_scratch(p, std::max<i64>(rows, 1)), [&](i64 i, char* scratch) {
    if (i >= count) {
      const i64 group = i - count;
      k.bias_gradient(p, groups.first[group], groups.rows(group), to_bias + group * p.width);
    } else if (tasks[i].rows == 0) {
      const i64 row = p.depth * static_cast<i64>(of_weight.element_size());
      std::memset(p.to + (tasks[i].group * p.width + tasks[i].first) * row, 0, tasks[i].columns * row);
    } else {
      k.matrix_gradient(p, tasks[i], scratch);
      multiplied() += k.take_multiplied();
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(const Arguments& args) {
  const Groups groups(args);
  const Tensor &x = groups.x, &weight = groups.weight, &grad = args.tensor("grad_y");
  check_sizes("grad_y", grad, {x.size(0), weight.size(1)});
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), "grad_y must have the dtype ", x.scalar_type());
  const bool need_x = args.flag("need_x"), need_weight = args.flag("need_weight"),
             need_bias = args.flag("need_bias") && groups.bias.has_value();
  const at::IntArrayRef none{0};
  const Tensor of_x = empty(need_x ? x.sizes() : none, x.scalar_type());
  const Tensor of_weight = empty(need_weight ? weight.sizes() : none, weight.scalar_type());
  const Tensor bias_sums = empty(need_bias ? groups.bias->sizes() : none, at::kFloat);
  if (need_x) {
    GroupedParams p;
    p.transposed = true;
    p.depth = weight.size(1), p.width = x.size(1);
    p.rows = rows_of(grad);
    p.matrices = {static_cast<const char*>(weight.const_data_ptr()), type_of(weight), stride_of(weight, 2),
                  stride_of(weight, 1)};
    p.matrix_step = weight.stride(0);
    p.out = static_cast<char*>(of_x.mutable_data_ptr());
    p.out_type = type_of(of_x);
    multiply(groups, p, of_x);
  }
  if (need_weight || need_bias) {
    weight_gradient(groups, grad, of_weight, need_weight, bias_sums, need_bias);
  }
  return {of_x, of_weight, need_bias ? bias_sums.to(groups.bias->scalar_type()) : bias_sums};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("grouped_linear_cpu", by_name<grouped_linear>());
  m.impl("grouped_linear_backward_cpu", by_name<grouped_linear_backward>());
}

} // namespace mmkernels
