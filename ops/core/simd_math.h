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

inline Vec exp(Vec x) {
  // Where the arithmetic below would not hold, the result is infinity or 0. NaN passes: min and max
  // give their second operand.
  x = max(broadcast(-104.0f), min(broadcast(89.0f), x));
  // x = n ln2 + r, |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds to an integer. ln2 is cut in two; x
  // minus n times the upper part is exact.
  const Vec round = broadcast(0x1.8p23f);
  const Vec n = fma(x, broadcast(0x1.715476p+0f), round) - round;
  Vec r = fma(n, broadcast(-0x1.62e430p-1f), x);
  r = fma(n, broadcast(0x1.05c610p-29f), r);
  // e^r by least relative error on |r| <= 0.3473, 3.1e-9.
  Vec p = broadcast(0x1.6a2256p-10f);
  p = fma(p, r, broadcast(0x1.123b02p-7f));
  p = fma(p, r, broadcast(0x1.5558f8p-5f));
  p = fma(p, r, broadcast(0x1.555490p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return ldexp(p, n);
}

// The bits of 2^(j / 8), rounded to nearest, less j * 2^20, for lookup_scaled.
constexpr int32_t kEighths[] = {
    0x3F800000 - 0x000000, 0x3F8B95C2 - 0x100000, 0x3F9837F0 - 0x200000, 0x3FA5FED7 - 0x300000,
    0x3FB504F3 - 0x400000, 0x3FC5672A - 0x500000, 0x3FD744FD - 0x600000, 0x3FEAC0C7 - 0x700000,
};

// 1 + e^-x, infinity where e^-x is. Such a sum needs no gradual underflow. A table spares steps of
// the polynomial, each of which waits for the one before: they decide how fast this is.
inline Vec one_plus_exp_minus(Vec x) {
  // Beside 1, e^-32 is nothing. NaN passes: min and max give their second operand.
  x = max(broadcast(-89.0f), min(broadcast(32.0f), x));
  // -x = k ln2 / 8 - r, |r| <= ln2 / 16. A sum with 1.5 * 2^23 - 8 has k - 8 in its lowest bits, so
  // that half is 2^(k / 8) / 2, which is finite.
  const Vec round = broadcast(0x1.8p23f - 8.0f);
  const Vec t = fma(x, broadcast(-0x1.715476p+3f), round);
  const Vec half = lookup_scaled(kEighths, t);
  // ln2 / 8 is cut in two; x plus k times the upper part is exact.
  const Vec k = t - round;
  Vec r = fma(k, broadcast(0x1.62e430p-4f), x);
  r = fma(k, broadcast(-0x1.05c610p-32f), r);
  // e^-r = 1 + r q(r), by least relative error on |r| <= 0.0434, 2.6e-8.
  Vec q = fma(r, broadcast(-0x1.555658p-3f), broadcast(0x1.00087ap-1f));
  q = fma(r, q, broadcast(-1.0f));
  return fma(fma(half * r, q, half), broadcast(2.0f), broadcast(1.0f));
}

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
