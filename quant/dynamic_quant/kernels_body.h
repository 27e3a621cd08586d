// SPDX-License-Identifier: Apache-2.0
#pragma once

// The row kernels, for the one simd_<isa>.h that was included before.

#include <type_traits>

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

  // max |v|; infinity or NaN where one is none.
  float max_magnitude(int64_t n) const {
    if constexpr (!Smooth && sizeof(X) == 2) return simd::max_magnitude(x, n);
    VecI bits = broadcast(int32_t{0});
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) bits = simd::max(bits, simd::magnitude_bits(at(j)));
    if (j < n) bits = simd::max(bits, simd::magnitude_bits(at(j, n - j)));
    return std::bit_cast<float>(simd::reduce_max(bits));
  }
};

// Writes q = to_q(v); InRange: |to_q(v)| < 2^31.
template <bool InRange>
struct Store {
  template <class V, class Q, class ToQ>
  void operator()(const V& values, int64_t n, Q* q, ToQ to_q) const {
    int64_t j = 0;
    if constexpr (InRange && std::is_same_v<Q, int8_t>) {
      for (; j + 4 * kWidth <= n; j += 4 * kWidth) {
        simd::store(q + j, to_q(values.at(j)), to_q(values.at(j + kWidth)),
                    to_q(values.at(j + 2 * kWidth)), to_q(values.at(j + 3 * kWidth)));
      }
    }
    for (; j + kWidth <= n; j += kWidth) simd::store(q + j, to_q(values.at(j)));
    if (j < n) simd::store(q + j, to_q(values.at(j, n - j)), n - j);
  }
};

// The same past the caches. While this pass reads a row that the one before has brought near, the
// memory would idle: it fetches the next row into L2. (Fetching half of it during the first pass,
// or to L1, made a quarter of the bandwidth vanish on Sapphire Rapids.)
struct Stream {
  const void* next;

  template <class V, class ToQ>
  void operator()(const V& values, int64_t n, int8_t* q, ToQ to_q) const {
    constexpr int64_t kBlock = 4 * kWidth;
    constexpr int64_t kBlockBytes = kBlock * static_cast<int64_t>(sizeof(*values.x));
    constexpr int64_t kLine = 64;
    const auto* ahead = static_cast<const char*>(next);
    // Up to the first aligned block, and from the last one on, q is written as usual.
    const int64_t unaligned = (-reinterpret_cast<intptr_t>(q)) & (kBlock - 1);
    int64_t j = unaligned < n ? unaligned : n;
    Store<true>()(values, j, q, to_q);
    for (; j + kBlock <= n; j += kBlock, ahead += kBlockBytes) {
      simd::stream(q + j, to_q(values.at(j)), to_q(values.at(j + kWidth)),
                   to_q(values.at(j + 2 * kWidth)), to_q(values.at(j + 3 * kWidth)));
      for (int64_t line = 0; line < kBlockBytes; line += kLine) {
        __builtin_prefetch(ahead + line, 0, 2);
      }
    }
    Store<true>()(V{values.x + j, values.smooth + (values.smooth == nullptr ? 0 : j)}, n - j, q + j,
                  to_q);
  }
};

template <class V, class Q, class Write>
inline void symmetric_row(const V& values, int64_t n, Q* q, float* scale, Write write) {
  const float a = values.max_magnitude(n);
  const bool finite = a < __builtin_inff();
  if (!finite || a < 1e-36f) {
    *scale = finite ? 0.0f : __builtin_nanf("");
    __builtin_memset(q, static_cast<Q>(-1) < 0 ? 0 : 128, static_cast<size_t>(n));
    return;
  }
  *scale = a / 127.0f;
  // |v| (127 / a) rounds to 127.00001 at most: the clamp to -127 is in the rounding.
  const Vec factor = broadcast(127.0f / a);
  write(values, n, q, [&](Vec v) { return v * factor; });
}

// Its first n lanes, and the first of them again in the others.
inline Vec repeat_first(Vec v, int64_t n) {
  float lanes[kWidth];
  simd::store(lanes, v, n);
  for (int64_t j = n; j < kWidth; ++j) lanes[j] = lanes[0];
  return simd::load(lanes);
}

template <class V>
inline void asymmetric_row(const V& values, int64_t n, int8_t* q, float* scale, float* offset,
                           [[maybe_unused]] const void* next) {
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
#ifdef __FMA__
  // v / s correctly rounded without a division (Markstein): an fma gives the exact remainder of a
  // quotient that is off by an ulp at most, and adding it times 1 / s then rounds right. v times
  // 1 / s is off by up to 1.5, so that takes two steps. Where nothing overflows; underflow costs
  // only digits far below the offset's.
  const float limit = 0x1p30f;
  if (range < limit && largest / *scale < limit && smallest / *scale > -limit) {
    const Vec r = broadcast(1.0f / *scale);
    const auto to_q = [&](Vec v) {
      Vec quotient = v * r;
      quotient = simd::fma(simd::fma(-quotient, s, v), r, quotient);
      return simd::fma(simd::fma(-quotient, s, v), r, quotient) + o;
    };
    if (next != nullptr) return Stream{next}(values, n, q, to_q);
    return Store<true>()(values, n, q, to_q);
  }
#endif
  Store<false>()(values, n, q, [&](Vec v) { return v / s + o; });
}

template <class X, class Function>
inline void with_values(const void* x, const float* smooth, Function function) {
  const auto* row = static_cast<const X*>(x);
  if (smooth != nullptr) {
    function(Values<X, true>{row, smooth});
  } else {
    function(Values<X, false>{row, nullptr});
  }
}

template <class X, class Q>
void symmetric(const void* x, const float* smooth, int64_t n, Q* q, float* scale) {
  with_values<X>(x, smooth,
                 [&](auto values) { symmetric_row(values, n, q, scale, Store<true>()); });
}

template <class X>
void symmetric_stream(const void* x, const float* smooth, int64_t n, int8_t* q, float* scale,
                      const void* next) {
  with_values<X>(x, smooth, [&](auto values) { symmetric_row(values, n, q, scale, Stream{next}); });
}

template <class X>
void asymmetric(const void* x, const float* smooth, int64_t n, int8_t* q, float* scale,
                float* offset, const void* next) {
  with_values<X>(x, smooth,
                 [&](auto values) { asymmetric_row(values, n, q, scale, offset, next); });
}

constexpr RowKernels make_kernels(Isa isa) {
  return {isa,
          {symmetric<float, int8_t>, symmetric<bf16, int8_t>, symmetric<f16, int8_t>},
          {symmetric<float, uint8_t>, symmetric<bf16, uint8_t>, symmetric<f16, uint8_t>},
          {symmetric_stream<float>, symmetric_stream<bf16>, symmetric_stream<f16>},
          {asymmetric<float>, asymmetric<bf16>, asymmetric<f16>},
          simd::stream_fence};
}

}  // namespace
}  // namespace moeops::dynamic_quant_internal
