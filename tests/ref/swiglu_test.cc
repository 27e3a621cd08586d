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

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();

// With alpha 0 the sigmoid is 1/2: g / 2 * (u + 1), exact.
SwigluParams oai(float limit, float alpha = 0.0f, Gate gate = Gate::kLeft) {
  return {GatedActivation::kSwigluOai, gate, limit, alpha};
}

// Dense f32 rows of `width`.
std::vector<float> swiglu(const SwigluParams& params, const std::vector<float>& x, int64_t width) {
  const int64_t M = static_cast<int64_t>(x.size()) / width;
  std::vector<float> y(x.size() / 2, 55.0f);
  SwigluArgs args;
  args.x = {x.data(), {M, width}};
  args.swiglu = params;
  args.y = {y.data(), {M, width / 2}};
  const Status status = ref::swiglu(args);
  EXPECT_TRUE(status.ok()) << status.message();
  return y;
}

TEST(Swiglu, GateLayouts) {
  EXPECT_EQ(swiglu(oai(100, 0, Gate::kLeft), {1, 2, 3, 4}, 4), (std::vector<float>{2, 5}));
  EXPECT_EQ(swiglu(oai(100, 0, Gate::kRight), {1, 2, 3, 4}, 4), (std::vector<float>{3, 6}));
  EXPECT_EQ(swiglu(oai(100, 0, Gate::kInterleaved), {1, 2, 3, 4}, 4),
            (std::vector<float>{1.5, 7.5}));
}

TEST(Swiglu, Silu) {
  // sigmoid(1) = 0.7310585786; exp(-100) is lost beside 1, exp(100) makes the quotient 0.
  const std::vector<float> y = swiglu({}, {1, 2, 100, 3, -100, 5}, 2);
  EXPECT_NEAR(y[0], 2 * 0.7310585786, 3e-7);
  EXPECT_EQ(y[1], 300.0f);
  EXPECT_EQ(y[2], 0.0f);
}

TEST(Swiglu, GeluTanh) {
  // gelu_tanh(1) = 0.8411919906.
  const std::vector<float> y =
      swiglu({.activation = GatedActivation::kGeluTanh}, {1, 2, 10, 3, -10, 5}, 2);
  EXPECT_NEAR(y[0], 2 * 0.8411919906, 3e-7);
  EXPECT_EQ(y[1], 30.0f);
  EXPECT_EQ(y[2], 0.0f);
}

TEST(Swiglu, OaiClampsGateAboveAndUpBothWays) {
  EXPECT_EQ(swiglu(oai(2), {3, 5, -3, -5, 2, -2}, 2), (std::vector<float>{3, 1.5, -1}));
  // The defaults, limit 7 and alpha 1.702: 7 * sigmoid(11.914) * 8, sigmoid(11.914) = 1 - 6.696e-6.
  const SwigluParams defaults{.activation = GatedActivation::kSwigluOai};
  EXPECT_NEAR(swiglu(defaults, {100, 100}, 2)[0], 55.999625, 1e-5);
}

TEST(Swiglu, NonFiniteValuesPassThroughAndStayInTheirRow) {
  for (const SwigluParams& params :
       {SwigluParams{}, oai(7, 1.702f), SwigluParams{.activation = GatedActivation::kGeluTanh}}) {
    const std::vector<float> clean = swiglu(params, {1, 2, 1, 2, 3, 4}, 2);
    for (const std::vector<float>& bad : {std::vector<float>{kNan, 2}, {1, kNan}}) {
      const std::vector<float> y = swiglu(params, {1, 2, bad[0], bad[1], 3, 4}, 2);
      EXPECT_EQ(y[0], clean[0]);
      EXPECT_TRUE(std::isnan(y[1]));
      EXPECT_EQ(y[2], clean[2]);
    }
  }
  EXPECT_EQ(swiglu({}, {kInf, 2}, 2)[0], kInf);
  EXPECT_TRUE(std::isnan(swiglu({}, {-kInf, 2}, 2)[0]));
  EXPECT_EQ(swiglu(oai(2), {kInf, kInf}, 2)[0], 3.0f);
}

TEST(Swiglu, ComputesInF32AndRoundsOnce) {
  SwigluArgs args;
  args.swiglu = oai(1e30f);
  // (1 + 2^-7) / 2 * (2^-7 + 1) = (1 + 2^-6 + 2^-14) / 2; bf16 keeps 7 bits of it.
  const bf16 x[] = {{0x3F81}, {0x3C00}};
  bf16 y[] = {{0}};
  args.x = {x, {1, 2}};
  args.y = {y, {1, 1}};
  ASSERT_TRUE(ref::swiglu(args).ok());
  EXPECT_EQ(y[0].bits, 0x3F02);

  // 60000 / 2 * (2 + 1) = 90000 is beyond f16; 1 / 2 * (1 + 1) is not.
  const f16 x_f16[] = {{0x7B53}, {0x4000}, {0x3C00}, {0x3C00}};
  f16 y_f16[] = {{0}, {0}};
  args.x = {x_f16, {2, 2}};
  args.y = {y_f16, {2, 1}};
  ASSERT_TRUE(ref::swiglu(args).ok());
  EXPECT_EQ(y_f16[0].bits, 0x7C00);
  EXPECT_EQ(y_f16[1].bits, 0x3C00);
}

TEST(Swiglu, RowsMayBeStrided) {
  const std::vector<float> x = {1, 2, 3, 4, 1000, 5, 6, 7, 8};
  std::vector<float> y(5, 55.0f);
  SwigluArgs args;
  args.x = {x.data(), {2, 4}, 5};
  args.swiglu = oai(100);
  args.y = {y.data(), {2, 2}, 3};
  ASSERT_TRUE(ref::swiglu(args).ok());
  EXPECT_EQ(y, (std::vector<float>{2, 5, 55, 20, 27}));
}

TEST(Swiglu, ZeroSizes) {
  SwigluArgs args;
  args.x = {static_cast<const float*>(nullptr), {0, 6}};
  args.y = {static_cast<float*>(nullptr), {0, 3}};
  EXPECT_TRUE(ref::swiglu(args).ok());
  args.x = {static_cast<const float*>(nullptr), {4, 0}};
  args.y = {static_cast<float*>(nullptr), {4, 0}};
  EXPECT_TRUE(ref::swiglu(args).ok());
}

class SwigluErrors : public testing::Test {
 protected:
  SwigluErrors() {
    args_.x = {x_, {3, 4}};
    args_.y = {y_, {3, 2}};
  }
  float x_[12] = {};
  float y_[6] = {};
  SwigluArgs args_;
};

TEST_F(SwigluErrors, EveryViewIsChecked) {
  test::sweep_contract<SwigluArgs>(args_, {{"x", &SwigluArgs::x}}, {{"y", &SwigluArgs::y}},
                                   [](const SwigluArgs& args) { return ref::swiglu(args); });
}

TEST_F(SwigluErrors, OddWidth) {
  args_.x = {x_, {3, 3}};
  args_.y = {y_, {3, 1}};
  expect_refused(ref::swiglu(args_), "swiglu: 2I = 3 (from x) is odd, but holds gate and up");
}

TEST_F(SwigluErrors, OutputHasTheInputsDtype) {
  bf16 y[6] = {};
  args_.y = {y, {3, 2}};
  expect_refused(ref::swiglu(args_), "swiglu: y has dtype bf16, which is not legal here");
}

TEST_F(SwigluErrors, ALimitIsNotNegative) {
  args_.swiglu.limit = -1;
  EXPECT_TRUE(ref::swiglu(args_).ok()) << "silu has no limit";
  args_.swiglu.activation = GatedActivation::kSwigluOai;
  expect_refused(ref::swiglu(args_), "swiglu: limit = -1 is not a number from 0 on");
  args_.swiglu.limit = kNan;
  expect_refused(ref::swiglu(args_), "swiglu: limit = nan is not a number from 0 on");
  args_.swiglu.limit = kInf;
  EXPECT_TRUE(ref::swiglu(args_).ok());
}

}  // namespace
}  // namespace moeops
