// SPDX-License-Identifier: Apache-2.0
#pragma once

// exp and what is made of it, over the vector layer: include one simd_<isa>.h first. Without fma,
// so that every ISA gives the same bits. Worst errors over all f32, in units in the last place of
// the exact result (tests/core/simd_test.cc computes them):
//
//   exp        1.0, gradual underflow included; infinity from 88.722839 on
//   sigmoid    2.5 down to x = -88.72, where e^-x overflows and the result becomes 0
//   silu       2.5 likewise
//   gelu_tanh  2.0 for x > 0; for x < 0, 2^-23 of |x|
//
// A NaN stays NaN, and -infinity gives what the formula gives: NaN for silu and gelu_tanh.

namespace moeops {
namespace {
namespace simd {

// e^x for x in [least, 89], below that e^least. Above 88.72 it is infinity.
inline Vec exp_from(float least, Vec x) {
  // Where the arithmetic below would not hold, the result is infinity or too small to matter. NaN
  // passes: min and max give their second operand.
  x = max(broadcast(least), min(broadcast(89.0f), x));
  // x = n ln2 + r, |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds to an integer. ln2 is cut in two so
  // that n times the upper part, and x minus that, are exact.
  const Vec round = broadcast(0x1.8p23f);
  const Vec n = (x * broadcast(0x1.715476p+0f) + round) - round;
  const Vec r = (x - n * broadcast(0x1.63p-1f)) - n * broadcast(-0x1.bd0106p-13f);
  // e^r = 1 + r + r^2 q(r); q by least relative error on |r| <= 0.3473, 3.1e-9.
  Vec q = broadcast(0x1.6a2256p-10f);
  q = q * r + broadcast(0x1.123b02p-7f);
  q = q * r + broadcast(0x1.5558f8p-5f);
  q = q * r + broadcast(0x1.555490p-3f);
  q = q * r + broadcast(0x1.fffffcp-2f);
  return ldexp((q * (r * r) + r) + broadcast(1.0f), n);
}

inline Vec exp(Vec x) { return exp_from(-104.0f, x); }

// 1 + e^x. To a sum with 1, e^-87 is nothing; what lies below would be subnormal, and cost the
// processor a hundred cycles.
inline Vec one_plus_exp(Vec x) { return broadcast(1.0f) + exp_from(-87.0f, x); }

inline Vec sigmoid(Vec x) { return broadcast(1.0f) / one_plus_exp(-x); }

inline Vec silu(Vec x) { return x / one_plus_exp(-x); }

// x / 2 * (1 + tanh z), z = sqrt(2 / pi) * (x + 0.044715 x^3). As 1 + tanh z = 2 / (1 + e^-2z), it
// needs no tanh, and nothing cancels where tanh z comes near -1.
inline Vec gelu_tanh(Vec x) {
  const Vec cubic = x + broadcast(0.044715f) * (x * x * x);
  return x / one_plus_exp(broadcast(-1.5957691216057308f) * cubic);
}

}  // namespace simd
}  // namespace
}  // namespace moeops
