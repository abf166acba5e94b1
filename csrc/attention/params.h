// One attention call as the kernels see it: plain data, no torch. launch.h fills it in; the kernels, compiled once for
// each instruction set, read it.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace mmkernels {

// A [B, H, L, C] tensor; strides in elements, 0 where a dim of size 1 is shared.
struct View {
  char* data = nullptr;
  Type type = Type::f32;
  std::int64_t b = 0, h = 0, l = 0, d = 0;
};

// A [B, L] array; strides in elements, 0 where shared.
template <typename T> struct Lines {
  const T* data = nullptr;
  std::int64_t b = 0, i = 0;
};

// The valid keys of one batch entry, in rising order. Kernels count keys by their places in this list.
struct KeyList {
  const std::int32_t* index; // null: place r is key r
  std::int64_t count;
};

// The queries of one panel: `count` of them, from `first` on.
struct PanelRange {
  std::int32_t first, count;
};

struct AttentionParams {
  std::int64_t batch, heads, key_heads, q_len, k_len, dim, value_dim;
  std::int64_t key_batch; // 1 or batch
  float scale;
  float floor = -__builtin_inff(); // lower scores count as this one (co_attention's clamp)

  View query, key, value, bias; // bias.data may be null
  const float* gate = nullptr;  // tanh(gate) [heads], or null

  // The mask. `lists` has one entry for each batch entry of the keys.
  Lines<std::int32_t> start, end;
  const KeyList* lists = nullptr;
  Lines<std::uint8_t> key_valid; // only where batch entries with different masks share one list
  const std::uint8_t* dense = nullptr;
  std::int64_t dense_b = 0, dense_h = 0, dense_i = 0, dense_j = 0;
  char* words = nullptr; // dense as bits: for each (b, h, panel) of the mask and each key, a bit for each query
  std::int64_t words_b = 0, words_h = 0, words_panel = 0; // strides in words; 0 where shared

  // Where spans differ from query to query, a panel's queries are chosen so that they see much the same keys:
  // `panel_count` ranges for each batch entry, the last ones may be empty. Null: each panel holds the next queries, as
  // many as it can.
  const PanelRange* panels = nullptr;
  std::int64_t panel_count = 0;

  bool dropout = false;
  std::uint32_t seed_low = 0, seed_high = 0;
  std::uint64_t threshold = 0; // a probability is kept where its random word is at least this
  float keep_scale = 1.0f;

  // Forward. In decode, `partial` holds for each row `splits` results: out, then largest score and sum.
  View out;
  float* lse = nullptr; // [B, Hq, Lq]
  float* partial = nullptr;
  std::int64_t splits = 1;

  // Backward; data is null for a gradient that is not needed. `grad_lse` may be null.
  View grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse = nullptr;
  View grad_bias;                   // float32, added to
  std::int64_t grad_bias_split = 0; // elements from one split's sums to the next, where keys share the bias
  float* gate_rows = nullptr;       // [splits, B, Hq, Lq]: sum_j P_ij (grad_i . v_j), added to
  float* query_parts = nullptr;     // [splits, B, Hq, Lq, D] where splits > 1
  // With row_splits > 1, grad_key and grad_value are float32, one for each row split, so many elements apart.
  std::int64_t row_splits = 1, key_part = 0, value_part = 0;

  // Received attention and weights.
  View query_weights;        // l: stride along queries; data may be null
  float* received = nullptr; // [B, Hq, Lk], added to
  float* weights = nullptr;  // [B, Hq, Lq, Lk]
};

// The kernels of one instruction set. `..._scratch` functions return the bytes that one thread needs.
struct AttentionKernels {
  int panel;      // queries of a full panel
  int word_bytes; // of a mask word: a bit for each of them

  // The bits of one panel of `dense`: entry b, h of the mask.
  void (*mask_words)(const AttentionParams&, std::int64_t b, std::int64_t h, std::int64_t panel);

  // Writes one batch entry's panels to `ranges`, which has room for one a query; returns how many there are.
  std::int64_t (*plan_panels)(const AttentionParams&, std::int64_t b, PanelRange* ranges);

  // Panels first to last of key head `kv` (batch entry of the keys x heads + head), which share tiles of keys.
  std::int64_t (*forward_scratch)(const AttentionParams&, std::int64_t panels);
  void (*forward)(const AttentionParams&, std::int64_t kv, std::int64_t first, std::int64_t last, char* scratch);

  // Few queries: block `block` of `decode_rows` rows of key head `kv`, against split `split` of its keys; then the
  // splits of all rows of kv are merged.
  std::int64_t decode_rows;
  std::int64_t (*decode_scratch)(const AttentionParams&);
  void (*decode)(const AttentionParams&, std::int64_t kv, std::int64_t block, std::int64_t split, char* scratch);
  void (*decode_merge)(const AttentionParams&, std::int64_t kv);

  // Row split `row_split` of the panels that attend to key head `kv`, against split `split` of its keys; then rows
  // [row_begin, row_end) of query_parts are summed into grad_query.
  std::int64_t (*backward_scratch)(const AttentionParams&);
  void (*backward)(const AttentionParams&, std::int64_t kv, std::int64_t row_split, std::int64_t split, char* scratch);
  void (*backward_merge)(const AttentionParams&, std::int64_t row_begin, std::int64_t row_end);

  // The log-sum-exp of one panel; then columns summed over the panels of one query head (`head` of those that attend to
  // kv), for one split of the keys; or one panel's rows written.
  std::int64_t (*scores_scratch)(const AttentionParams&);
  void (*scores_lse)(const AttentionParams&, std::int64_t kv, std::int64_t panel, char* scratch);
  void (*received)(const AttentionParams&, std::int64_t kv, std::int64_t head, std::int64_t split, char* scratch);
  void (*weights)(const AttentionParams&, std::int64_t kv, std::int64_t panel, char* scratch);
  // Few queries: rows [first, first + count), at most decode_rows, of key head `kv`, with the scratch of decode.
  void (*few_weights)(const AttentionParams&, std::int64_t kv, std::int64_t first, std::int64_t count, char* scratch);
};

} // namespace mmkernels
