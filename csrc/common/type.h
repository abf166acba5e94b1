// The element types of features and attention tensors.
#pragma once

namespace mmkernels {

enum class Type : int { f32, bf16, f16 };

} // namespace mmkernels
