// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kernels over the vector layer: include one simd_<isa>.h first.

#include "fused/moe_layer/kernels.h"

namespace moeops::moe_layer_internal {
namespace {

// kVectors vectors of out at column j, of which the last may be partial.
template <int kVectors, class T>
void combine_columns(const Combination& c, int64_t j, T* out) {
  using simd::Vec;
  constexpr int64_t kWidth = simd::kWidth;
  const int64_t rest = c.columns - j;  // at least one
  const bool whole = rest >= kVectors * kWidth;
  const auto load = [&](const float* row, int v) {
    const float* p = row + j + v * kWidth;
    return whole ? simd::load(p) : simd::load(p, rest < kWidth ? rest : kWidth);
  };
  if (c.next != nullptr) {
    // A row is too short for the processor to see that it is read in order.
    constexpr int kLines = kVectors * static_cast<int>(kWidth * sizeof(float)) / 64;
    for (int64_t k = 0; k < c.choices; ++k) {
      if (c.next[k] < 0) continue;
      const float* row = c.y + c.next[k] * c.columns + j;
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(row + i * 16, 0, 2);  // to L2
    }
  }
  Vec sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = simd::broadcast(0.0f);
  for (int64_t k = 0; k < c.choices; ++k) {
    if (c.rows[k] < 0) continue;
    const Vec weight = simd::broadcast(c.weights != nullptr ? c.weights[k] : 1.0f);
    const float* row = c.y + c.rows[k] * c.columns;
    for (int v = 0; v < kVectors; ++v) sum[v] = simd::fma(weight, load(row, v), sum[v]);
  }
  for (int64_t s = 0; s < c.shared_count; ++s) {
    const float* row = c.shared + s * c.shared_stride;
    for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + load(row, v);
  }
  for (int v = 0; v < kVectors; ++v) {
    T* p = out + j + v * kWidth;
    if (whole) {
      simd::store(p, sum[v]);
    } else {
      simd::store(p, sum[v], rest < kWidth ? rest : kWidth);
    }
  }
}

template <class T>
void combine_to(const Combination& c, T* out) {
  // Enough vectors at a time that the loads of K scattered rows overlap.
  constexpr int kVectors = 4;
  int64_t j = 0;
  for (; j + kVectors * simd::kWidth <= c.columns; j += kVectors * simd::kWidth) {
    combine_columns<kVectors>(c, j, out);
  }
  for (; j < c.columns; j += simd::kWidth) combine_columns<1>(c, j, out);
}

void combine(const Combination& combination, void* out, DType out_dtype) {
  if (out_dtype == DType::kF32) {
    combine_to(combination, static_cast<float*>(out));
  } else if (out_dtype == DType::kBf16) {
    combine_to(combination, static_cast<bf16*>(out));
  } else {
    combine_to(combination, static_cast<f16*>(out));
  }
}

template <class From, class To>
void weigh_row(const From* x, int64_t n, float weight, To* to) {
  const simd::Vec w = simd::broadcast(weight);
  int64_t j = 0;
  for (; j + simd::kWidth <= n; j += simd::kWidth) simd::store(to + j, simd::load(x + j) * w);
  if (j < n) simd::store(to + j, simd::load(x + j, n - j) * w, n - j);
}

template <class From>
void weigh_from(const From* x, int64_t n, float weight, void* to, DType to_dtype) {
  if (to_dtype == DType::kF32) {
    weigh_row(x, n, weight, static_cast<float*>(to));
  } else {
    weigh_row(x, n, weight, static_cast<bf16*>(to));
  }
}

void weigh(const void* x, DType x_dtype, int64_t n, float weight, void* to, DType to_dtype) {
  if (x_dtype == DType::kF32) {
    weigh_from(static_cast<const float*>(x), n, weight, to, to_dtype);
  } else if (x_dtype == DType::kBf16) {
    weigh_from(static_cast<const bf16*>(x), n, weight, to, to_dtype);
  } else {
    weigh_from(static_cast<const f16*>(x), n, weight, to, to_dtype);
  }
}

constexpr Kernels kernels_for(Isa isa) { return {isa, combine, weigh}; }

}  // namespace
}  // namespace moeops::moe_layer_internal
