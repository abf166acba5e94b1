// A kernel's arguments by name. Python makes an operator's schema from the op's record; a kernel here reads what it
// needs by the record's names, so that neither the list nor its order is written again.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tensors.h"

namespace mmkernels {

class Arguments {
public:
  Arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : schema_(op.schema()), values_(stack.data() + stack.size() - schema_.arguments().size()) {}

  const Tensor& tensor(std::string_view name) const {
    return value(name).toTensor();
  }
  OptionalTensor optional_tensor(std::string_view name) const {
    const c10::IValue& x = value(name);
    return x.isNone() ? OptionalTensor() : OptionalTensor(x.toTensor());
  }
  double number(std::string_view name) const {
    return value(name).toDouble();
  }
  i64 integer(std::string_view name) const {
    return value(name).toInt();
  }
  const std::string& text(std::string_view name) const {
    return value(name).toStringRef();
  }
  bool flag(std::string_view name) const {
    return value(name).toBool();
  }
  std::vector<i64> sizes(std::string_view name) const {
    return value(name).toIntVector();
  }

private:
  // Kernels read in about the schema's order, so that the search begins behind the last argument that was found.
  const c10::IValue& value(std::string_view name) const {
    const auto& arguments = schema_.arguments();
    for (std::size_t tried = 0; tried < arguments.size(); ++tried) {
      const std::size_t at = next_;
      next_ = at + 1 == arguments.size() ? 0 : at + 1;
      if (arguments[at].name() == name) {
        return values_[at];
      }
    }
    TORCH_CHECK(false, schema_.name(), " has no argument ", name, " in its schema ", schema_);
  }

  const c10::FunctionSchema& schema_;
  const c10::IValue* values_;
  mutable std::size_t next_ = 0;
};

template <auto kKernel> void call_by_name(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto results = kKernel(Arguments(op, *stack));
  torch::jit::drop(*stack, op.schema().arguments().size());
  torch::jit::pack(*stack, std::move(results));
}

// A kernel for `Library::impl`: a function from `Arguments` to a tensor or a tuple of tensors.
template <auto kKernel> torch::CppFunction by_name() {
  return torch::CppFunction::makeFromBoxedFunction<&call_by_name<kKernel>>();
}

} // namespace mmkernels
