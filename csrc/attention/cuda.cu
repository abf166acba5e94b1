// The decode kernels as an operator for PyTorch's CUDA tensors, through its stable ABI alone, so that one build serves
// torch 2.11 and newer. Untested on a GPU. The public function and cross_attention/cuda.py have checked the arguments;
// the checks here keep a direct call of torch.ops from reading past an end.
//
// The stable ABI passes arguments by position: the schema stands here, beside the function, and Python reads from it
// which fields of the op's record to pass.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <tuple>

#include "decode_cuda.cuh"

namespace mmkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using i64 = std::int64_t;

void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

i64 stride(const Tensor& x, int dim) {
  return x.size(dim) == 1 ? 0 : x.stride(dim);
}

// A size of -1 may be anything; with `may_be_one` each dim may also have size 1.
void check_sizes(const char* name, const Tensor& x, const Tensor& query, std::initializer_list<i64> sizes,
                 bool may_be_one = false) {
  bool fits =
      x.is_cuda() && x.get_device_index() == query.get_device_index() && x.dim() == static_cast<i64>(sizes.size());
  int dim = 0;
  for (const i64 size : sizes) {
    fits = fits && (size < 0 || x.size(dim) == size || (may_be_one && x.size(dim) == 1));
    ++dim;
  }
  STD_TORCH_CHECK(fits, name, " must be on query's CUDA device and of a shape that fits query");
}

// Rows that cp.async can copy in pieces of 16 bytes.
void check_rows(const char* name, const Tensor& x) {
  bool fits = x.stride(3) == 1 && reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) {
    fits = fits && (x.size(dim) == 1 || x.stride(dim) % 8 == 0);
  }
  STD_TORCH_CHECK(fits, name, " must have rows of contiguous channels, each at a multiple of 16 bytes");
}

struct DeviceLimits {
  int sms = 0, shared_per_sm = 0, shared_per_block = 0;
};

constexpr int kDevices = 64;

const DeviceLimits& limits_of(int device) {
  static std::array<DeviceLimits, kDevices> limits;
  static std::array<std::once_flag, kDevices> queried;
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "no more than ", kDevices, " devices");
  std::call_once(queried[device], [device] {
    DeviceLimits& x = limits[device];
    check_cuda(cudaDeviceGetAttribute(&x.sms, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    check_cuda(cudaDeviceGetAttribute(&x.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
               "shared memory");
    check_cuda(cudaDeviceGetAttribute(&x.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "shared memory");
  });
  return limits[device];
}

template <class T, int D, int kRowTiles>
void launch(const DecodeProblem& p, const DecodePlan& plan, int device, cudaStream_t stream) {
  constexpr int shared = decode_shared_bytes(D);
  static std::atomic<std::uint64_t> allowed{0}; // a bit for each device
  const auto kernel = decode_kernel<T, D, kRowTiles>;
  if ((allowed.load(std::memory_order_relaxed) >> device & 1) == 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
    allowed.fetch_or(std::uint64_t{1} << device, std::memory_order_relaxed);
  }
  kernel<<<static_cast<unsigned>(plan.blocks), kDecodeThreads, shared, stream>>>(p);
  check_cuda(cudaGetLastError(), "cross_attention's decode kernel");
  if (plan.merge_blocks > 0) {
    decode_merge_kernel<T><<<static_cast<unsigned>(plan.merge_blocks), 32 * kMergeRows, 0, stream>>>(p, D);
    check_cuda(cudaGetLastError(), "cross_attention's merge kernel");
  }
}

template <class T, int D>
void launch_rows(const DecodeProblem& p, const DecodePlan& plan, int device, cudaStream_t stream) {
  switch (decode_row_tiles(decode_rows(p.heads, p.key_heads, p.q_len))) {
  case 1:
    return launch<T, D, 1>(p, plan, device, stream);
  case 2:
    return launch<T, D, 2>(p, plan, device, stream);
  default:
    return launch<T, D, 4>(p, plan, device, stream);
  }
}

template <class T>
void launch_dim(const DecodeProblem& p, const DecodePlan& plan, i64 dim, int device, cudaStream_t stream) {
  switch (dim) {
  case 64:
    return launch_rows<T, 64>(p, plan, device, stream);
  case 80:
    return launch_rows<T, 80>(p, plan, device, stream);
  case 96:
    return launch_rows<T, 96>(p, plan, device, stream);
  default:
    return launch_rows<T, 128>(p, plan, device, stream);
  }
}

void set_mask(DecodeProblem& p, const Tensor& query, const OptionalTensor& start, const OptionalTensor& end,
              const OptionalTensor& key_valid) {
  STD_TORCH_CHECK(start.has_value() == end.has_value(), "start and end must both be given, or neither");
  if (start.has_value()) {
    check_sizes("start", *start, query, {p.batch, p.q_len}, true);
    check_sizes("end", *end, query, {p.batch, p.q_len}, true);
    STD_TORCH_CHECK(start->scalar_type() == ScalarType::Int && end->scalar_type() == ScalarType::Int,
                    "start and end must be int32");
    p.start = start->const_data_ptr<std::int32_t>();
    p.end = end->const_data_ptr<std::int32_t>();
    p.start_b = stride(*start, 0), p.start_i = stride(*start, 1);
    p.end_b = stride(*end, 0), p.end_i = stride(*end, 1);
  }
  if (key_valid.has_value()) {
    check_sizes("key_valid", *key_valid, query, {key_valid->size(0) == 1 ? 1 : p.batch, p.k_len});
    STD_TORCH_CHECK(key_valid->scalar_type() == ScalarType::Bool, "key_valid must be bool");
    p.key_valid = static_cast<const std::uint8_t*>(key_valid->const_data_ptr());
    p.valid_b = stride(*key_valid, 0), p.valid_j = stride(*key_valid, 1);
  }
}

void set_gate(DecodeProblem& p, const Tensor& query, const OptionalTensor& gate) {
  if (!gate.has_value()) {
    return;
  }
  const i64 count = gate->numel();
  STD_TORCH_CHECK(gate->is_cuda() && gate->get_device_index() == query.get_device_index() && gate->dim() <= 1 &&
                      (count == 1 || count == p.heads),
                  "gate must be a scalar or [Hq], on query's device");
  p.gate_is_float = gate->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(p.gate_is_float || gate->scalar_type() == query.scalar_type(), "gate must be float32 or as query");
  p.gate = gate->const_data_ptr();
  p.gate_h = count == 1 ? 0 : gate->stride(0);
}

DecodeProblem make_problem(const Tensor& query, const Tensor& key, const Tensor& value) {
  check_sizes("query", query, query, {-1, -1, -1, -1});
  const i64 batch = query.size(0), heads = query.size(1), q_len = query.size(2), dim = query.size(3);
  check_sizes("key", key, query, {-1, -1, -1, dim});
  const i64 key_heads = key.size(1), k_len = key.size(2);
  check_sizes("value", value, query, {key.size(0), key_heads, k_len, dim});
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "query must be bfloat16 or float16");
  STD_TORCH_CHECK(key.scalar_type() == type && value.scalar_type() == type, "key and value must have query's dtype");
  STD_TORCH_CHECK((key.size(0) == 1 || key.size(0) == batch) && key_heads > 0 && heads % key_heads == 0,
                  "key must have batch 1 or query's, and heads that divide query's");
  STD_TORCH_CHECK(decode_takes_dim(static_cast<int>(dim)) && q_len >= 1 && q_len <= kMaxDecodeQueries &&
                      heads / key_heads * q_len <= kMaxDecodeRows && decode_fits(batch, heads, q_len, k_len),
                  "the decode kernels do not support this shape");
  check_rows("query", query);
  check_rows("key", key);
  check_rows("value", value);
  DecodeProblem p{};
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr(), p.value = value.const_data_ptr();
  p.query_b = stride(query, 0), p.query_h = stride(query, 1), p.query_i = stride(query, 2);
  p.key_b = stride(key, 0), p.key_h = stride(key, 1), p.key_j = stride(key, 2);
  p.value_b = stride(value, 0), p.value_h = stride(value, 1), p.value_j = stride(value, 2);
  p.batch = static_cast<int>(batch), p.heads = static_cast<int>(heads), p.key_heads = static_cast<int>(key_heads);
  p.q_len = static_cast<int>(q_len), p.k_len = static_cast<int>(k_len);
  return p;
}

std::tuple<Tensor, Tensor> decode(Tensor query, Tensor key, Tensor value, OptionalTensor start, OptionalTensor end,
                                  OptionalTensor key_valid, OptionalTensor gate, double scale) {
  DecodeProblem p = make_problem(query, key, value);
  set_mask(p, query, start, end, key_valid);
  set_gate(p, query, gate);
  p.scale = static_cast<float>(scale * 1.4426950408889634);
  const int device = query.get_device_index(), dim = static_cast<int>(query.size(3));
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor out = torch::stable::new_empty(query, {p.batch, p.q_len, p.heads, dim});
  const Tensor lse = torch::stable::new_empty(query, {p.batch, p.heads, p.q_len}, ScalarType::Float);
  const std::tuple<Tensor, Tensor> result(torch::stable::transpose(out, 1, 2), lse);
  if (out.numel() == 0) {
    return result;
  }
  const DeviceLimits& limits = limits_of(device);
  STD_TORCH_CHECK(decode_shared_bytes(dim) <= limits.shared_per_block, "this GPU has too little shared memory");
  const DecodePlan plan =
      plan_decode(p.batch, p.heads, p.key_heads, p.q_len, p.k_len, dim, limits.sms, limits.shared_per_sm);
  p.splits = plan.splits;
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  std::optional<Tensor> partial; // freed in stream order, after the kernels below
  if (plan.partial_floats > 0) {
    partial = torch::stable::new_empty(query, {plan.partial_floats}, ScalarType::Float);
    p.partial = partial->mutable_data_ptr<float>();
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (query.scalar_type() == ScalarType::BFloat16) {
    launch_dim<Bf16>(p, plan, dim, device, static_cast<cudaStream_t>(stream));
  } else {
    launch_dim<F16>(p, plan, dim, device, static_cast<cudaStream_t>(stream));
  }
  return result;
}

} // namespace
} // namespace mmkernels

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, library) {
  library.def("cross_attention_decode_cuda(Tensor query, Tensor key, Tensor value, Tensor? start, Tensor? end, "
              "Tensor? key_valid, Tensor? gate, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, library) {
  library.impl("cross_attention_decode_cuda", TORCH_BOX(&mmkernels::decode));
}
