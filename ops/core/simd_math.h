// SPDX-License-Identifier: Apache-2.0
#pragma once

// exp and what is made of it, over the vector layer: include one simd_<isa>.h first. Worst errors
// over all f32, in units in the last place of the exact result (tests/core/simd_test.cc computes
// them):
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

// e^x, or e^-x, for an exponent in [least, 89], below that e^least. Above 88.72 it is infinity.
template <bool Negative>
inline Vec exp_from(float least, Vec x) {
  constexpr float s = Negative ? -1.0f : 1.0f;
  // Where the arithmetic below would not hold, the result is infinity or too small to matter. NaN
  // passes: min and max give their second operand.
  x = max(broadcast(Negative ? -89.0f : least), min(broadcast(Negative ? -least : 89.0f), x));
  // +-x = n ln2 +- r, |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds to an integer. ln2 is cut in two;
  // x minus n times the upper part is exact.
  const Vec round = broadcast(0x1.8p23f);
  const Vec n = fma(x, broadcast(s * 0x1.715476p+0f), round) - round;
  Vec r = fma(n, broadcast(s * -0x1.62e430p-1f), x);
  r = fma(n, broadcast(s * 0x1.05c610p-29f), r);
  // e^r = 1 + r + r^2 q(r); q by least relative error on |r| <= 0.3473, 3.1e-9.
  Vec p = broadcast(0x1.6a2256p-10f);
  p = fma(p, r, broadcast(s * 0x1.123b02p-7f));
  p = fma(p, r, broadcast(0x1.5558f8p-5f));
  p = fma(p, r, broadcast(s * 0x1.555490p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(s));
  p = fma(p, r, broadcast(1.0f));
  return ldexp(p, n);
}

inline Vec exp(Vec x) { return exp_from<false>(-104.0f, x); }

// 1 + e^-x. To a sum with 1, e^-87 is nothing; what lies below would be subnormal, and cost the
// processor a hundred cycles.
inline Vec one_plus_exp_minus(Vec x) { return broadcast(1.0f) + exp_from<true>(-87.0f, x); }

inline Vec sigmoid(Vec x) { return broadcast(1.0f) / one_plus_exp_minus(x); }

inline Vec silu(Vec x) { return x / one_plus_exp_minus(x); }

// x / 2 * (1 + tanh z), z = sqrt(2 / pi) * (x + 0.044715 x^3). As 1 + tanh z = 2 / (1 + e^-2z), it
// needs no tanh, and nothing cancels where tanh z comes near -1.
inline Vec gelu_tanh(Vec x) {
  // 2z = x (k + 0.044715 k x^2)
  const Vec k = fma(x * x, broadcast(0.07135481628f), broadcast(1.5957691216f));
  return x / one_plus_exp_minus(x * k);
}

}  // namespace simd
}  // namespace
}  // namespace moeops
