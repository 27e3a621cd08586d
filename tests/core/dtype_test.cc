// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/core/dtype.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>

#include "ref/numeric.h"

namespace moeops {
namespace {

// Every 16-bit pattern, against the reference's own decoder; and back.
TEST(DType, EveryHalfDecodesAndReturns) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto b = static_cast<uint16_t>(bits);
    for (const bool brain : {false, true}) {
      const float value = brain ? to_f32(bf16{b}) : to_f32(f16{b});
      const float expected = ref::decode_half(b, brain ? 7 : 10);
      const uint16_t back = brain ? to_bf16(value).bits : to_f16(value).bits;
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(value)) << b;
        ASSERT_EQ(back, b | (brain ? 0x0040 : 0x0200)) << "sign and payload kept, quiet";
      } else {
        ASSERT_EQ(std::memcmp(&value, &expected, sizeof(value)), 0) << b;
        ASSERT_EQ(back, b);
      }
    }
  }
}

// Rounding: around every boundary between neighbours (a tie, one ulp of f32 to each side), and at
// random, against the reference's rounding.
TEST(DType, RoundsToNearestEven) {
  const auto check = [](float x) {
    ASSERT_EQ(to_bf16(x).bits, ref::encode_half(x, 7)) << x;
    ASSERT_EQ(to_f16(x).bits, ref::encode_half(x, 10)) << x;
  };
  for (uint32_t bits = 0; bits < 0x7F80; ++bits) {
    for (const uint32_t low : {0x7FFFu, 0x8000u, 0x8001u})
      check(std::bit_cast<float>(bits << 16 | low));
  }
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) {
    const float a = to_f32(f16{static_cast<uint16_t>(bits)});
    const float b = bits + 1 == 0x7C00 ? 65536.0f : to_f32(f16{static_cast<uint16_t>(bits + 1)});
    const float tie = (a + b) / 2;
    for (const float x : {std::nextafter(tie, 0.0f), tie, std::nextafter(tie, INFINITY)}) {
      check(x);
      check(-x);
    }
  }
  std::mt19937 random(5);
  for (int i = 0; i < 1000000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (!std::isnan(x)) check(x);
  }
}

TEST(DType, TiesGoToEven) {
  EXPECT_EQ(to_bf16(1.00390625f).bits, 0x3F80);  // 1 + 2^-8: halfway, down to 1
  EXPECT_EQ(to_bf16(1.01171875f).bits, 0x3F82);  // 1 + 3 * 2^-8: halfway, up
  EXPECT_EQ(to_f16(2049.0f).bits, 0x6800);       // halfway between 2048 and 2050
  EXPECT_EQ(to_f16(65519.0f).bits, 0x7BFF);
  EXPECT_EQ(to_f16(65520.0f).bits, 0x7C00);
  EXPECT_EQ(to_f16(0x1p-25f).bits, 0x0000);  // halfway between 0 and the smallest subnormal
  EXPECT_EQ(to_f16(0x1.8p-24f).bits, 0x0002);
}

}  // namespace
}  // namespace moeops
