// One call of an attention op: the instruction set's kernels, and tensors as the plain data that those take.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../common/choice.h"
#include "../common/parallel.h"
#include "../common/tensors.h"
#include "problem.h"

namespace mmkernels {

#if defined(MMKERNELS_X86)
extern const Kernels kernels_avx512_bf16, kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_plain;

inline const Kernels& kernels() {
  return MMKERNELS_CHOSEN(kernels);
}

// A 4-D tensor; a dim of size 1 gets stride 0.
inline View view_of(const Tensor& x) {
  const auto stride = [&](int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
  View v;
  v.data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  v.type = type_of(x);
  v.b = stride(0);
  v.h = stride(1);
  v.l = stride(2);
  v.d = x.size(3) == 1 ? 1 : x.stride(3);
  return v;
}
inline View bias_of(const Tensor& x) {
  View v = view_of(x);
  v.d = x.size(3) == 1 ? 0 : x.stride(3);
  return v;
}

// A problem and what its pointers point to.
struct Call {
  Problem p{};
  const Kernels& k = kernels(); // once: another thread may choose another instruction set meanwhile
  std::vector<std::vector<std::int32_t>> index;
  std::vector<KeyList> lists;
  std::vector<PanelRange> panels;
  Tensor factor, words;

  Call(const Tensor& query, const Tensor& key, double scale) {
    check_sizes("query", query, {-1, -1, -1, -1});
    check_sizes("key", key, {-1, -1, -1, query.size(3)});
    TORCH_CHECK_VALUE((key.size(0) == 1 || key.size(0) == query.size(0)) && key.size(1) > 0 && query.size(3) > 0 &&
                          query.size(1) % key.size(1) == 0 && key.scalar_type() == query.scalar_type(),
                      "key must fit query ", query.sizes(), ", got ", key.sizes());
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.q_len = query.size(2);
    p.dim = query.size(3);
    p.key_batch = p.batch == 0 ? 0 : key.size(0);
    p.key_heads = key.size(1);
    p.k_len = key.size(2);
    p.scale = static_cast<float>(scale);
    p.query = view_of(query);
    p.key = view_of(key);
  }

  void set_value(const Tensor& value, const Tensor& key) {
    check_sizes("value", value, {key.size(0), key.size(1), key.size(2), -1});
    TORCH_CHECK_TYPE(value.scalar_type() == key.scalar_type(), "value must have key's dtype");
    p.value = view_of(value);
    p.value_dim = value.size(3);
  }

  void set_mask(const OptionalTensor& start, const OptionalTensor& end, const OptionalTensor& key_valid,
                const OptionalTensor& dense) {
    if (start.has_value() && end.has_value()) {
      check_sizes("start", *start, {p.batch, p.q_len}, true);
      check_sizes("end", *end, {p.batch, p.q_len}, true);
      const auto stride = [](const Tensor& x, int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
      p.start = start->const_data_ptr<std::int32_t>();
      p.end = end->const_data_ptr<std::int32_t>();
      p.start_b = stride(*start, 0), p.start_i = stride(*start, 1);
      p.end_b = stride(*end, 0), p.end_i = stride(*end, 1);
    }
    if (key_valid.has_value()) {
      check_sizes("key_valid", *key_valid, {key_valid->size(0) == 1 ? 1 : p.batch, p.k_len});
      list_keys(*key_valid);
    }
    if (dense.has_value()) {
      check_sizes("dense", *dense, {p.batch, p.heads, p.q_len, p.k_len}, true);
      if (dense->size(1) == 1 && dense->size(2) == 1 && !key_valid.has_value()) {
        list_keys(dense->select(2, 0).select(1, 0).expand({dense->size(0), p.k_len}));
      } else {
        const auto stride = [&](int dim) { return dense->size(dim) == 1 ? 0 : dense->stride(dim); };
        p.dense = static_cast<const std::uint8_t*>(dense->const_data_ptr());
        p.dense_b = stride(0), p.dense_h = stride(1), p.dense_i = stride(2), p.dense_j = stride(3);
      }
    }
  }

  // The valid keys of each batch entry of the keys; of a shared one, those valid for anybody.
  void list_keys(const Tensor& valid) {
    const auto* data = static_cast<const std::uint8_t*>(valid.const_data_ptr()); // any byte but 0 is true
    const i64 b_stride = valid.size(0) == 1 ? 0 : valid.stride(0), j_stride = valid.stride(1);
    const i64 users = p.key_batch < p.batch && valid.size(0) > 1 ? p.batch : 1;
    index.resize(p.key_batch);
    for (i64 b = 0; b < p.key_batch; ++b) {
      if (b > 0 && b_stride == 0) {
        lists.push_back(lists[0]);
        continue;
      }
      for (i64 j = 0; j < p.k_len; ++j) {
        bool any = false;
        for (i64 u = b; u < b + users; ++u) {
          any |= data[u * b_stride + j * j_stride] != 0;
        }
        if (any) {
          index[b].push_back(static_cast<std::int32_t>(j));
        }
      }
      const i64 count = static_cast<i64>(index[b].size());
      lists.push_back({count == p.k_len ? nullptr : index[b].data(), count});
    }
    p.lists = lists.data();
    if (users > 1) {
      p.key_valid = data;
      p.valid_b = b_stride, p.valid_j = j_stride;
    }
  }

  // What the mask means to panels of queries: which queries to take together, and the dense mask as bits, once for all
  // heads and passes over it.
  void plan_panels() {
    if (p.dense == nullptr) {
      if (p.start_i != 0 || p.end_i != 0) {
        const bool same = p.start_b == 0 && p.end_b == 0;
        std::vector<std::vector<PanelRange>> found(same ? 1 : p.batch, std::vector<PanelRange>(p.q_len));
        for (std::size_t b = 0; b < found.size(); ++b) {
          found[b].resize(k.plan_panels(p, static_cast<i64>(b), found[b].data()));
          p.panel_count = std::max<i64>(p.panel_count, static_cast<i64>(found[b].size()));
        }
        for (i64 b = 0; b < p.batch; ++b) {
          std::vector<PanelRange>& of_batch = found[same ? 0 : b];
          of_batch.resize(p.panel_count, {static_cast<std::int32_t>(p.q_len), 0});
          panels.insert(panels.end(), of_batch.begin(), of_batch.end());
        }
        p.panels = panels.data();
      }
      return;
    }
    const i64 batch = p.dense_b == 0 ? 1 : p.batch, heads = p.dense_h == 0 ? 1 : p.heads;
    const i64 count = p.dense_i == 0 ? 1 : (p.q_len + k.panel - 1) / k.panel;
    words = at::empty({batch * heads * count * p.k_len * k.word_bytes}, at::kByte);
    p.words = static_cast<char*>(words.mutable_data_ptr());
    p.words_panel = count == 1 ? 0 : p.k_len;
    p.words_h = heads == 1 ? 0 : count * p.k_len;
    p.words_b = batch == 1 ? 0 : heads * count * p.k_len;
    const int threads = batch * heads * p.q_len * p.k_len < (1 << 16) ? 1 : available_threads();
    parallel_tasks(batch * heads * count, threads, 0,
                   [&](i64 i, char*) { k.mask_words(p, i / (heads * count), i / count % heads, i % count); });
  }

  void set_rest(const OptionalTensor& bias, const OptionalTensor& gate, const OptionalTensor& seed, double dropout_p) {
    if (bias.has_value()) {
      check_sizes("bias", *bias, {p.batch, p.heads, p.q_len, p.k_len}, true);
      p.bias = bias_of(*bias);
    }
    if (gate.has_value()) {
      TORCH_CHECK_VALUE(gate->numel() == 1 || gate->numel() == p.heads, "gate must have 1 or ", p.heads, " elements");
      factor = gate->to(at::kFloat).tanh().expand({p.heads}).contiguous();
      p.factor = factor.const_data_ptr<float>();
    }
    if (seed.has_value()) {
      check_sizes("seed", *seed, {1});
      const auto value = static_cast<std::uint64_t>(*seed->const_data_ptr<i64>());
      p.dropout = true;
      p.seed_low = static_cast<std::uint32_t>(value);
      p.seed_high = static_cast<std::uint32_t>(value >> 32);
      p.threshold = static_cast<std::uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
      p.keep_scale = dropout_p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - dropout_p));
    }
  }

  i64 key_head_count() const {
    return p.key_batch * p.key_heads;
  }
  // Query rows that look at one key head.
  i64 rows_of_key_head() const {
    return (p.key_batch == p.batch ? 1 : p.batch) * (p.heads / p.key_heads) * p.q_len;
  }
  i64 panels_of_key_head() const {
    const i64 of_head = p.panels != nullptr ? p.panel_count : (p.q_len + k.panel - 1) / k.panel;
    return rows_of_key_head() / std::max<i64>(1, p.q_len) * of_head;
  }
  double pairs() const {
    return static_cast<double>(p.batch) * p.heads * p.q_len * p.k_len;
  }
  // Threads worth starting: that costs some 4 microseconds, in which a core does about 400,000 operations.
  int threads(double operations) const {
    return operations < 4e5 ? 1 : available_threads();
  }
};

} // namespace mmkernels
