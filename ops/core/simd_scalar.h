// SPDX-License-Identifier: Apache-2.0
#pragma once

// The vector layer: one interface over the registers of an ISA, so that a kernel is one generic
// body that each ISA file compiles with its own flags:
//
//   // kernels_avx2.cc
//   #include "ops/core/simd_avx2.h"    // or simd_scalar.h, simd_avx512.h: exactly one of them
//   #include "ops/some_op/kernels_body.h"
//
// This file is its definition, on "registers" of one lane; the other two do to every lane what is
// done here. Everything has internal linkage (architecture: ISA variants), and every function
// gives the same bits for a lane whatever the ISA, its position and its neighbours.
//
// TYPES      Vec, VecI, Mask: kWidth lanes of f32, i32, true or false.
//            Element: float, bf16, f16.
// LOAD       broadcast(float), broadcast(int32_t)
//            load(const Element*) -> Vec             load(const int32_t*) -> VecI
//            load(p, n): the first n lanes, n in [0, kWidth]; the others are 0. Nothing past the
//            n elements is read.
//            load_two(const Element*, Vec* a, Vec* b): the 2 * kWidth elements there. Of bf16,
//            which takes half the work of two loads, a is those at even places, b those at odd
//            ones.
//            deinterleave(Vec a, Vec b, Vec* even, Vec* odd): of the 2 * kWidth values [a b].
// STORE      store(Element*, Vec)                    to nearest even, NaN stays and becomes quiet
//            store(int8_t*, Vec)                     clamp(rint(v), -128, 127), NaN gives 0
//            store(uint8_t*, Vec)                    the s8 value plus 128: what VNNI GEMMs read
//            store(int32_t*, VecI)
//            store(p, v, n): the first n lanes; nothing past the n elements is written.
//            store_two(Element*, Vec a, Vec b)       in the order of load_two; a NaN for bf16 is to
//                                                    be quiet with a lower half of zeros, as it is
//                                                    where arithmetic has made it of bf16
//            store(int8_t*, Vec a, b, c, d)          4 * kWidth values with |v| < 2^31, in a
//                                                    third of the work of four stores
//            stream(Element*, Vec)                   past the caches, ordered by stream_fence();
//                                                    p aligned to the kWidth elements
//            stream_two(Element*, Vec a, Vec b)      likewise, p aligned to the 2 * kWidth elements
//            stream(int8_t*, Vec a, b, c, d)         likewise, p aligned to the 4 * kWidth values
// ARITHMETIC + - * / on Vec, + on VecI (wraps), fma(a, b, c) = a * b + c rounded once
//            abs(a); min(a, b) = a < b ? a : b, and so for max: b where either is NaN
//            ldexp(a, n) = a * 2^n rounded once, n integral in [-250, 250], |a| in [2^-1, 2)
//            lookup(const float* table, t): table[i % 16], i the bits of t
//            lookup_scaled(const int32_t* table, t): the f32 whose bits are table[i % 16] + i *
//            2^19, modulo 2^32: i / 16 goes into the exponent.
//            to_f32(VecI), rounded to nearest even
//            magnitude_bits(Vec) -> VecI: |a| as an integer, which orders as |a| does, with
//            infinity and then NaN on top: the integer maximum of a row is its max |a| and, unless
//            it reaches kInfinityBits, the proof that the row is finite
//            max(VecI, VecI)
//            max_magnitude(const bf16* or f16*, n) -> float: max |p[j]|, or, where one is none,
//            infinity or NaN; 0 for n = 0
// COMPARE    < <= > >= == on Vec -> Mask (false for NaN), & | on Mask, select(Mask, a, b), any, all
// REDUCE     reduce_max(Vec), reduce_min(Vec) without NaN, reduce_max(VecI)
//
// There is no sum over lanes: its order, and so its bits, would depend on the width.

#include <moeops/ops/core/dtype.h>

#include <bit>
#include <cmath>
#include <cstdint>

namespace moeops {
namespace {
namespace simd {

using Vec = float;
using VecI = int32_t;
using Mask = bool;
inline constexpr int kWidth = 1;
inline constexpr int32_t kInfinityBits = 0x7F800000;

inline Vec broadcast(float a) { return a; }
inline VecI broadcast(int32_t a) { return a; }

inline Vec load(const float* p) { return *p; }
inline Vec load(const bf16* p) { return moeops::to_f32(*p); }
inline Vec load(const f16* p) { return moeops::to_f32(*p); }
inline VecI load(const int32_t* p) { return *p; }
template <class T>
inline auto load(const T* p, int64_t n) -> decltype(load(p)) {
  return n > 0 ? load(p) : decltype(load(p)){};
}
inline void deinterleave(Vec a, Vec b, Vec* even, Vec* odd) {
  *even = a;
  *odd = b;
}

inline Vec fma(Vec a, Vec b, Vec c) { return std::fma(a, b, c); }
inline Vec abs(Vec a) { return std::fabs(a); }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec select(Mask mask, Vec a, Vec b) { return mask ? a : b; }
inline bool any(Mask mask) { return mask; }
inline bool all(Mask mask) { return mask; }
inline Vec to_f32(VecI a) { return static_cast<float>(a); }
inline VecI magnitude_bits(Vec a) { return std::bit_cast<int32_t>(a) & 0x7FFFFFFF; }
inline VecI max(VecI a, VecI b) { return a > b ? a : b; }
inline float reduce_max(Vec a) { return a; }
inline float reduce_min(Vec a) { return a; }
inline int32_t reduce_max(VecI a) { return a; }

// In two steps: 2^n may lie outside f32. The first is exact.
inline Vec ldexp(Vec a, Vec n) {
  const int32_t exponent = n == n ? static_cast<int32_t>(n) : 0;  // of a NaN `a`, by exp
  const int32_t half = exponent >> 1;
  const auto power = [](int32_t e) { return std::bit_cast<float>((e + 127) << 23); };
  return a * power(half) * power(exponent - half);
}

inline Vec lookup(const float* table, Vec t) { return table[std::bit_cast<uint32_t>(t) & 15]; }
inline Vec lookup_scaled(const int32_t* table, Vec t) {
  const auto i = std::bit_cast<uint32_t>(t);
  return std::bit_cast<float>(static_cast<uint32_t>(table[i & 15]) + (i << 19));
}

inline void store(float* p, Vec v) { *p = v; }
inline void store(bf16* p, Vec v) { *p = to_bf16(v); }
inline void store(f16* p, Vec v) { *p = to_f16(v); }
inline void store(int32_t* p, VecI v) { *p = v; }
inline void store(int8_t* p, Vec v) {
  const Vec clamped = v == v ? max(min(v, 127.0f), -128.0f) : 0.0f;
  // From 2^23 on, an f32's unit is 1: the FPU rounds half to even there.
  *p = static_cast<int8_t>((clamped + 0x1.8p23f) - 0x1.8p23f);
}
inline void store(uint8_t* p, Vec v) {
  int8_t q;
  store(&q, v);
  *p = static_cast<uint8_t>(q + 128);
}
template <class T, class V>
inline void store(T* p, V v, int64_t n) {
  if (n > 0) store(p, v);
}
template <class T>
inline void stream(T* p, Vec v) {
  store(p, v);
}
inline void store(int8_t* p, Vec a, Vec b, Vec c, Vec d) {
  store(p, a);
  store(p + 1, b);
  store(p + 2, c);
  store(p + 3, d);
}
inline void stream(int8_t* p, Vec a, Vec b, Vec c, Vec d) { store(p, a, b, c, d); }
inline void stream_fence() {}

// The bits of 16-bit floats without their sign order as their magnitudes do.
template <class T>
inline float max_magnitude(const T* p, int64_t n) {
  uint16_t largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    const auto bits = static_cast<uint16_t>(p[j].bits & 0x7FFF);
    if (bits > largest) largest = bits;
  }
  return moeops::to_f32(T{largest});
}

}  // namespace simd
}  // namespace
}  // namespace moeops

#include "ops/core/simd_pairs.h"
