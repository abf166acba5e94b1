// Few queries (a decode step): all query rows that share a key head, over the group and a shared batch, against keys
// and values that are streamed once. Memory is the bound, so scores are dot products along the head dim of keys in
// place.
#pragma once

#include "decode_products.h"

namespace mmkernels::MMK_ISA {

constexpr i64 kDecodeKeys = 128; // of a tile, at most
constexpr i64 kValueKeys = 32;
// Rows of one task, which bounds its scratch. Only keys that the batch shares have more.
constexpr i64 kDecodeRows = 64;

struct DecodeRow {
  i64 b, h, i;
  Span span;
  float maximum, total;
  bool sees;
};

MMK_INLINE i64 decode_rows(const AttentionParams& p) { // of one key head
  return batches_sharing_keys(p) * group_of(p) * p.q_len;
}
inline DecodeRow decode_row(const AttentionParams& p, const KeyList& list, i64 kv, i64 row) {
  const i64 group = group_of(p), head = row / p.q_len;
  const i64 b = kv / p.key_heads + head / group, h = kv % p.key_heads * group + head % group, i = row % p.q_len;
  return {b, h, i, span_of(p, list, b, i), -kInf, 0.0f, false};
}

// Adds the bias to one row's scores of `n` places from `a` on, and hides those that the row does not see: of its span
// [first, last), counted from a. Returns whether all are visible.
inline bool hide_places(const AttentionParams& p, const KeyList& list, DecodeRow& row, i64 a, i64 n, i64 first,
                        i64 last, float* scores) {
  bool visible[kDecodeKeys];
  for (i64 j = 0; j < n; ++j) {
    visible[j] = j >= first && j < last;
  }
  if (p.dense != nullptr) {
    const std::uint8_t* dense = p.dense + row.b * p.dense_b + row.h * p.dense_h + row.i * p.dense_i;
    for (i64 j = 0; j < n; ++j) {
      visible[j] &= dense[key_at(list, a + j) * p.dense_j] != 0;
    }
  }
  if (p.key_valid.data != nullptr) {
    for (i64 j = 0; j < n; ++j) {
      visible[j] &= p.key_valid.data[row.b * p.key_valid.b + key_at(list, a + j) * p.key_valid.i] != 0;
    }
  }
  if (p.bias.data != nullptr) {
    const View& x = p.bias;
    const char* bias = row_at(x, row.b, row.h, row.i);
    for (i64 j = 0; j < n; ++j) {
      const float y = load_one(bias + key_at(list, a + j) * x.d * bytes_of(x.type), x.type);
      scores[j] += (y < kLowestBias ? kLowestBias : y) * kLog2e;
      visible[j] &= y != -kInf;
    }
  }
  bool all = true;
  for (i64 j = 0; j < n; ++j) {
    all &= visible[j];
    row.sees |= visible[j];
    scores[j] = visible[j] ? scores[j] : -kInf;
  }
  return all;
}

// Replaces one row's scores of places [a, b) by logarithms in base 2, -inf where hidden. Returns whether all are
// visible.
inline bool mask_row(const AttentionParams& p, const KeyList& list, DecodeRow& row, i64 a, i64 b, float* scores) {
  const float scale = p.scale * kLog2e;
  const i64 n = b - a, padded = pad_lanes(n);
  for (i64 j = n; j < padded; ++j) {
    scores[j] = 0.0f;
  }
  for (i64 j = 0; j < padded; j += kLanes) {
    store(scores + j, load(scores + j) * scale);
  }
  bool all = true;
  const i64 first = most(a, row.span.first) - a, last = most(least(b, row.span.last) - a, first);
  if (first > 0 || last < n || p.dense != nullptr || p.key_valid.data != nullptr || p.bias.data != nullptr) {
    all = hide_places(p, list, row, a, n, first, last, scores);
  } else {
    row.sees = true;
  }
  for (i64 j = n; j < padded; ++j) {
    scores[j] = -kInf;
  }
  return all;
}

// Replaces logarithms by weights relative to the row's maximum, in float32 or bfloat16. Returns what earlier sums must
// be multiplied by.
inline float exponentiate_row(DecodeRow& row, i64 count, float* scores, bool is_dot) {
  const i64 padded = pad_lanes(count);
  Vec maximum = set1(row.maximum);
  for (i64 j = 0; j < padded; j += kLanes) {
    maximum = max_skip_nan(maximum, load(scores + j));
  }
  const float now = largest(maximum), base = now == -kInf ? 0.0f : now;
  Vec rescale = set1(row.maximum == now ? 0.0f : row.maximum - base), total = zero();
  const Vec point = set1(base);
  for (i64 j = 0; j < padded; j += kLanes) {
    const Vec w = exp2(load(scores + j) - point);
    total += w;
    store_working((char*)scores + j * (is_dot ? 2 : 4), is_dot, w); // overwrites only what has been read
  }
  rescale = exp2(rescale);
  row.maximum = now;
  row.total = row.total * rescale[0] + sum(total);
  return rescale[0];
}

// Scratch of one task. Members are taken in the order of their declaration.
struct DecodeScratch : Arena {
  const AttentionParams& p;
  const bool is_dot = uses_dot(p.query.type);
  const i64 count = least(decode_rows(p), kDecodeRows);
  float* scores = take<float>(count * kDecodeKeys);
  float* out = take<float>(count * pad_lanes(p.value_dim));
  const i64 lanes = count > 8 ? pad_lanes(count) : 0; // see rows_are_lanes
  float* query_lanes = take<float>(lanes * depth_of(is_dot, p.dim));
  float* block = take<float>(lanes * kLanes);
  char* query = take<char>(count * row_bytes(is_dot, p.dim));
  char* key_copy = take<char>(kDecodeKeys * row_bytes(is_dot, p.dim));
  char* value_copy = take<char>(kDecodeKeys * row_bytes(is_dot, p.value_dim));
  char* value_pairs = take<char>(is_dot ? kValueKeys / 2 * pad_lanes(p.value_dim) * 4 : 0);
  char* zeroed = take<char>(kDecodeKeys * row_bytes(is_dot, p.value_dim));
  DecodeRow* rows = take<DecodeRow>(count);
};

// out += weights values, for all rows of the task. non_finite: a value may be NaN or inf, and hidden from some row.
inline void add_decoded(const DecodeScratch& s, i64 rows, Rows values, i64 count, bool non_finite) {
  const i64 cols = s.p.value_dim, padded = pad_lanes(cols);
  const Rows used = non_finite ? zero_non_finite(values, count, cols, s.is_dot, s.zeroed) : values;
  const char* weights = (const char*)s.scores;
  for (i64 k = 0; k < count; k += kValueKeys) { // few enough to stay in the first-level cache for all rows
    const i64 n = least(kValueKeys, count - k);
    const Rows part{used.data + k * used.stride, used.stride};
    if (s.is_dot) {
      interleave_rows(part, n, cols, s.value_pairs);
      add_rows<kHasDot>(weights + k * 2, kDecodeKeys * 4, rows, s.value_pairs, padded * 4, (n + 1) / 2, s.out,
                        padded / kLanes);
    } else {
      add_rows<false>(weights + k * 4, kDecodeKeys * 4, rows, part.data, part.stride, n, s.out, padded / kLanes);
    }
  }
  if (!non_finite) {
    return;
  }
  each_non_finite(values, count, cols, s.is_dot, [&](i64 j, i64 c, float x) {
    for (i64 r = 0; r < rows; ++r) {
      const char* w = (const char*)(s.scores + r * kDecodeKeys) + j * (s.is_dot ? 2 : 4);
      if (load_one(w, s.is_dot ? Type::bf16 : Type::f32) != 0.0f) {
        s.out[r * padded + c] += x;
      }
    }
  });
}

inline void write_decoded(const AttentionParams& p, const DecodeRow& row, const float* out) {
  const float gate = p.gate != nullptr ? p.gate[row.h] : 1.0f, nan = __builtin_nanf("");
  float factor = row.sees ? nan : 0.0f, lse = row.sees ? nan : -kInf;
  if (row.total != 0.0f) {
    factor = gate / row.total;
    lse = (row.maximum + __builtin_log2f(row.total)) * kLn2;
  }
  p.lse[(row.b * p.heads + row.h) * p.q_len + row.i] = lse;
  char* to = row_at(p.out, row.b, row.h, row.i);
  for (i64 c = 0; c < p.value_dim; c += kLanes) {
    const i64 n = least<i64>(kLanes, p.value_dim - c);
    store_from_f32(to + c * bytes_of(p.out.type), p.out.type, load_part(out + c, n) * factor, n);
  }
}

// An entry of `partial`, of one split and row of kv: value_dim sums, maximum, total, whether it sees any key.
MMK_INLINE float* partial_at(const AttentionParams& p, i64 kv, i64 split, i64 row) {
  return p.partial + ((kv * p.splits + split) * decode_rows(p) + row) * (p.value_dim + 3);
}

// Begins `rows` rows of kv, from row `first` on, and copies their queries. Returns the places that any of them sees.
MMK_INLINE Span begin_decode(const DecodeScratch& s, const KeyList& list, i64 kv, i64 first, i64 rows) {
  const AttentionParams& p = s.p;
  const i64 query_row = row_bytes(s.is_dot, p.dim);
  Span hull{list.count, 0};
  for (i64 r = 0; r < rows; ++r) {
    s.rows[r] = decode_row(p, list, kv, first + r);
    const DecodeRow& row = s.rows[r];
    if (row.span.first < row.span.last) {
      hull = {least(hull.first, row.span.first), most(hull.last, row.span.last)};
    }
    char* to = s.query + r * query_row;
    const Rows query = fetch(source_of(p.query, row.b, row.h, row.i), 1, p.dim, s.is_dot, to, true);
    if (query.data != to) {
      std::memcpy(to, query.data, query_row);
    }
  }
  if (const i64 depth = depth_of(s.is_dot, p.dim); rows_are_lanes(rows, depth, s.is_dot)) {
    transpose_rows({s.query, query_row}, rows, depth, pad_lanes(rows), s.query_lanes);
  }
  std::memset(s.out, 0, rows * pad_lanes(p.value_dim) * 4);
  return hull;
}

// Keys of one tile: as many as leave room for the next tile in the second-level cache.
MMK_INLINE i64 decode_keys(const AttentionParams& p) {
  constexpr i64 kTileBytes = 1 << 17;
  const i64 fit = kTileBytes / row_bytes(uses_dot(p.query.type), p.dim) / kValueKeys * kValueKeys;
  return most(kValueKeys, least(kDecodeKeys, fit));
}

// The key rows of places [a, a + n).
MMK_INLINE Rows decode_key_rows(const DecodeScratch& s, const KeyList& list, i64 kv, i64 a, i64 n) {
  const AttentionParams& p = s.p;
  const Source source = at_keys(source_of(p.key, kv / p.key_heads, kv % p.key_heads), list, a, n);
  return fetch(source, n, p.dim, s.is_dot, s.key_copy);
}

// Multiplies the queries with n keys, and asks for what is read next.
MMK_INLINE void score_keys(const DecodeScratch& s, Rows keys, i64 n, i64 rows, Ahead values = {},
                           Ahead next_keys = {}) {
  const i64 query_row = row_bytes(s.is_dot, s.p.dim), depth = depth_of(s.is_dot, s.p.dim);
  with_pairs(s.is_dot, [&](auto pairs) {
    if (rows_are_lanes(rows, depth, s.is_dot)) {
      lane_rows<pairs()>(s.query_lanes, pad_lanes(rows), rows, keys, n, depth, s.block, s.scores, kDecodeKeys, values,
                         next_keys);
    } else {
      dot_rows<pairs()>(s.query, query_row, rows, keys, n, depth, s.scores, kDecodeKeys, values, next_keys);
    }
  });
}

// Replaces the scores of places [a, a + n) by weights, and rescales earlier sums. Returns whether every row sees all of
// these keys.
MMK_INLINE bool weigh_keys(const DecodeScratch& s, const KeyList& list, i64 a, i64 n, i64 rows) {
  const AttentionParams& p = s.p;
  const i64 padded = pad_lanes(p.value_dim);
  bool all = true;
  for (i64 r = 0; r < rows; ++r) {
    float* scores = s.scores + r * kDecodeKeys;
    all &= mask_row(p, list, s.rows[r], a, a + n, scores);
    const float rescale = exponentiate_row(s.rows[r], n, scores, s.is_dot);
    if (rescale != 1.0f) {
      for (i64 c = 0; c < padded; c += kLanes) {
        float* at = s.out + r * padded + c;
        store(at, load(at) * rescale);
      }
    }
  }
  return all;
}

// Whether a value is the first columns of its key, as in a latent cache, so that a tile is read for both.
MMK_INLINE bool value_is_key(const AttentionParams& p) {
  const View &k = p.key, &v = p.value;
  return k.data == v.data && p.value_dim <= p.dim && k.b == v.b && k.h == v.h && k.l == v.l && k.d == v.d;
}

inline void decode(const AttentionParams& p, i64 kv, i64 block, i64 split, char* memory) {
  const DecodeScratch s{{memory}, p};
  const KeyList list = list_of(p, kv);
  const i64 first_row = block * kDecodeRows, rows = least(kDecodeRows, decode_rows(p) - first_row);
  const Span hull = begin_decode(s, list, kv, first_row, rows);
  const i64 share = most<i64>(0, hull.last - hull.first + p.splits - 1) / p.splits;
  const i64 first = hull.first + split * share, last = least(hull.last, first + share);
  const i64 tile = decode_keys(p), b = kv / p.key_heads, h = kv % p.key_heads;
  const bool shared = value_is_key(p);
  for (i64 a = first; a < last; a += tile) {
    const i64 n = least(tile, last - a);
    const Source source = at_keys(source_of(p.value, b, h), list, a, n);
    Ahead next_keys;
    if (const i64 left = least(tile, last - a - n); left > 0) {
      next_keys = Ahead::of(at_keys(source_of(p.key, b, h), list, a + n, left), left, p.dim);
    }
    const Rows keys = decode_key_rows(s, list, kv, a, n);
    score_keys(s, keys, n, rows, shared ? Ahead{} : Ahead::of(source, n, p.value_dim), next_keys);
    const bool all = weigh_keys(s, list, a, n, rows);
    const bool copied = keys.data == s.key_copy; // in the working format, as values have to be
    const Rows values = shared && copied ? keys : fetch(source, n, p.value_dim, s.is_dot, s.value_copy, !s.is_dot);
    add_decoded(s, rows, values, n, !all && !all_finite(values, n, p.value_dim, s.is_dot));
  }
  for (i64 r = 0; r < rows; ++r) {
    const DecodeRow& row = s.rows[r];
    const float* out = s.out + r * pad_lanes(p.value_dim);
    if (p.splits == 1) {
      write_decoded(p, row, out);
      continue;
    }
    float* to = partial_at(p, kv, split, first_row + r);
    std::memcpy(to, out, p.value_dim * 4);
    to[p.value_dim] = row.maximum;
    to[p.value_dim + 1] = row.total;
    to[p.value_dim + 2] = row.sees ? 1.0f : 0.0f;
  }
}

// Merges the splits of each row of kv, in their order.
inline void decode_merge(const AttentionParams& p, i64 kv) {
  const KeyList list = list_of(p, kv);
  const i64 dim = p.value_dim;
  for (i64 r = 0; r < decode_rows(p); ++r) {
    DecodeRow row = decode_row(p, list, kv, r);
    float* into = partial_at(p, kv, 0, r);
    row.maximum = into[dim];
    for (i64 s = 1; s < p.splits; ++s) {
      row.maximum = most(row.maximum, partial_at(p, kv, s, r)[dim]);
    }
    const float base = row.maximum == -kInf ? 0.0f : row.maximum;
    for (i64 s = 0; s < p.splits; ++s) {
      const float* part = partial_at(p, kv, s, r);
      const float by = exp2(set1(part[dim] - base))[0];
      row.total += part[dim + 1] * (part[dim + 1] == 0.0f ? 1.0f : by);
      row.sees |= part[dim + 2] != 0.0f;
      for (i64 c = 0; c < dim; ++c) {
        const float x = part[c] == 0.0f ? 0.0f : part[c] * by;
        into[c] = s == 0 ? x : into[c] + x;
      }
    }
    write_decoded(p, row, into);
  }
}

} // namespace mmkernels::MMK_ISA
