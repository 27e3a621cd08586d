// SPDX-License-Identifier: Apache-2.0
#pragma once

// exp and what is made of it, over the vector layer: include one simd_<isa>.h first. Worst errors
// over all f32, in units in the last place of the exact result (tests/core/simd_test.cc computes
// them):
//
//   exp        1.0, gradual underflow included; infinity from 88.722839 on
//   sigmoid    2.5 down to x = -88.72, where e^-x overflows and the result becomes 0
//   silu       2.4 likewise
//   gelu_tanh  1.9 for x > 0; for x < 0, 2^-23.6 of |x|
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

// 2^(j / 16) rounded to nearest: its bits less j * 2^19, for lookup_scaled, and its relative error.
constexpr int32_t kSixteenths[] = {
    0x3F800000 - 0x000000, 0x3F85AAC3 - 0x080000, 0x3F8B95C2 - 0x100000, 0x3F91C3D3 - 0x180000,
    0x3F9837F0 - 0x200000, 0x3F9EF532 - 0x280000, 0x3FA5FED7 - 0x300000, 0x3FAD583F - 0x380000,
    0x3FB504F3 - 0x400000, 0x3FBD08A4 - 0x480000, 0x3FC5672A - 0x500000, 0x3FCE248C - 0x580000,
    0x3FD744FD - 0x600000, 0x3FE0CCDF - 0x680000, 0x3FEAC0C7 - 0x700000, 0x3FF5257D - 0x780000,
};
constexpr float kSixteenthsError[] = {
    0.0f,
    -0x1.8d96d2p-25f,
    0x1.9c0c22p-27f,
    -0x1.964902p-25f,
    -0x1.125002p-25f,
    -0x1.370be4p-25f,
    0x1.0a3552p-25f,
    0x1.00d8acp-27f,
    -0x1.26055cp-26f,
    0x1.05cb44p-25f,
    -0x1.67a1cap-28f,
    -0x1.a3b5e4p-28f,
    0x1.f9c306p-27f,
    0x1.6961b4p-28f,
    0x1.a5217cp-28f,
    -0x1.61428ep-28f,
};

// 1 + e^-x, infinity where e^-x is. Such a sum needs no gradual underflow. The table spares steps
// of the polynomial, each of which waits for the one before: they decide how fast this is.
[[gnu::always_inline]] inline Vec one_plus_exp_minus(Vec x) {
  // Beside 1, e^-32 is nothing. NaN passes: min and max give their second operand.
  x = max(broadcast(-89.0f), min(broadcast(32.0f), x));
  // -x = k ln2 / 16 - r, |r| <= ln2 / 32. A sum with 1.5 * 2^23 - 16 has k - 16 in its lowest bits,
  // so that half is 2^(k / 16) / 2, which is finite.
  const Vec round = broadcast(0x1.8p23f - 16.0f);
  const Vec t = fma(x, broadcast(-0x1.715476p+4f), round);
  const Vec half = lookup_scaled(kSixteenths, t);
  // ln2 / 16 is cut in two; x plus k times the upper part is exact. What the lower part and the
  // rounding of the table add to r matters to the first power of r only.
  const Vec k = t - round;
  const Vec r = fma(k, broadcast(0x1.62e430p-5f), x);
  const Vec rest = fma(k, broadcast(-0x1.05c610p-33f), lookup(kSixteenthsError, t));
  // e^-r = 1 + r q(r), by least relative error on |r| <= 0.0217, 1.6e-9.
  Vec q = fma(r, broadcast(-0x1.55559cp-3f), broadcast(0x1.00022p-1f));
  q = fma(r, q, broadcast(-1.0f));
  return fma(fma(half * (r + rest), q, half), broadcast(2.0f), broadcast(1.0f));
}

[[gnu::always_inline]] inline Vec sigmoid(Vec x) { return broadcast(1.0f) / one_plus_exp_minus(x); }

[[gnu::always_inline]] inline Vec silu(Vec x) { return x / one_plus_exp_minus(x); }

// x / 2 * (1 + tanh z), z = sqrt(2 / pi) * (x + 0.044715 x^3). As 1 + tanh z = 2 / (1 + e^-2z), it
// needs no tanh, and nothing cancels where tanh z comes near -1.
[[gnu::always_inline]] inline Vec gelu_tanh(Vec x) {
  // 2z = x (k + 0.044715 k x^2)
  const Vec k = fma(x * x, broadcast(0.07135481628f), broadcast(1.5957691216f));
  return x / one_plus_exp_minus(x * k);
}

}  // namespace simd
}  // namespace
}  // namespace moeops
