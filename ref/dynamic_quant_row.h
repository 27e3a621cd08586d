// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "ref/numeric.h"

namespace moeops::ref {

// Symmetric dynamic quantisation of one row, already multiplied by its smooth factors.
inline void dynamic_quant_row(int64_t n, const float* v, int8_t* q, float* scale) {
  float a = 0.0f;
  bool finite = true;
  for (int64_t j = 0; j < n; ++j) {
    finite = finite && std::isfinite(v[j]);
    a = std::fmax(a, std::fabs(v[j]));
  }
  const bool zero = a < 1e-36f;  // 127 / a would soon overflow
  *scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : a / 127.0f;
  for (int64_t j = 0; j < n; ++j) {
    q[j] = !finite || zero ? int8_t{0} : quantise(v[j] * (127.0f / a), -127.0f);
  }
}

}  // namespace moeops::ref
