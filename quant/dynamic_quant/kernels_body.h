// SPDX-License-Identifier: Apache-2.0
#pragma once

// The row kernels, for the one simd_<isa>.h that was included before.

#include "quant/dynamic_quant/kernels.h"

namespace moeops::dynamic_quant_internal {
namespace {

using simd::broadcast;
using simd::kWidth;
using simd::Vec;
using simd::VecI;

// The row's values v, by vectors.
template <class X, bool Smooth>
struct Values {
  const X* x;
  const float* smooth;

  Vec at(int64_t j) const {
    if constexpr (Smooth) return simd::load(x + j) * simd::load(smooth + j);
    return simd::load(x + j);
  }
  Vec at(int64_t j, int64_t count) const {
    if constexpr (Smooth) return simd::load(x + j, count) * simd::load(smooth + j, count);
    return simd::load(x + j, count);
  }
};

// Stores to_q(v) for all of the row.
template <class V, class Q, class ToQ>
inline void store_row(const V& values, int64_t n, Q* q, ToQ to_q) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) simd::store(q + j, to_q(values.at(j)));
  if (j < n) simd::store(q + j, to_q(values.at(j, n - j)), n - j);
}

template <class V, class Q>
inline void symmetric_row(const V& values, int64_t n, Q* q, float* scale) {
  VecI bits = broadcast(int32_t{0});
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) bits = simd::max(bits, simd::magnitude_bits(values.at(j)));
  if (j < n) bits = simd::max(bits, simd::magnitude_bits(values.at(j, n - j)));
  const int32_t max_bits = simd::reduce_max(bits);
  const float a = std::bit_cast<float>(max_bits);
  const bool finite = max_bits < simd::kInfinityBits;
  if (!finite || a < 1e-36f) {
    *scale = finite ? 0.0f : __builtin_nanf("");
    __builtin_memset(q, static_cast<Q>(-1) < 0 ? 0 : 128, static_cast<size_t>(n));
    return;
  }
  *scale = a / 127.0f;
  // |v| (127 / a) rounds to 127.00001 at most: the clamp to -127 is in the rounding.
  const Vec factor = broadcast(127.0f / a);
  store_row(values, n, q, [&](Vec v) { return v * factor; });
}

// Its first n lanes, and the first of them again in the others.
inline Vec repeat_first(Vec v, int64_t n) {
  float lanes[kWidth];
  simd::store(lanes, v, n);
  for (int64_t j = n; j < kWidth; ++j) lanes[j] = lanes[0];
  return simd::load(lanes);
}

template <class V>
inline void asymmetric_row(const V& values, int64_t n, int8_t* q, float* scale, float* offset) {
  float largest = 0.0f;
  float smallest = 0.0f;
  VecI bits = broadcast(int32_t{0});
  if (n > 0) {
    const Vec first = n < kWidth ? repeat_first(values.at(0, n), n) : values.at(0);
    Vec high[2] = {first, first};
    Vec low[2] = {first, first};
    bits = simd::magnitude_bits(first);
    int64_t j = kWidth;
    const auto take = [&](Vec v, int chain) {
      bits = simd::max(bits, simd::magnitude_bits(v));
      high[chain] = simd::max(high[chain], v);
      low[chain] = simd::min(low[chain], v);
    };
    for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
      take(values.at(j), 0);
      take(values.at(j + kWidth), 1);
    }
    for (; j < n; j += kWidth) take(values.at(j < n - kWidth ? j : n - kWidth), 0);
    largest = simd::reduce_max(simd::max(high[0], high[1]));
    smallest = simd::reduce_min(simd::min(low[0], low[1]));
  }
  if (simd::reduce_max(bits) >= simd::kInfinityBits) {
    *scale = *offset = __builtin_nanf("");
    __builtin_memset(q, 0, static_cast<size_t>(n));
    return;
  }
  const float range = (largest - smallest) / 255.0f;
  *scale = range > 1e-12f ? range : 1e-12f;
  *offset = 127.0f - largest / *scale;
  const Vec s = broadcast(*scale);
  const Vec o = broadcast(*offset);
  store_row(values, n, q, [&](Vec v) { return v / s + o; });
}

template <class X, class Q>
void symmetric(const void* x, const float* smooth, int64_t n, Q* q, float* scale) {
  const auto* row = static_cast<const X*>(x);
  if (smooth != nullptr) {
    symmetric_row(Values<X, true>{row, smooth}, n, q, scale);
  } else {
    symmetric_row(Values<X, false>{row, nullptr}, n, q, scale);
  }
}

template <class X>
void asymmetric(const void* x, const float* smooth, int64_t n, int8_t* q, float* scale,
                float* offset) {
  const auto* row = static_cast<const X*>(x);
  if (smooth != nullptr) {
    asymmetric_row(Values<X, true>{row, smooth}, n, q, scale, offset);
  } else {
    asymmetric_row(Values<X, false>{row, nullptr}, n, q, scale, offset);
  }
}

constexpr RowKernels make_kernels(Isa isa) {
  return {isa,
          {symmetric<float, int8_t>, symmetric<bf16, int8_t>, symmetric<f16, int8_t>},
          {symmetric<float, uint8_t>, symmetric<bf16, uint8_t>, symmetric<f16, uint8_t>},
          {asymmetric<float>, asymmetric<bf16>, asymmetric<f16>}};
}

}  // namespace
}  // namespace moeops::dynamic_quant_internal
