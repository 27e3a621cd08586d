// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/verify.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

namespace moeops::bench {

namespace {

// What element [row, n] of the call's y must be, and how far from it a right one may be.
struct Expected {
  double value;
  double bound;
};

Expected expected_of(const GemmCall& call, const WeightValues& values, int64_t expert, int64_t row,
                     int64_t n) {
  const GemmForm& form = values.form();
  const void* w = values.row(expert, n);
  const void* x = static_cast<const char*>(call.x) + row * form.k * size_of(form.x);
  if (form.x == DType::kS8) {
    int32_t sum = 0;
    for (int64_t k = 0; k < form.k; ++k) {
      sum += static_cast<const int8_t*>(x)[k] * static_cast<const int8_t*>(w)[k];
    }
    const float scaled = static_cast<float>(sum) * values.scales()[static_cast<size_t>(n)];
    return {static_cast<double>(to_f32(to_bf16(scaled * call.x_scale[row]))), 0};
  }
  double sum = 0;
  double magnitude = 0;
  for (int64_t k = 0; k < form.k; ++k) {
    const double product = static_cast<double>(load_value(form.x, x, k)) *
                           static_cast<double>(load_value(form.x, w, k));
    sum += product;
    magnitude += std::fabs(product);
  }
  // Each of the K additions rounds by at most 2^-24 of a partial sum, which is at most the
  // magnitude; a product that is rounded by itself adds one such error more.
  const double bound = static_cast<double>(form.k + 1) * 0x1p-24 * magnitude;
  return {sum, form.y == DType::kBf16 ? bound + 0x1p-8 * (std::fabs(sum) + bound) : bound};
}

}  // namespace

std::string verify(GroupedMatmulImpl& impl, const GemmCall& call, const WeightValues& values,
                   uint64_t seed) {
  std::memset(call.y, 0xFF,
              static_cast<size_t>(call.rows * values.form().n * size_of(values.form().y)));  // NaN
  impl.run(call);
  return verify_result(call, values, seed);
}

std::string verify_result(const GemmCall& call, const WeightValues& values, uint64_t seed) {
  const GemmForm& form = values.form();
  const int64_t count = call.rows * form.n;
  for (int64_t i = 0; i < count; ++i) {
    const float y = load_value(form.y, call.y, i);
    if (!std::isfinite(y)) {
      return fmt::format("y[{},{}] = {}: not written, or not finite", i / form.n, i % form.n, y);
    }
  }

  std::mt19937_64 random(seed);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  std::string wrong;
  const auto check_one = [&](int64_t expert, int64_t row, int64_t n) {
    const Expected expected = expected_of(call, values, expert, row, n);
    const auto got = static_cast<double>(load_value(form.y, call.y, row * form.n + n));
    if (!(std::fabs(got - expected.value) <= expected.bound) && wrong.empty()) {
      wrong = fmt::format("y[{},{}] = {:.8g}, expected {:.8g} (expert {})", row, n, got,
                          expected.value, expert);
    }
  };
  const auto groups = static_cast<int64_t>(call.groups.size());
  const int64_t samples = std::max<int64_t>(4096 / groups + 1, 8);
  int64_t row = 0;
  for (const Group& group : call.groups) {
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t r = i % 3 == 0 ? 0 : i % 3 == 1 ? group.rows - 1 : below(group.rows);
      const int64_t n = i < 2 ? 0 : i < 4 ? form.n - 1 : below(form.n);
      check_one(group.expert, row + r, n);
    }
    row += group.rows;
  }
  return wrong;
}

}  // namespace moeops::bench
