// SPDX-License-Identifier: Apache-2.0
#pragma once

// The vector layer (its interface: simd_scalar.h) on AVX-512 F, BW, DQ, VL. xsimd has the
// arithmetic; what it lacks, or does otherwise than the layer promises (its fma is none on
// AVX-512), is written in intrinsics.

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for a mistake
// (https://gcc.gnu.org/PR105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include <moeops/ops/core/dtype.h>

#include <bit>
#include <cstdint>
#include <xsimd/xsimd.hpp>

namespace moeops {
namespace {
namespace simd {

using Vec = xsimd::batch<float, xsimd::avx512bw>;
using VecI = xsimd::batch<int32_t, xsimd::avx512bw>;
using Mask = Vec::batch_bool_type;
inline constexpr int kWidth = 16;
inline constexpr int32_t kInfinityBits = 0x7F800000;

using xsimd::abs;
using xsimd::all;
using xsimd::any;
using xsimd::max;
using xsimd::min;
using xsimd::select;

inline Vec broadcast(float a) { return _mm512_set1_ps(a); }
inline VecI broadcast(int32_t a) { return _mm512_set1_epi32(a); }

// The lanes below n, for the masked loads and stores.
inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>((1u << static_cast<unsigned>(n)) - 1u);
}

inline Vec from_bf16(__m256i bits) {
  // Each word goes to an upper half.
  const __m512i place =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(0x10000));
  return _mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, place, _mm512_castsi256_si512(bits)));
}

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline VecI load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline Vec load(const bf16* p, int64_t n) {
  return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline Vec load(const f16* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline VecI load(const int32_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi32(first_lanes(n), p);
}
// Those at even places, and those at odd places.
inline void load_two(const bf16* p, Vec* a, Vec* b) {
  const __m512i words = _mm512_loadu_si512(p);
  *a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  *b = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
}
inline void deinterleave(Vec a, Vec b, Vec* even, Vec* odd) {
  const __m512i order =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = _mm512_permutex2var_ps(a, order, b);
  *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(order, _mm512_set1_epi32(1)), b);
}

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec to_f32(VecI a) { return _mm512_cvtepi32_ps(a); }
inline VecI magnitude_bits(Vec a) {
  return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF));
}
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
inline float reduce_min(Vec a) { return _mm512_reduce_min_ps(a); }
inline int32_t reduce_max(VecI a) { return _mm512_reduce_max_epi32(a); }
inline Vec ldexp(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
inline Vec lookup(const float* table, Vec t) {
  return _mm512_permutexvar_ps(_mm512_castps_si512(t), _mm512_loadu_ps(table));
}
inline Vec lookup_scaled(const int32_t* table, Vec t) {
  const __m512i i = _mm512_castps_si512(t);
  const __m512i entry = _mm512_permutexvar_epi32(i, _mm512_loadu_si512(table));
  return _mm512_castsi512_ps(_mm512_add_epi32(entry, _mm512_slli_epi32(i, 19)));
}

// To the upper halves, the bf16 rounding of dtype.h, but for NaN with more than zeros below.
// (vcvtneps2bf16 would flush subnormals.)
inline __m512i to_upper_bf16(Vec v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
}
inline __m256i to_bf16_bits(Vec v) {
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_or_epi32(to_upper_bf16(v), nan, _mm512_castps_si512(v),
                                             _mm512_set1_epi32(0x00400000));
  const __m512i upper =
      _mm512_setr_epi32(0x00030001, 0x00070005, 0x000B0009, 0x000F000D, 0x00130011, 0x00170015,
                        0x001B0019, 0x001F001D, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, words));
}
// Of two vectors in the order of load_two.
inline __m512i to_bf16_bits(Vec a, Vec b) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(to_upper_bf16(a), 16),
                                 to_upper_bf16(b));
}
inline __m256i to_f16_bits(Vec v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m128i to_s8(Vec v) {
  // The lower clamp is the narrowing's saturation; from 2^31 up the conversion itself would wrap.
  const __m512 clamped = _mm512_min_ps(v, _mm512_set1_ps(127.0f));
  const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  return _mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(number, clamped));
}
inline __m128i to_u8(Vec v) { return _mm_xor_si128(to_s8(v), _mm_set1_epi8(-128)); }

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(v));
}
inline void store(f16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16_bits(v));
}
inline void store(int32_t* p, VecI v) { _mm512_storeu_si512(p, v); }
inline void store(int8_t* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_s8(v)); }
inline void store(uint8_t* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_u8(v)); }
inline void store(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
inline void store(bf16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16_bits(v));
}
inline void store(f16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_f16_bits(v));
}
inline void store(int32_t* p, VecI v, int64_t n) { _mm512_mask_storeu_epi32(p, first_lanes(n), v); }
inline void store(int8_t* p, Vec v, int64_t n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), to_s8(v));
}
inline void store(uint8_t* p, Vec v, int64_t n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), to_u8(v));
}

inline void store_two(bf16* p, Vec a, Vec b) { _mm512_storeu_si512(p, to_bf16_bits(a, b)); }

inline void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
inline void stream(bf16* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(v));
}
inline void stream(f16* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16_bits(v));
}
inline void stream_two(bf16* p, Vec a, Vec b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), to_bf16_bits(a, b));
}
inline __m512i to_s8_in_range(Vec a, Vec b, Vec c, Vec d) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
  // Packing works within 128-bit lanes: four times fours of [a b c d].
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
}
inline void store(int8_t* p, Vec a, Vec b, Vec c, Vec d) {
  _mm512_storeu_si512(p, to_s8_in_range(a, b, c, d));
}
inline void stream(int8_t* p, Vec a, Vec b, Vec c, Vec d) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), to_s8_in_range(a, b, c, d));
}
inline void stream_fence() { _mm_sfence(); }

// The bits of 16-bit floats without their sign order as their magnitudes do.
template <class T>
inline float max_magnitude(const T* p, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  __m512i largest = _mm512_setzero_si512();
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(p + j), magnitude));
  }
  const auto tail = static_cast<__mmask32>((uint64_t{1} << static_cast<unsigned>(n - j)) - 1);
  largest =
      _mm512_max_epu16(largest, _mm512_and_si512(_mm512_maskz_loadu_epi16(tail, p + j), magnitude));
  alignas(32) T lanes[16];
  _mm256_store_si256(
      reinterpret_cast<__m256i*>(lanes),
      _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1)));
  return std::bit_cast<float>(reduce_max(magnitude_bits(load(lanes))));
}

}  // namespace simd
}  // namespace
}  // namespace moeops

#include "ops/core/simd_pairs.h"
