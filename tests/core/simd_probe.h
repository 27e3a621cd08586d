// SPDX-License-Identifier: Apache-2.0
#pragma once

// The vector layer of one ISA, made callable: each function runs over arrays in full vectors and a
// tail, as kernels do.

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/machine.h>

#include <cstdint>

namespace moeops::test {

struct SimdProbe {
  using Unary = void (*)(const float* x, float* y, int64_t n);

  Isa isa;  // the least that it needs
  int width;
  Unary exp, sigmoid, silu, gelu_tanh, abs;
  void (*fma)(const float* a, const float* b, const float* c, float* y, int64_t n);
  void (*min)(const float* a, const float* b, float* y, int64_t n);
  void (*max)(const float* a, const float* b, float* y, int64_t n);
  // y = a < b ? a + b : a == b ? a * b : a - b, by masks
  void (*select)(const float* a, const float* b, float* y, int64_t n);
  void (*ldexp)(const float* a, const float* e, float* y, int64_t n);
  void (*lookup)(const float* table, const float* t, float* y, int64_t n);
  void (*lookup_scaled)(const int32_t* table, const float* t, float* y, int64_t n);
  void (*bf16_to_f32)(const bf16* x, float* y, int64_t n);
  void (*f16_to_f32)(const f16* x, float* y, int64_t n);
  void (*f32_to_bf16)(const float* x, bf16* y, int64_t n);
  void (*f32_to_bf16_by_twos)(const float* x, bf16* y, int64_t n);  // n a multiple of 2 widths
  void (*f32_to_f16)(const float* x, f16* y, int64_t n);
  void (*f32_to_s8)(const float* x, int8_t* y, int64_t n);
  void (*f32_to_u8)(const float* x, uint8_t* y, int64_t n);
  void (*i32_sum_to_f32)(const int32_t* a, const int32_t* b, float* y, int64_t n);
  void (*i32_copy)(const int32_t* x, int32_t* y, int64_t n);
  void (*stream_bf16)(const float* x, bf16* y, int64_t n);  // n a multiple of the width
  void (*stream_f32)(const float* x, float* y, int64_t n);
  void (*stream_s8)(const float* x, int8_t* y, int64_t n);  // n a multiple of 4 widths
  // Loaded and stored, or streamed, by twos; n a multiple of 2 widths.
  void (*copy_bf16)(const bf16* x, bf16* y, int64_t n, bool stream);
  void (*copy_f16)(const f16* x, f16* y, int64_t n, bool stream);
  void (*copy_f32)(const float* x, float* y, int64_t n, bool stream);
  float (*max_magnitude_bf16)(const bf16* x, int64_t n);
  float (*max_magnitude_f16)(const f16* x, int64_t n);
  // Over one vector.
  void (*deinterleave)(const float* x, float* even, float* odd);
  float (*reduce_max)(const float* x);
  float (*reduce_min)(const float* x);
  int32_t (*reduce_magnitude)(const float* x, int64_t n);  // of all n
  int (*any_all_less)(const float* a, const float* b);     // any + 2 * all
};

extern const SimdProbe simd_probe_scalar;
extern const SimdProbe simd_probe_avx2;
extern const SimdProbe simd_probe_avx512;

}  // namespace moeops::test
