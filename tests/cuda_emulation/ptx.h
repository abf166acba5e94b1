// The functions of csrc/common/cuda_ptx.cuh for the host, each as the PTX ISA defines the instruction behind it.
#pragma once

#define MMKERNELS_CUDA_PTX // takes the place of csrc/common/cuda_ptx.cuh

#include "fibers.h"

#define MMK_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace mmkernels {

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

namespace emulation {

inline float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline std::uint32_t to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

} // namespace emulation

inline void copy_async(std::uint32_t to, const void* from, bool there) {
  using namespace emulation;
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    fail("a copy from an address that is no multiple of 16");
  }
  if (block.copies == Copies::early) {
    land({to, from, there});
  } else {
    self().groups.back().push_back({to, from, there});
  }
}
inline void copy_commit() {
  emulation::self().groups.emplace_back();
}
template <int kPending> void copy_wait() {
  auto& groups = emulation::self().groups;
  while (groups.size() > kPending + 1) { // and the open one
    for (const auto& copy : groups.front()) {
      emulation::land(copy);
    }
    groups.pop_front();
  }
}

inline char* dynamic_shared() {
  return emulation::block.shared.data();
}
inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const char*>(p) - emulation::block.shared.data());
}
template <class T> T load_global(const T* p) {
  return emulation::check_global(p, sizeof(T), false) ? *p : T{};
}
template <class T> void store_global(T* p, T value) {
  if (emulation::check_global(p, sizeof(T), true)) {
    *p = value;
  }
}
inline std::uint32_t load_shared(std::uint32_t address) {
  std::uint32_t x;
  std::memcpy(&x, emulation::at_shared(address, 4), 4);
  return x;
}
inline void load_shared(std::uint32_t address, std::uint32_t (&x)[4]) {
  std::memcpy(x, emulation::at_shared(address, 16), 16);
}
inline void store_shared(std::uint32_t address, std::uint32_t x) {
  std::memcpy(emulation::at_shared(address, 4), &x, 4);
}

inline void __syncthreads() {
  using namespace emulation;
  if (++block.at_barrier < block.threads) {
    return wait_for(block.barrier);
  }
  block.at_barrier = 0;
  ++block.barrier;
}
inline void sync_warp() {
  int nothing = 0;
  emulation::meet("syncwarp", nothing, [](int**) {});
}

// PTX ISA, "ldmatrix": threads 8 m to 8 m + 7 hold the row addresses of matrix m; thread l receives of each matrix row
// l / 4, elements 2 (l % 4) and the next, or with .trans those of the transposed matrix.
struct MatrixLane {
  std::uint32_t address;
  std::uint32_t* x;
};
template <bool kTransposed> void load_matrices_as(std::uint32_t (&x)[4], std::uint32_t address) {
  MatrixLane own{address, x};
  emulation::meet(kTransposed ? "ldmatrix.trans" : "ldmatrix", own, [](MatrixLane** lanes) {
    for (int m = 0; m < 4; ++m) {
      std::uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        std::memcpy(matrix[row], emulation::at_shared(lanes[8 * m + row]->address, 16), 16);
      }
      for (int l = 0; l < 32; ++l) {
        const int row = l / 4, column = 2 * (l % 4);
        const std::uint32_t low = kTransposed ? matrix[column][row] : matrix[row][column];
        const std::uint32_t high = kTransposed ? matrix[column + 1][row] : matrix[row][column + 1];
        lanes[l]->x[m] = low | high << 16;
      }
    }
  });
}
inline void load_matrices(std::uint32_t (&x)[4], std::uint32_t address) {
  load_matrices_as<false>(x, address);
}
inline void load_matrices_transposed(std::uint32_t (&x)[4], std::uint32_t address) {
  load_matrices_as<true>(x, address);
}

inline float widen(Bf16 x) {
  return emulation::from_bits(static_cast<std::uint32_t>(x.bits) << 16);
}
inline float widen(F16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction == 0 ? HUGE_VALF : NAN)
                     : exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                                     : ldexpf(static_cast<float>(fraction + 1024), exponent - 25);
  return x.bits >> 15 != 0 ? -size : size;
}
inline std::uint16_t narrow(Bf16, float x) { // to nearest, ties to even
  const std::uint32_t bits = emulation::to_bits(x);
  return x != x ? 0x7fff : static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline std::uint16_t narrow(F16, float x) {
  const float size = fabsf(x);
  std::uint32_t half;
  if (x != x) {
    return 0x7fff;
  }
  if (size >= 65520.0f) {
    half = 0x7c00;
  } else if (size < 6.103515625e-05f) {
    half = static_cast<std::uint32_t>(nearbyintf(ldexpf(size, 24)));
  } else {
    const std::uint32_t bits = emulation::to_bits(size);
    half = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  }
  return static_cast<std::uint16_t>(half | (emulation::to_bits(x) >> 31 << 15));
}
template <class T> std::uint32_t pack(T t, float low, float high) {
  return narrow(t, low) | static_cast<std::uint32_t>(narrow(t, high)) << 16;
}
inline float exp2_fast(float x) {
  return exp2f(x);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": with g = l / 4 and t = l % 4, thread l holds
// a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the element after it; b: (2t, g), (2t + 8, g), each
// with the one below; c and d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
struct MultiplyLane {
  float* d;
  const std::uint32_t* a;
  std::uint32_t b[2];
};
template <class T> void multiply(T, float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MultiplyLane own{d, a, {b0, b1}};
  emulation::meet("mma", own, [](MultiplyLane** lanes) {
    float left[16][16], right[16][8], sum[16][8];
    const auto half = [](std::uint32_t pair, int n) { return widen(T{static_cast<std::uint16_t>(pair >> 16 * n)}); };
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int n = 0; n < 2; ++n) {
        for (int r = 0; r < 4; ++r) {
          left[g + r % 2 * 8][2 * t + r / 2 * 8 + n] = half(lanes[l]->a[r], n);
        }
        for (int r = 0; r < 2; ++r) {
          right[2 * t + 8 * r + n][g] = half(lanes[l]->b[r], n);
          sum[g + 8 * r][2 * t + n] = lanes[l]->d[2 * r + n];
        }
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) {
          sum[m][n] += left[m][k] * right[k][n];
        }
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int e = 0; e < 4; ++e) {
        lanes[l]->d[e] = sum[l / 4 + e / 2 * 8][2 * (l % 4) + e % 2];
      }
    }
  });
}

template <class T> struct LaneValue {
  T given, taken;
  int from;
};
template <class T> T from_lane(T x, int lane) {
  LaneValue<T> own{x, x, lane};
  emulation::meet("shfl", own, [](LaneValue<T>** lanes) {
    for (int l = 0; l < 32; ++l) {
      lanes[l]->taken = lanes[lanes[l]->from % 32]->given;
    }
  });
  return own.taken;
}
template <class T> T from_neighbour(T x, int bits) {
  return from_lane(x, static_cast<int>(threadIdx.x % 32) ^ bits);
}
inline std::uint32_t vote(bool x) {
  LaneValue<std::uint32_t> own{x, 0, 0};
  emulation::meet("ballot", own, [](LaneValue<std::uint32_t>** lanes) {
    std::uint32_t all = 0;
    for (int l = 0; l < 32; ++l) {
      all |= lanes[l]->given << l;
    }
    for (int l = 0; l < 32; ++l) {
      lanes[l]->taken = all;
    }
  });
  return own.taken;
}

} // namespace mmkernels
