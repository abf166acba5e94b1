// token_similarity on the CPU. The public function has checked the arguments.
//
// A mean reads x and others once: their bytes are its least time; measured on Zen 5, one thread, at 75 % of the speed
// at which `max` reads x in float32, 50 % in bfloat16. The largest and smallest are products of all pairs, 2 FLOP each
// a channel, by tiles that stay in the caches: as fast as a matrix product of the same size, with 2,048 others. Fewer
// are padded to whole vectors, so 20 others cost as much as 32.
#include <ATen/EmptyTensor.h>

#include <cmath>
#include <limits>

#include "cosine_params.h"
#include "launch.h"
#include "pieces.h"

namespace mmkernels {

MMK_TABLES(CosineKernels, cosine_kernels)
MMK_TABLES(NearestKernels, nearest_kernels)

namespace {

constexpr i64 kRows = 64; // of a task of a mean

// The arguments of a call, image by image.
struct Images {
  std::vector<i64> lengths, other_lengths;
  std::vector<TokenMatrix> x, others;
  std::vector<float*> to;
  i64 channels;
  double bytes; // of x and others
};

// Calls run(piece) for all pieces.
template <typename F> void for_pieces(const std::vector<Piece>& pieces, int threads, i64 scratch, const F& run) {
  parallel_tasks(static_cast<i64>(pieces.size()), threads, scratch,
                 [&](i64 task, char* own) { run(pieces[task], own, task); });
}

void mean(const Images& images) {
  const CosineKernels& k = cosine_kernels();
  const i64 channels = images.channels;
  const int threads = threads_for_bytes(images.bytes);
  // The sums of pieces, which are then added in their order: the result does not depend on the threads.
  const std::vector<Piece> parts = pieces_of(images.other_lengths, kRows);
  const Workspace memory(std::max<i64>(static_cast<i64>(parts.size()) * channels * 4, 1));
  float* sums = reinterpret_cast<float*>(memory.data());
  for_pieces(parts, threads, 0, [&](const Piece& part, char*, i64 number) {
    float* sum = sums + number * channels;
    std::fill(sum, sum + channels, 0.0f);
    k.add_directions(images.others[part.image], part.first, part.last, sum);
  });
  std::vector<float*> directions(images.lengths.size());
  for (std::size_t n = 0; n < parts.size(); ++n) {
    float *sum = sums + static_cast<i64>(n) * channels, *&total = directions[parts[n].image];
    total = parts[n].first == 0 ? sum : total;
    for (i64 c = 0; c < channels && total != sum; ++c) {
      total[c] += sum[c];
    }
  }
  for (std::size_t image = 0; image < directions.size(); ++image) {
    const float share = 1.0f / static_cast<float>(images.other_lengths[image]);
    for (i64 c = 0; c < channels && directions[image] != nullptr; ++c) {
      directions[image][c] *= share;
    }
  }
  for_pieces(pieces_of(images.lengths, kRows), threads, 0, [&](const Piece& part, char*, i64) {
    k.project(images.x[part.image], part.first, part.last, directions[part.image], images.to[part.image]);
  });
}

void extreme(const Images& images, bool smallest) {
  const NearestKernels& k = nearest_kernels();
  const TokenMatrix any{nullptr, 0, images.channels, images.x.empty() ? Type::f32 : images.x[0].type};
  // The others of all images as products read them.
  std::vector<KeptTokens> kept;
  std::vector<std::int32_t> numbers;
  i64 bytes = 0, most = 0;
  double flops = 0.0;
  for (std::size_t image = 0; image < images.lengths.size(); ++image) {
    const i64 count = images.other_lengths[image];
    bytes += k.panels_bytes(any, count);
    most = std::max({most, count, images.lengths[image]});
    flops += 2.0 * static_cast<double>(images.lengths[image]) * static_cast<double>(count * images.channels);
  }
  numbers.resize(most);
  std::iota(numbers.begin(), numbers.end(), 0);
  const Workspace memory(std::max<i64>(bytes, 1));
  float* at = reinterpret_cast<float*>(memory.data());
  for (const i64 count : images.other_lengths) {
    kept.push_back({numbers.data(), count, 0, at + (count + k.panel - 1) / k.panel * k.panel, at});
    at += k.panels_bytes(any, count) / static_cast<i64>(sizeof(float));
  }
  const i64 scratch = k.scratch(any);
  const int threads = std::max(threads_for(flops), threads_for_bytes(images.bytes));
  for_pieces(pieces_of(images.other_lengths, k.panel), threads, scratch, [&](const Piece& part, char* own, i64) {
    k.pack(images.others[part.image], kept[part.image], part.first / k.panel, own);
  });
  std::vector<bool> finite(kept.size());
  for (std::size_t image = 0; image < kept.size(); ++image) {
    const float* inverse = kept[image].inverse_norms;
    finite[image] = std::none_of(inverse, inverse + kept[image].count, [](float x) { return std::isnan(x); });
  }
  for_pieces(pieces_of(images.lengths, k.rows), threads, scratch, [&](const Piece& part, char* own, i64) {
    float* to = images.to[part.image] + part.first;
    const i64 count = part.last - part.first;
    if (finite[part.image]) {
      k.extreme(images.x[part.image], kept[part.image], part.first, count, smallest, to, own);
    } else {
      std::fill(to, to + count, std::numeric_limits<float>::quiet_NaN());
    }
  });
}

Tensor token_similarity(const Arguments& args) {
  const Tensor x = with_dense_channels(args.tensor("x")), others = with_dense_channels(args.tensor("others"));
  Images images{};
  images.lengths = args.sizes("lengths");
  images.other_lengths = args.sizes("other_lengths");
  const std::string& reduce = args.text("reduce");
  TORCH_CHECK_VALUE(images.lengths.size() == images.other_lengths.size() && x.size(-1) == others.size(-1) &&
                        x.scalar_type() == others.scalar_type(),
                    "others must match x's images, channels and dtype");
  for (std::size_t image = 0; image < images.lengths.size(); ++image) {
    TORCH_CHECK_VALUE(images.lengths[image] == 0 || images.other_lengths[image] > 0,
                      "other_lengths must be 1 or more where there are tokens, got ", images.other_lengths);
    TORCH_CHECK_VALUE(std::max(images.lengths[image], images.other_lengths[image]) < INT32_MAX,
                      "an image must have fewer than 2^31 tokens");
  }
  images.x = matrices_of("x", x, images.lengths);
  images.others = matrices_of("others", others, images.other_lengths);
  images.channels = x.size(-1);
  images.bytes = static_cast<double>(x.nbytes()) + static_cast<double>(others.nbytes());
  const Tensor out = at::detail::empty_cpu({count_of(images.lengths)}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  for (const i64 n : images.lengths) {
    images.to.push_back(to);
    to += n;
  }
  if (reduce == "mean") {
    mean(images);
  } else {
    extreme(images, reduce == "min");
  }
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("token_similarity_cpu", by_name<token_similarity>());
}

} // namespace mmkernels
