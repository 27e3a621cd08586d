// SPDX-License-Identifier: Apache-2.0
#pragma once

// The vector layer (its interface: simd_scalar.h) on AVX2 with FMA and F16C. xsimd has the
// arithmetic; what it lacks, or does otherwise than the layer promises, is written in intrinsics.

#include <immintrin.h>
#include <moeops/ops/core/dtype.h>

#include <bit>
#include <cstdint>
#include <xsimd/xsimd.hpp>

namespace moeops {
namespace {
namespace simd {

using Vec = xsimd::batch<float, xsimd::avx2>;
using VecI = xsimd::batch<int32_t, xsimd::avx2>;
using Mask = Vec::batch_bool_type;
inline constexpr int kWidth = 8;
inline constexpr int32_t kInfinityBits = 0x7F800000;

using xsimd::abs;
using xsimd::all;
using xsimd::any;
using xsimd::max;
using xsimd::min;
using xsimd::select;

inline Vec broadcast(float a) { return _mm256_set1_ps(a); }
inline VecI broadcast(int32_t a) { return _mm256_set1_epi32(a); }

// The lanes below n, for the masked loads and stores.
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// There are no masked moves of 16 or 8 bits: these go through memory of our own.
inline __m128i load_bytes(const void* p, int64_t bytes) {
  alignas(16) char copy[16] = {};
  __builtin_memcpy(copy, p, static_cast<size_t>(bytes));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(copy));
}
inline void store_bytes(void* p, __m128i v, int64_t bytes) {
  alignas(16) char copy[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(copy), v);
  __builtin_memcpy(p, copy, static_cast<size_t>(bytes));
}

inline Vec from_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
  return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline VecI load(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vec load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline Vec load(const bf16* p, int64_t n) { return from_bf16(load_bytes(p, 2 * n)); }
inline Vec load(const f16* p, int64_t n) { return _mm256_cvtph_ps(load_bytes(p, 2 * n)); }
inline VecI load(const int32_t* p, int64_t n) { return _mm256_maskload_epi32(p, first_lanes(n)); }
// Those at even places, and those at odd places.
inline void load_two(const bf16* p, Vec* a, Vec* b) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *a = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  *b = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)));
}
inline void deinterleave(Vec a, Vec b, Vec* even, Vec* odd) {
  // Within 128-bit lanes first: [a0 a2 b0 b2 a4 a6 b4 b6]; then the pairs into order.
  const auto ordered = [](__m256 v) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xD8));
  };
  *even = ordered(_mm256_shuffle_ps(a, b, 0x88));
  *odd = ordered(_mm256_shuffle_ps(a, b, 0xDD));
}

inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec to_f32(VecI a) { return _mm256_cvtepi32_ps(a); }
inline VecI magnitude_bits(Vec a) {
  return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF));
}
inline float reduce_max(Vec a) {
  __m128 v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
inline float reduce_min(Vec a) {
  __m128 v = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  v = _mm_min_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_min_ss(v, _mm_movehdup_ps(v)));
}
inline int32_t reduce_max(VecI a) {
  __m128i v = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(v, _mm_shuffle_epi32(v, 0xB1)));
}

inline Vec ldexp(Vec a, Vec n) {
  const __m256i exponent = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(exponent, half)));
}
// Of a table of 16, the halves that permutevar8x32 takes.
inline Vec lookup(__m256 low, __m256 high, Vec t) {
  const __m256i i = _mm256_castps_si256(t);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                          _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
inline Vec lookup(const float* table, Vec t) {
  return lookup(_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8), t);
}
inline Vec lookup_scaled(const int32_t* table, Vec t) {
  const auto half = [&](int at) {
    return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + at)));
  };
  const __m256i entry = _mm256_castps_si256(lookup(half(0), half(8), t));
  return _mm256_castsi256_ps(
      _mm256_add_epi32(entry, _mm256_slli_epi32(_mm256_castps_si256(t), 19)));
}

// To the upper halves, the bf16 rounding of dtype.h, but for NaN with more than zeros below.
inline __m256i to_upper_bf16(Vec v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
}
inline __m128i to_bf16_bits(Vec v) {
  const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(to_upper_bf16(v), quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
// Of two vectors in the order of load_two.
inline __m256i to_bf16_bits(Vec a, Vec b) {
  return _mm256_blend_epi16(_mm256_srli_epi32(to_upper_bf16(a), 16), to_upper_bf16(b), 0xAA);
}
inline __m128i to_f16_bits(Vec v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 8 bytes.
inline __m128i to_s8(Vec v) {
  // The lower clamp is the packing's saturation; from 2^31 up the conversion itself would wrap.
  const __m256 clamped = _mm256_min_ps(v, _mm256_set1_ps(127.0f));
  const __m256 number = _mm256_and_ps(clamped, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
  const __m256i q = _mm256_cvtps_epi32(number);
  const __m128i q16 = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  return _mm_packs_epi16(q16, q16);
}
inline __m128i to_u8(Vec v) { return _mm_xor_si128(to_s8(v), _mm_set1_epi8(-128)); }

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16_bits(v));
}
inline void store(f16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16_bits(v));
}
inline void store(int32_t* p, VecI v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline void store(int8_t* p, Vec v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), to_s8(v)); }
inline void store(uint8_t* p, Vec v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), to_u8(v)); }
inline void store(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
inline void store(bf16* p, Vec v, int64_t n) { store_bytes(p, to_bf16_bits(v), 2 * n); }
inline void store(f16* p, Vec v, int64_t n) { store_bytes(p, to_f16_bits(v), 2 * n); }
inline void store(int32_t* p, VecI v, int64_t n) { _mm256_maskstore_epi32(p, first_lanes(n), v); }
inline void store(int8_t* p, Vec v, int64_t n) { store_bytes(p, to_s8(v), n); }
inline void store(uint8_t* p, Vec v, int64_t n) { store_bytes(p, to_u8(v), n); }

inline void store_two(bf16* p, Vec a, Vec b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(a, b));
}

inline void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
inline void stream(bf16* p, Vec v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16_bits(v));
}
inline void stream(f16* p, Vec v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16_bits(v));
}
inline void stream_two(bf16* p, Vec a, Vec b) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(a, b));
}
inline __m256i to_s8_in_range(Vec a, Vec b, Vec c, Vec d) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
  // Packing works within 128-bit lanes: fours of [a b c d a b c d].
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
}
inline void store(int8_t* p, Vec a, Vec b, Vec c, Vec d) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_s8_in_range(a, b, c, d));
}
inline void stream(int8_t* p, Vec a, Vec b, Vec c, Vec d) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_s8_in_range(a, b, c, d));
}
inline void stream_fence() { _mm_sfence(); }

// The bits of 16-bit floats without their sign order as their magnitudes do.
template <class T>
inline float max_magnitude(const T* p, int64_t n) {
  const __m256i magnitude = _mm256_set1_epi16(0x7FFF);
  __m256i largest = _mm256_setzero_si256();
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + j));
    largest = _mm256_max_epu16(largest, _mm256_and_si256(v, magnitude));
  }
  for (; j < n; j += 8) {
    const __m256i v = _mm256_zextsi128_si256(load_bytes(p + j, 2 * (n - j < 8 ? n - j : 8)));
    largest = _mm256_max_epu16(largest, _mm256_and_si256(v, magnitude));
  }
  alignas(16) T lanes[8];
  _mm_store_si128(
      reinterpret_cast<__m128i*>(lanes),
      _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1)));
  return std::bit_cast<float>(reduce_max(magnitude_bits(load(lanes))));
}

}  // namespace simd
}  // namespace
}  // namespace moeops

#include "ops/core/simd_pairs.h"
