// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/verify.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace moeops::bench {

std::string verify(GroupedMatmulImpl& impl, const GemmCall& call, const WeightValues& values,
                   const Gemm& gemm, uint64_t seed) {
  const int64_t count = call.rows * gemm.n;
  std::fill_n(call.y, count, std::numeric_limits<float>::quiet_NaN());
  impl.run(call);
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(call.y[i])) {
      return fmt::format("y[{},{}] = {}: not written, or not finite", i / gemm.n, i % gemm.n,
                         call.y[i]);
    }
  }

  std::mt19937_64 random(seed);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  std::string wrong;
  const auto check_one = [&](int64_t expert, int64_t row, int64_t n) {
    const float* x = call.x + row * gemm.k;
    double sum = 0;
    double magnitude = 0;
    for (int64_t k = 0; k < gemm.k; ++k) {
      const double product = static_cast<double>(x[k]) * static_cast<double>(values(expert, n, k));
      sum += product;
      magnitude += std::fabs(product);
    }
    // Each of the K additions rounds by at most 2^-24 of a partial sum, which is at most the
    // magnitude; a product that is rounded by itself adds one such error more.
    const double bound = static_cast<double>(gemm.k + 1) * 0x1p-24 * magnitude;
    const double got = static_cast<double>(call.y[row * gemm.n + n]);
    if (!(std::fabs(got - sum) <= bound) && wrong.empty()) {
      wrong =
          fmt::format("y[{},{}] = {:.8g}, expected {:.8g} (expert {})", row, n, got, sum, expert);
    }
  };
  const auto groups = static_cast<int64_t>(call.groups.size());
  const int64_t samples = std::max<int64_t>(4096 / groups + 1, 8);
  int64_t row = 0;
  for (const Group& group : call.groups) {
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t r = i % 3 == 0 ? 0 : i % 3 == 1 ? group.rows - 1 : below(group.rows);
      const int64_t n = i < 2 ? 0 : i < 4 ? gemm.n - 1 : below(gemm.n);
      check_one(group.expert, row + r, n);
    }
    row += group.rows;
  }
  return wrong;
}

}  // namespace moeops::bench
