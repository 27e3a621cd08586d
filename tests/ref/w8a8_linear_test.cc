// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"

namespace moeops {
namespace {

using test::expect_refused;

struct Args : W8a8LinearArgs, ref::Weights {};

Status call(const Args& args) { return ref::w8a8_linear(args, args); }

// x is quantised to {127, -64} with scale 1 and {127, 0} with scale 2; the sums are
// {127 - 128, 381} and {127, 381}.
class W8a8Linear : public testing::Test {
 protected:
  W8a8Linear() {
    args_.x = {x_, {2, 2}};
    args_.w = {w_, {2, 2}};
    args_.w_scale = {w_scale_, {2}};
    args_.bias = {bias_, {2}};
    args_.y = {y_.data(), {2, 2}};
  }
  void expect(const std::vector<float>& y) {
    const Status status = call(args_);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(y_, y);
  }

  float x_[4] = {127, -63.5f, 254, 0};
  const int8_t w_[4] = {1, 2, 3, 0};
  float w_scale_[2] = {3, 2};
  const float bias_[2] = {10, 100};
  std::vector<float> y_ = std::vector<float>(4);
  Args args_;
};

TEST_F(W8a8Linear, ByHand) {
  expect({-1 * 3 + 10, 381 * 2 + 100, 127 * 3 * 2 + 10, 381 * 2 * 2 + 100});
  args_.bias = {};
  expect({-3, 762, 762, 1524});
  args_.w_scale = {w_scale_, {1}};
  expect({-3, 1143, 762, 2286});
}

TEST_F(W8a8Linear, IntegerBiasComesBeforeTheScales) {
  const int32_t bias[2] = {1, -381};
  args_.bias = {bias, {2}};
  expect({0, 0, 128 * 3 * 2, 0});
}

TEST_F(W8a8Linear, TransposedWeights) {
  const int8_t w[4] = {1, 3, 2, 0};
  args_.w = {w, {2, 2}};
  args_.transpose_w = true;
  expect({7, 862, 772, 1624});
}

TEST_F(W8a8Linear, HalfFormats) {
  const bf16 x_bf16[2] = {{0x42FE}, {0xC27E}};  // 127, -63.5
  const f16 x_f16[2] = {{0x57F0}, {0xD3F0}};
  bf16 y_bf16[2];
  f16 y_f16[2];
  args_.x = {x_bf16, {1, 2}};
  args_.y = {y_bf16, {1, 2}};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(y_bf16[0].bits, 0x40E0);  // 7
  EXPECT_EQ(y_bf16[1].bits, 0x4458);  // 862 between 860 and 864
  args_.x = {x_f16, {1, 2}};
  args_.y = {y_f16, {1, 2}};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(y_f16[0].bits, 0x4700);
  EXPECT_EQ(y_f16[1].bits, 0x62BC);  // 862
}

TEST_F(W8a8Linear, RowsMayBeStrided) {
  const float x[5] = {127, -63.5f, 1000, 254, 0};
  std::vector<float> y(6, 55.0f);
  args_.x = {x, {2, 2}, 3};
  args_.y = {y.data(), {2, 2}, 4};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(y, (std::vector<float>{7, 862, 55, 55, 772, 1624}));
}

TEST_F(W8a8Linear, ANonFiniteValueIsItsRowsAlone) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    x_[1] = bad;
    ASSERT_TRUE(call(args_).ok());
    EXPECT_TRUE(std::isnan(y_[0]));
    EXPECT_TRUE(std::isnan(y_[1]));
    EXPECT_EQ(y_[2], 772.0f);
    EXPECT_EQ(y_[3], 1624.0f);
  }
}

TEST_F(W8a8Linear, ZeroSizes) {
  Args args = args_;  // M = 0
  y_.assign(4, 55.0f);
  args.x = {x_, {0, 2}};
  args.y = {y_.data(), {0, 2}};
  EXPECT_TRUE(call(args).ok());
  args = args_;  // N = 0
  args.w = {w_, {0, 2}};
  args.w_scale = {w_scale_, {0}};
  args.bias = {bias_, {0}};
  args.y = {y_.data(), {2, 0}};
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(y_, std::vector<float>(4, 55.0f));
  args = args_;  // K = 0
  args.x = {x_, {2, 0}};
  args.w = {w_, {2, 0}};
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(y_, (std::vector<float>{10, 100, 10, 100}));
}

TEST_F(W8a8Linear, EveryViewIsChecked) {
  const float x[6] = {}, w_scale[9] = {}, bias[9] = {};
  const int8_t w[9 * 2] = {};
  float y[27];
  args_.x = {x, {3, 2}};
  args_.w = {w, {9, 2}};
  args_.w_scale = {w_scale, {9}};
  args_.bias = {bias, {9}};
  args_.y = {y, {3, 9}};
  test::sweep_contract<Args>(
      args_,
      {{"x", &Args::x}, {"w", &Args::w}, {"w_scale", &Args::w_scale}, {"bias", &Args::bias, false}},
      {{"y", &Args::y}}, call);
}

TEST_F(W8a8Linear, TooManyProductsForS32) {
  args_.x = {x_, {0, 65537}};
  args_.w = {w_, {0, 65537}};
  expect_refused(call(args_),
                 "w8a8_linear: K = 65537 is more than 65536, beyond which s32 overflows");
}

}  // namespace
}  // namespace moeops
