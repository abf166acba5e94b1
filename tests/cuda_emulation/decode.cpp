// The decode kernels as a host library for tests/ops/test_cuda_decode.py.
#include "ptx.h"

#include "../../csrc/attention/decode_cuda.cuh"

namespace mmkernels {
namespace {

using emulation::Copies;
using emulation::Range;

template <class T, int D>
std::string run(const DecodeProblem& p, Copies copies, bool backwards, const std::vector<Range>& ranges) {
  const int rows = decode_rows(p.heads, p.key_heads, p.q_len), tiles = decode_row_tiles(rows);
  const auto blocks = static_cast<unsigned>(p.batch * p.key_heads * p.splits);
  const std::string error =
      emulation::launch(blocks, kDecodeThreads, decode_shared_bytes(D), copies, backwards, ranges, [&] {
        tiles == 1 ? decode_kernel<T, D, 1>(p) : tiles == 2 ? decode_kernel<T, D, 2>(p) : decode_kernel<T, D, 4>(p);
      });
  if (!error.empty() || p.splits == 1) {
    return error;
  }
  const auto merges = static_cast<unsigned>((p.batch * p.heads * p.q_len + kMergeRows - 1) / kMergeRows);
  return emulation::launch(merges, 32 * kMergeRows, 0, copies, backwards, ranges,
                           [&] { decode_merge_kernel<T>(p, D); });
}

template <class T>
std::string run(const DecodeProblem& p, int dim, Copies copies, bool backwards, const std::vector<Range>& ranges) {
  switch (dim) {
  case 64:
    return run<T, 64>(p, copies, backwards, ranges);
  case 80:
    return run<T, 80>(p, copies, backwards, ranges);
  case 96:
    return run<T, 96>(p, copies, backwards, ranges);
  case 128:
    return run<T, 128>(p, copies, backwards, ranges);
  default:
    return "no such dim";
  }
}

} // namespace
} // namespace mmkernels

extern "C" {

// Answers what went wrong, or "". `schedule`: bit 0, copies land at once; bit 1, threads and blocks run backwards.
const char* mmk_decode(const mmkernels::DecodeProblem* p, int bf16, int dim, int schedule,
                       const mmkernels::emulation::Range* ranges, int count) {
  using namespace mmkernels;
  static std::string error;
  const std::vector<Range> all(ranges, ranges + count);
  const Copies copies = (schedule & 1) != 0 ? Copies::early : Copies::late;
  error = bf16 != 0 ? run<Bf16>(*p, dim, copies, (schedule & 2) != 0, all)
                    : run<F16>(*p, dim, copies, (schedule & 2) != 0, all);
  return error.c_str();
}

std::int64_t mmk_problem_bytes() {
  return sizeof(mmkernels::DecodeProblem);
}

// {splits, blocks, merge blocks, partial floats}
void mmk_plan(std::int64_t batch, std::int64_t heads, std::int64_t key_heads, std::int64_t q_len, std::int64_t k_len,
              int dim, int sms, int shared_per_sm, std::int64_t* answer) {
  const auto plan = mmkernels::plan_decode(batch, heads, key_heads, q_len, k_len, dim, sms, shared_per_sm);
  answer[0] = plan.splits, answer[1] = plan.blocks, answer[2] = plan.merge_blocks, answer[3] = plan.partial_floats;
}

int mmk_shared_bytes(int dim) {
  return mmkernels::decode_shared_bytes(dim);
}

// Rounds floats to 16 bits in place and back, as the emulated instructions do.
void mmk_round(float* x, std::int64_t count, int bf16) {
  using namespace mmkernels;
  for (std::int64_t n = 0; n < count; ++n) {
    x[n] = bf16 != 0 ? widen(Bf16{narrow(Bf16{}, x[n])}) : widen(F16{narrow(F16{}, x[n])});
  }
}

int mmk_takes_dim(int dim) {
  return mmkernels::decode_takes_dim(dim);
}

// {queries, rows of a key head, keys, rows of the output}
void mmk_limits(std::int64_t* answer) {
  using namespace mmkernels;
  answer[0] = kMaxDecodeQueries, answer[1] = kMaxDecodeRows, answer[2] = kMaxDecodeKeys, answer[3] = kMaxOutputRows;
}

int mmk_piece_offset(int dim, int row, int c) {
  using mmkernels::piece_offset;
  return dim == 64   ? piece_offset<64>(row, c)
         : dim == 80 ? piece_offset<80>(row, c)
         : dim == 96 ? piece_offset<96>(row, c)
                     : piece_offset<128>(row, c);
}

} // extern "C"
