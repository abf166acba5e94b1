#include "choice.h"

#include <atomic>

#include "isa.h"

namespace mmkernels {
namespace {

std::atomic<int> current{-1}; // -1: the widest

} // namespace

const char* name_of(Isa isa) {
  switch (isa) {
  case Isa::avx512_bf16:
    return "avx512_bf16";
  case Isa::avx512:
    return "avx512";
  case Isa::avx2:
    return "avx2";
  default:
    return "plain";
  }
}

const std::vector<Isa>& offered() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> all;
#if defined(MMKERNELS_X86)
    const std::string widest = detect_isa();
    for (const Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2}) {
      if (!all.empty() || widest == name_of(isa)) {
        all.push_back(isa);
      }
    }
#endif
    all.push_back(Isa::plain);
    return all;
  }();
  return found;
}

Isa chosen() {
  const int isa = current.load(std::memory_order_relaxed);
  return isa < 0 ? offered().front() : static_cast<Isa>(isa);
}

void choose(Isa isa) {
  current.store(static_cast<int>(isa), std::memory_order_relaxed);
}

} // namespace mmkernels
