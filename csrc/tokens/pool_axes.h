// The axes of pool_tokens, as mmkernels/ops/tokens/pool_tokens/axes.py defines them.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "pool_tokens.h"

namespace mmkernels {

constexpr double kCubic = -0.75, kCubicAntialiased = -0.5; // axes.py says where they come from

// An axis and the memory that it lies in.
struct AxisMemory {
  std::vector<std::int32_t> first, begin{0};
  std::vector<float> weights;

  void add(std::int64_t at, const std::vector<double>& some) {
    first.push_back(static_cast<std::int32_t>(at));
    weights.insert(weights.end(), some.begin(), some.end());
    begin.push_back(static_cast<std::int32_t>(weights.size()));
  }
  PoolAxis view() const {
    return {first.data(), begin.data(), weights.data()};
  }
  std::int64_t most() const {
    std::int64_t most = 0;
    for (std::size_t i = 0; i + 1 < begin.size(); ++i) {
      most = std::max<std::int64_t>(most, begin[i + 1] - begin[i]);
    }
    return most;
  }
};

// The axes of a call, each made once.
class PoolAxes {
public:
  PoolAxes(const std::string& mode, bool antialias)
      : linear_(mode == "bilinear"), cubic_(mode == "bicubic"), antialias_(antialias) {}

  // Taps of `out` results of an axis of `size`. step: of windows; 0: `out` parts, or resized.
  const AxisMemory& axis(std::int64_t size, std::int64_t out, std::int64_t step) {
    AxisMemory& found = known_[{size, out, step, false}];
    if (found.first.empty()) {
      for (std::int64_t i = 0; i < out; ++i) {
        add(found, i, size, out, step);
      }
    }
    return found;
  }
  // For each of `size` inputs the results that take it.
  const AxisMemory& transposed(std::int64_t size, std::int64_t out, std::int64_t step) {
    AxisMemory& found = known_[{size, out, step, true}];
    if (found.first.empty()) {
      const AxisMemory& axis = this->axis(size, out, step);
      std::vector<std::int64_t> first(size, out);
      std::vector<std::vector<double>> weights(size);
      for (std::int64_t i = 0; i < out; ++i) {
        for (std::int32_t k = axis.begin[i]; k < axis.begin[i + 1]; ++k) {
          const std::int64_t at = axis.first[i] + k - axis.begin[i];
          first[at] = std::min(first[at], i);
          weights[at].resize(i - first[at]); // 0 for results between that leave it out
          weights[at].push_back(axis.weights[k]);
        }
      }
      for (std::int64_t at = 0; at < size; ++at) {
        found.add(first[at], weights[at]);
      }
    }
    return found;
  }

private:
  void add(AxisMemory& to, std::int64_t i, std::int64_t size, std::int64_t out, std::int64_t step) const {
    const double scale = static_cast<double>(size) / static_cast<double>(out);
    if (!(linear_ || cubic_) || size == out) {
      const std::int64_t first = step > 0 ? i * step : i * size / out;
      const std::int64_t end = step > 0 ? std::min(first + step, size) : ((i + 1) * size + out - 1) / out;
      to.add(first, std::vector<double>(end - first, 1.0 / static_cast<double>(end - first)));
    } else if (antialias_) {
      const double wide = std::max(scale, 1.0), centre = scale * (i + 0.5), support = (linear_ ? 1.0 : 2.0) * wide;
      const std::int64_t first = std::max<std::int64_t>(static_cast<std::int64_t>(centre - support + 0.5), 0);
      const std::int64_t end = std::min(static_cast<std::int64_t>(centre + support + 0.5), size);
      std::vector<double> weights;
      double total = 0.0;
      for (std::int64_t at = first; at < end; ++at) {
        const double x = (at - centre + 0.5) / wide;
        weights.push_back(linear_ ? std::max(1.0 - std::abs(x), 0.0) : cubic(x, kCubicAntialiased));
        total += weights.back();
      }
      for (double& weight : weights) {
        weight /= total;
      }
      to.add(first, weights);
    } else {
      const double place = scale * (i + 0.5) - 0.5, from = linear_ ? std::max(place, 0.0) : place;
      const std::int64_t near = static_cast<std::int64_t>(std::floor(from));
      std::vector<std::pair<std::int64_t, double>> taps;
      if (linear_) {
        taps = {{near, 1.0 - (from - near)}, {near + 1, from - near}};
      } else {
        for (std::int64_t n = near - 1; n < near + 3; ++n) {
          taps.push_back({n, cubic(static_cast<double>(n) - from, kCubic)});
        }
      }
      add_merged(to, taps, size);
    }
  }
  // Keys' cubic convolution with parameter a.
  static double cubic(double x, double a) {
    x = std::abs(x);
    if (x < 1.0) {
      return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    }
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
  }
  // Inputs outside are those at the edge; weights of 0 at either end are left out.
  static void add_merged(AxisMemory& to, const std::vector<std::pair<std::int64_t, double>>& taps, std::int64_t size) {
    std::map<std::int64_t, double> weights;
    for (const auto& [at, weight] : taps) {
      weights[std::clamp<std::int64_t>(at, 0, size - 1)] += weight;
    }
    while (weights.begin()->second == 0.0) {
      weights.erase(weights.begin());
    }
    while (weights.rbegin()->second == 0.0) {
      weights.erase(std::prev(weights.end()));
    }
    std::vector<double> run;
    for (const auto& [at, weight] : weights) {
      run.push_back(weight);
    }
    to.add(weights.begin()->first, run);
  }

  bool linear_, cubic_, antialias_;
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t, bool>, AxisMemory> known_;
};

} // namespace mmkernels
