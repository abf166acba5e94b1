// Space to depth on the CPU. A row of the output is gathered token by token; with a norm it lies in float32 in scratch,
// within the first-level cache, while its statistics are summed.
#pragma once

#include "../common/rows.h"
#include "merge_patches.h"
#include "norm.h"
#include "stream.h"

namespace mmkernels::MMK_ISA {

struct MergeScratch : Arena {
  const MergePatches& p;
  const char** source = take<const char*>(p.patches); // of each patch; null: padding
  char** target = take<char*>(p.patches);             // of its gradient
  char** part = take<char*>(p.patches);               // a row by patches, within `parts`
  char* parts = take<char>(p.patches * p.channels * 4);
  char* zeros = take<char>(p.channels * 4);
  NormStatistics* statistics = take<NormStatistics>(p.patches); // of each patch
  float* row = take<float>(p.norm ? p.patches * p.channels + kLanes : 0);
  float* grad = take<float>(p.norm ? p.patches * p.channels + kLanes : 0);

  // Call once there is memory.
  void prepare() const {
    std::memset(zeros, 0, p.channels * 4);
    for (i64 k = 0; k < p.patches; ++k) {
      part[k] = parts + k * p.channels * bytes_of(p.type);
    }
  }
};

inline i64 merge_scratch(const MergePatches& p) {
  return scratch_bytes<MergeScratch>(p);
}

// Fills in where the patches of row `row` of an image lie.
inline void find_patches(const MergePatches& p, const PatchImage& image, i64 row, const MergeScratch& s) {
  if (p.grouped) {
    for (i64 k = 0; k < p.patches; ++k) {
      const i64 at = row * p.patches + k;
      s.source[k] = image.x != nullptr ? image.x + at * p.x_stride : nullptr;
      s.target[k] = image.grad_x != nullptr ? image.grad_x + at * p.channels * bytes_of(p.type) : nullptr;
    }
    return;
  }
  const i64 w0 = row % image.rows[2] * p.window[2], of_frame = row / image.rows[2];
  const i64 h0 = of_frame % image.rows[1] * p.window[1], t0 = of_frame / image.rows[1] * p.window[0];
  i64 k = 0;
  for (i64 t = t0; t < t0 + p.window[0]; ++t) {
    for (i64 h = h0; h < h0 + p.window[1]; ++h) {
      for (i64 w = w0; w < w0 + p.window[2]; ++w, ++k) {
        const bool inside = t < image.size[0] && h < image.size[1] && w < image.size[2];
        const i64 at = (t * image.size[1] + h) * image.size[2] + w;
        s.source[k] = inside && image.x != nullptr ? image.x + at * p.x_stride : nullptr;
        s.target[k] = inside && image.grad_x != nullptr ? image.grad_x + at * p.channels * bytes_of(p.type) : nullptr;
      }
    }
  }
}

// Calls f(row) for rows [first, last), once the scratch knows their patches.
template <typename F>
MMK_INLINE void each_merged_row(const MergePatches& p, i64 first, i64 last, const MergeScratch& s, const F& f) {
  each_row_of_images(p.images, p.image_count, first, last, [&](const PatchImage& image, i64 row) MMK_INLINED {
    find_patches(p, image, row - image.row, s);
    f(row);
  });
}

// [patches][channels] of several places to [channels][patches].
template <int kPatches, typename E>
MMK_OUTLINE void interleave_few(const char* const* from, i64 channels, E* __restrict to) {
  const E* __restrict part[kPatches];
  for (int k = 0; k < kPatches; ++k) {
    part[k] = (const E*)from[k];
  }
  for (i64 c = 0; c < channels; ++c) {
    for (int k = 0; k < kPatches; ++k) {
      to[c * kPatches + k] = part[k][c];
    }
  }
}
template <typename E> void interleave(const char* const* from, i64 patches, i64 channels, E* to) {
  if (patches == 2 || patches == 4) {
    patches == 2 ? interleave_few<2>(from, channels, to) : interleave_few<4>(from, channels, to);
    return;
  }
  for (i64 c = 0; c < channels; ++c) {
    for (i64 k = 0; k < patches; ++k) {
      to[c * patches + k] = ((const E*)from[k])[c];
    }
  }
}

// [channels][patches] to [patches][channels] at several places; null: left out.
template <int kPatches, typename E>
MMK_OUTLINE void separate_few(const E* __restrict from, i64 channels, char* const* to) {
  E* __restrict part[kPatches];
  for (int k = 0; k < kPatches; ++k) {
    part[k] = (E*)to[k];
  }
  for (i64 c = 0; c < channels; ++c) {
    for (int k = 0; k < kPatches; ++k) {
      part[k][c] = from[c * kPatches + k];
    }
  }
}
template <typename E> void separate(const E* from, i64 patches, i64 channels, char* const* to) {
  bool whole = true;
  for (i64 k = 0; k < patches; ++k) {
    whole = whole && to[k] != nullptr;
  }
  if (whole && (patches == 2 || patches == 4)) {
    patches == 2 ? separate_few<2>(from, channels, to) : separate_few<4>(from, channels, to);
    return;
  }
  for (i64 k = 0; k < patches; ++k) {
    for (i64 c = 0; to[k] != nullptr && c < channels; ++c) {
      ((E*)to[k])[c] = from[c * patches + k];
    }
  }
}
// By the size of the elements, whose values do not matter.
inline void interleave_any(const MergePatches& p, const char* const* from, char* to) {
  p.type == Type::f32 ? interleave(from, p.patches, p.channels, (std::uint32_t*)to)
                      : interleave(from, p.patches, p.channels, (std::uint16_t*)to);
}
inline void separate_any(const MergePatches& p, const char* from, char* const* to) {
  p.type == Type::f32 ? separate((const std::uint32_t*)from, p.patches, p.channels, to)
                      : separate((const std::uint16_t*)from, p.patches, p.channels, to);
}

// The patches as they are, to a row of the output.
inline void copy_patches(const MergePatches& p, const MergeScratch& s, char* to) {
  const i64 bytes = p.channels * bytes_of(p.type);
  if (p.channel_major) {
    for (i64 k = 0; k < p.patches; ++k) {
      s.source[k] = s.source[k] != nullptr ? s.source[k] : s.zeros;
    }
    char* whole = p.past_caches ? s.parts : to;
    interleave_any(p, s.source, whole);
    if (whole != to) {
      copy_row(to, whole, p.patches * bytes, true);
    }
    return;
  }
  for (i64 k = 0; k < p.patches;) {
    if (s.source[k] == nullptr) {
      std::memset(to + k * bytes, 0, bytes);
      ++k;
      continue;
    }
    i64 run = 1; // of patches that follow each other in memory
    while (k + run < p.patches && s.source[k + run] == s.source[k] + run * bytes) {
      ++run;
    }
    copy_row(to + k * bytes, s.source[k], run * bytes, p.past_caches);
    k += run;
  }
}

// Which elements of a row in float32 are normalized together, and with which weights.
struct Pieces {
  i64 count, length; // length elements each
  MMK_INLINE explicit Pieces(const MergePatches& p)
      : count(p.first ? p.patches : 1), length(p.first ? p.channels : p.patches * p.channels) {}
};

// Loads the patches in float32, and sums the statistics of each, or of all.
inline void load_patches(const MergePatches& p, const MergeScratch& s) {
  const i64 size = bytes_of(p.type), ahead = (p.grouped ? p.patches : p.window[2]) * p.x_stride;
  const Pieces pieces(p);
  const auto source = [&](i64 k) { return s.source[k] != nullptr ? s.source[k] : s.zeros; };
  float total = 0.0f, squares = 0.0f;
  for (i64 k = 0; k < p.patches; ++k) {
    const float part = load_row(source(k), p.type, p.channels, s.row + k * p.channels);
    total = (p.first ? 0.0f : total) + part;
    s.statistics[k].mean = p.centred ? total / pieces.length : 0.0f;
  }
  for (i64 k = 0; k < p.patches; ++k) {
    const float mean = s.statistics[p.first ? k : p.patches - 1].mean;
    const float part = squares_about(s.row + k * p.channels, p.channels, mean, source(k) + ahead, size);
    squares = (p.first ? 0.0f : squares) + part;
    s.statistics[p.first ? k : 0] = {mean, norm_scale(squares, pieces.length, p.eps)};
  }
}

inline void merge_patches(const MergePatches& p, i64 first, i64 last, char* memory) {
  const MergeScratch s{{memory}, p};
  const i64 size = bytes_of(p.type);
  const Pieces pieces(p);
  s.prepare();
  each_merged_row(p, first, last, s, [&](i64 row) {
    char* to = p.y + row * p.y_stride;
    if (!p.norm) {
      copy_patches(p, s, to);
      return;
    }
    load_patches(p, s);
    char* normal = p.channel_major ? s.parts : to;
    for (i64 n = 0; n < pieces.count; ++n) {
      char* piece = normal + n * pieces.length * size;
      if (!p.first || s.source[n] != nullptr) {
        const bool past_caches = p.past_caches && !p.channel_major && (std::uintptr_t)piece % 64 == 0;
        normalize(s.row + n * pieces.length, pieces.length, s.statistics[n], p.weight, p.bias, p.type, piece,
                  past_caches);
      } else {
        std::memset(piece, 0, pieces.length * size);
      }
    }
    if (p.channel_major) {
      char* whole = p.past_caches ? (char*)s.row : to;
      interleave_any(p, s.part, whole);
      if (whole != to) {
        copy_row(to, whole, p.patches * p.channels * size, true);
      }
    }
  });
  end_stream(p.past_caches);
}

inline void merge_patches_backward(const MergePatches& p, i64 first, i64 last, float* grad_weight, float* grad_bias,
                                   char* memory) {
  const MergeScratch s{{memory}, p};
  const i64 size = bytes_of(p.type), bytes = p.channels * size;
  const Pieces pieces(p);
  s.prepare();
  each_merged_row(p, first, last, s, [&](i64 row) {
    const char* from = p.grad_y + row * p.y_stride;
    if (!p.norm && p.channel_major) {
      separate_any(p, from, s.target);
      return;
    }
    if (p.norm && p.channel_major) {
      separate_any(p, from, s.part);
      from = s.parts;
    }
    if (p.norm) {
      load_patches(p, s);
      load_row(from, p.type, p.patches * p.channels, s.grad);
      for (i64 n = 0; n < pieces.count; ++n) {
        if (!p.first || s.source[n] != nullptr) {
          normalize_backward(s.row + n * pieces.length, s.grad + n * pieces.length, pieces.length, s.statistics[n],
                             p.centred, p.weight, grad_weight, grad_bias);
        }
      }
    }
    for (i64 k = 0; k < p.patches; ++k) {
      if (s.target[k] != nullptr && p.norm) {
        char* narrow = p.past_caches ? s.parts : s.target[k];
        store_row(s.grad + k * p.channels, p.channels, p.type, narrow);
        if (narrow != s.target[k]) {
          copy_row(s.target[k], narrow, bytes, true);
        }
      } else if (s.target[k] != nullptr) {
        copy_row(s.target[k], from + k * bytes, bytes, p.past_caches);
      }
    }
  });
  end_stream(p.past_caches);
}

} // namespace mmkernels::MMK_ISA
