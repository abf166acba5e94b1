// One call of an attention op: its arguments as the plain data that the kernels take, and how the work is cut.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/arguments.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "params.h"

namespace mmkernels {

MMK_TABLES(AttentionKernels, attention_kernels)

// A 4-D tensor; a dim of size 1 gets stride 0, the last one only where columns may be shared.
inline View view_of(const Tensor& x, bool shared_columns = false) {
  View v;
  v.data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  v.type = type_of(x);
  v.b = shared_stride(x, 0);
  v.h = shared_stride(x, 1);
  v.l = shared_stride(x, 2);
  v.d = x.size(3) == 1 ? (shared_columns ? 0 : 1) : x.stride(3);
  return v;
}

template <typename T> Lines<T> lines_of(const Tensor& x, const T* data) {
  return {data, shared_stride(x, 0), shared_stride(x, 1)};
}

inline void set_dropout_p(AttentionParams& p, double dropout_p) {
  p.dropout = true;
  p.threshold = static_cast<std::uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
  p.keep_scale = dropout_p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - dropout_p));
}

// Packs the dense mask of p into words, the memory that is returned.
inline Tensor pack_dense_mask(AttentionParams& p, const AttentionKernels& k) {
  const i64 batch = p.dense_b == 0 ? 1 : p.batch, heads = p.dense_h == 0 ? 1 : p.heads;
  const i64 count = p.dense_i == 0 ? 1 : (p.q_len + k.panel - 1) / k.panel;
  const Tensor words = at::empty({batch * heads * count * p.k_len * k.word_bytes}, at::kByte);
  p.words = static_cast<char*>(words.mutable_data_ptr());
  p.words_panel = count == 1 ? 0 : p.k_len;
  p.words_h = heads == 1 ? 0 : count * p.k_len;
  p.words_b = batch == 1 ? 0 : heads * count * p.k_len;
  const int threads = batch * heads * p.q_len * p.k_len < (1 << 16) ? 1 : available_threads();
  parallel_tasks(batch * heads * count, threads, 0,
                 [&](i64 i, char*) { k.mask_words(p, i / (heads * count), i / count % heads, i % count); });
  return words;
}

// The arguments that every attention op has, and the memory that the params point to. The tensors of the call outlive
// it.
class AttentionLaunch {
public:
  AttentionParams p{};
  const AttentionKernels& k = attention_kernels(); // once: another thread may choose another instruction set meanwhile

  // Takes query, key and scale.
  explicit AttentionLaunch(const Arguments& args) {
    const Tensor &query = args.tensor("query"), &key = args.tensor("key");
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
    p.scale = static_cast<float>(args.number("scale"));
    p.query = view_of(query);
    p.key = view_of(key);
  }

  void set_value(const Arguments& args) {
    const Tensor &key = args.tensor("key"), &value = args.tensor("value");
    check_sizes("value", value, {key.size(0), key.size(1), key.size(2), -1});
    TORCH_CHECK_TYPE(value.scalar_type() == key.scalar_type(), "value must have key's dtype");
    p.value = view_of(value);
    p.value_dim = value.size(3);
  }

  // Takes start, end, key_valid and dense.
  void set_mask(const Arguments& args) {
    const OptionalTensor start = args.optional_tensor("start"), end = args.optional_tensor("end"),
                         key_valid = args.optional_tensor("key_valid"), dense = args.optional_tensor("dense");
    if (start.has_value() && end.has_value()) {
      check_sizes("start", *start, {p.batch, p.q_len}, true);
      check_sizes("end", *end, {p.batch, p.q_len}, true);
      p.start = lines_of(*start, start->const_data_ptr<std::int32_t>());
      p.end = lines_of(*end, end->const_data_ptr<std::int32_t>());
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
        p.dense = static_cast<const std::uint8_t*>(dense->const_data_ptr());
        p.dense_b = shared_stride(*dense, 0), p.dense_h = shared_stride(*dense, 1);
        p.dense_i = shared_stride(*dense, 2), p.dense_j = shared_stride(*dense, 3);
      }
    }
  }

  void set_bias(const OptionalTensor& bias) {
    if (bias.has_value()) {
      check_sizes("bias", *bias, {p.batch, p.heads, p.q_len, p.k_len}, true);
      p.bias = view_of(*bias, true);
    }
  }

  void set_gate(const OptionalTensor& gate) {
    if (gate.has_value()) {
      TORCH_CHECK_VALUE(gate->numel() == 1 || gate->numel() == p.heads, "gate must have 1 or ", p.heads, " elements");
      tanh_gate_ = gate->to(at::kFloat).tanh().expand({p.heads}).contiguous();
      p.gate = tanh_gate_.const_data_ptr<float>();
    }
  }

  // Takes seed and dropout_p.
  void set_dropout(const Arguments& args) {
    const OptionalTensor seed = args.optional_tensor("seed");
    if (seed.has_value()) {
      check_sizes("seed", *seed, {1});
      const auto bits = static_cast<std::uint64_t>(*seed->const_data_ptr<i64>());
      p.seed_low = static_cast<std::uint32_t>(bits);
      p.seed_high = static_cast<std::uint32_t>(bits >> 32);
      set_dropout_p(p, args.number("dropout_p"));
    }
  }

  // Prepares the mask for panels of queries: which queries make a panel, and the dense mask as bits, once for all heads
  // and passes over it.
  void plan_panels() {
    if (p.dense != nullptr) {
      words_ = pack_dense_mask(p, k);
    } else if (p.start.i != 0 || p.end.i != 0) {
      group_queries();
    }
  }

  const Tensor& tanh_gate() const { // [heads]
    return tanh_gate_;
  }
  i64 key_head_count() const {
    return p.key_batch * p.key_heads;
  }
  // Query rows that attend to one key head.
  i64 rows_of_key_head() const {
    return (p.key_batch == p.batch ? 1 : p.batch) * (p.heads / p.key_heads) * p.q_len;
  }
  i64 panels_of_key_head() const {
    const i64 of_head = p.panels != nullptr ? p.panel_count : (p.q_len + k.panel - 1) / k.panel;
    return rows_of_key_head() / std::max<i64>(1, p.q_len) * of_head;
  }
  double pairs() const { // of a query and a key
    return static_cast<double>(p.batch) * p.heads * p.q_len * p.k_len;
  }

private:
  // The valid keys of each batch entry of the keys. Keys that the batch shares: those that are valid for any query
  // batch entry.
  void list_keys(const Tensor& valid) {
    const auto bytes = lines_of(valid, static_cast<const std::uint8_t*>(valid.const_data_ptr())); // not 0: true
    const i64 sharing = p.key_batch < p.batch && valid.size(0) > 1 ? p.batch : 1;
    index_.resize(p.key_batch);
    for (i64 b = 0; b < p.key_batch; ++b) {
      if (b > 0 && bytes.b == 0) {
        lists_.push_back(lists_[0]);
        continue;
      }
      for (i64 j = 0; j < p.k_len; ++j) {
        bool any = false;
        for (i64 query_b = b; query_b < b + sharing; ++query_b) {
          any |= bytes.data[query_b * bytes.b + j * bytes.i] != 0;
        }
        if (any) {
          index_[b].push_back(static_cast<std::int32_t>(j));
        }
      }
      const i64 count = static_cast<i64>(index_[b].size());
      lists_.push_back({count == p.k_len ? nullptr : index_[b].data(), count});
    }
    p.lists = lists_.data();
    if (sharing > 1) {
      p.key_valid = bytes;
    }
  }

  void group_queries() {
    const bool shared = p.start.b == 0 && p.end.b == 0;
    std::vector<std::vector<PanelRange>> ranges(shared ? 1 : p.batch, std::vector<PanelRange>(p.q_len));
    for (std::size_t b = 0; b < ranges.size(); ++b) {
      ranges[b].resize(k.plan_panels(p, static_cast<i64>(b), ranges[b].data()));
      p.panel_count = std::max<i64>(p.panel_count, static_cast<i64>(ranges[b].size()));
    }
    for (i64 b = 0; b < p.batch; ++b) {
      std::vector<PanelRange>& of_batch = ranges[shared ? 0 : b];
      of_batch.resize(p.panel_count, {static_cast<std::int32_t>(p.q_len), 0});
      panels_.insert(panels_.end(), of_batch.begin(), of_batch.end());
    }
    p.panels = panels_.data();
  }

  std::vector<std::vector<std::int32_t>> index_;
  std::vector<KeyList> lists_;
  std::vector<PanelRange> panels_;
  Tensor tanh_gate_, words_;
};

} // namespace mmkernels
