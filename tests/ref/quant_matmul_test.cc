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

struct Args : QuantMatmulArgs, ref::Weights {};

Status call(const Args& args) { return ref::quant_matmul(args, args); }

// x w^T = {{17, -9}, {9, -53}}.
class QuantMatmul : public testing::Test {
 protected:
  QuantMatmul() {
    args_.x = {x_, {2, 2}};
    args_.w = {w_, {2, 2}};
    args_.w_scale = {w_scale_, {2}};
    args_.x_scale = {x_scale_, {2}};
  }
  template <class T>
  std::vector<T> run() {
    std::vector<T> y(4);
    args_.y = {y.data(), {2, 2}};
    const Status status = call(args_);
    EXPECT_TRUE(status.ok()) << status.message();
    return y;
  }

  const int8_t x_[4] = {1, 2, -3, 4};
  const int8_t w_[4] = {5, 6, 7, -8};
  float w_scale_[2] = {0.5f, 2};
  float x_scale_[2] = {2, 10};
  Args args_;
};

TEST_F(QuantMatmul, ScalesOfChannelsAndTokens) {
  EXPECT_EQ(run<float>(), (std::vector<float>{17, -36, 45, -1060}));
  args_.x_scale = {};
  EXPECT_EQ(run<float>(), (std::vector<float>{8.5, -18, 4.5, -106}));
}

TEST_F(QuantMatmul, OneScaleForAllChannels) {
  args_.x_scale = {};
  args_.w_scale = {w_scale_, {1}};
  EXPECT_EQ(run<float>(), (std::vector<float>{8.5, -4.5, 4.5, -26.5}));
}

TEST_F(QuantMatmul, IntegerBiasBeforeAndFloatBiasAfterTheScales) {
  const int32_t bias_i32[2] = {1, -1};
  args_.bias = {bias_i32, {2}};
  EXPECT_EQ(run<float>(), (std::vector<float>{18, -40, 50, -1080}));
  const float bias_f32[2] = {1, -1};
  args_.bias = {bias_f32, {2}};
  EXPECT_EQ(run<float>(), (std::vector<float>{18, -37, 46, -1061}));
}

TEST_F(QuantMatmul, RoundsToBf16) {
  args_.x_scale = {};
  w_scale_[0] = 1;
  w_scale_[1] = 5;
  const std::vector<bf16> y = run<bf16>();
  EXPECT_EQ(y[0].bits, 0x4188);  // 17
  EXPECT_EQ(y[3].bits, 0xC384);  // -265 lies halfway between -264 and -266
}

TEST_F(QuantMatmul, RequantisesToS8) {
  args_.x_scale = {};
  args_.w_scale = {w_scale_, {1}};
  EXPECT_EQ(run<int8_t>(), (std::vector<int8_t>{8, -4, 4, -26}));
  const float offset = 0.5f;
  args_.offset = {&offset, {1}};
  EXPECT_EQ(run<int8_t>(), (std::vector<int8_t>{9, -4, 5, -26}));
  w_scale_[0] = 100;
  EXPECT_EQ(run<int8_t>(), (std::vector<int8_t>{127, -128, 127, -128}));
}

TEST_F(QuantMatmul, IntegersAreExactAndWrapOnlyInTheBias) {
  args_.w_scale = args_.x_scale = {};
  EXPECT_EQ(run<int32_t>(), (std::vector<int32_t>{17, -9, 9, -53}));
  const int32_t bias[2] = {INT32_MAX, INT32_MIN};
  args_.bias = {bias, {2}};
  EXPECT_EQ(run<int32_t>(),
            (std::vector<int32_t>{INT32_MIN + 16, INT32_MAX - 8, INT32_MIN + 8, INT32_MAX - 52}));

  const std::vector<int8_t> lowest(65536, -128);  // 2^16 * 2^14 = 2^30
  int32_t y = 0;
  args_.bias = {};
  args_.x = {lowest.data(), {1, 65536}};
  args_.w = args_.x;
  args_.y = {&y, {1, 1}};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(y, 1 << 30);
}

TEST_F(QuantMatmul, TransposedWeights) {
  const int8_t w[6] = {5, 7, 99, 6, -8, 99};
  args_.w = {w, {2, 2}, 3};
  args_.transpose_w = true;
  EXPECT_EQ(run<float>(), (std::vector<float>{17, -36, 45, -1060}));
}

TEST_F(QuantMatmul, RowsMayBeStrided) {
  const int8_t x[5] = {1, 2, 99, -3, 4};
  const int8_t w[6] = {5, 6, 99, 99, 7, -8};
  std::vector<float> y(5, 55.0f);
  args_.x = {x, {2, 2}, 3};
  args_.w = {w, {2, 2}, 4};
  args_.y = {y.data(), {2, 2}, 3};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(y, (std::vector<float>{17, -36, 55, 45, -1060}));
}

TEST_F(QuantMatmul, ANonFiniteScaleIsItsRowsAlone) {
  x_scale_[0] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> y = run<float>();
  EXPECT_TRUE(std::isnan(y[0]));
  EXPECT_TRUE(std::isnan(y[1]));
  EXPECT_EQ(y[2], 45.0f);
  EXPECT_EQ(y[3], -1060.0f);
}

TEST_F(QuantMatmul, ZeroSizes) {
  std::vector<float> y(4, 55.0f);
  Args args = args_;  // M = 0
  args.x = {x_, {0, 2}};
  args.x_scale = {x_scale_, {0}};
  args.y = {y.data(), {0, 2}};
  EXPECT_TRUE(call(args).ok());
  args = args_;  // N = 0
  args.w = {w_, {0, 2}};
  args.w_scale = {w_scale_, {1}};
  args.y = {y.data(), {2, 0}};
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(y, std::vector<float>(4, 55.0f));
  args = args_;  // K = 0
  const float bias[2] = {1, 2};
  args.x = {x_, {2, 0}};
  args.w = {w_, {2, 0}};
  args.bias = {bias, {2}};
  args.y = {y.data(), {2, 2}};
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(y, (std::vector<float>{1, 2, 1, 2}));
}

TEST_F(QuantMatmul, EveryViewIsChecked) {
  const int8_t x[6] = {}, w[9 * 2] = {};
  const float x_scale[3] = {}, w_scale[9] = {}, bias[9] = {}, offset = 0;
  int8_t y[27];
  args_.x = {x, {3, 2}};
  args_.w = {w, {9, 2}};
  args_.w_scale = {w_scale, {9}};
  args_.x_scale = {x_scale, {3}};
  args_.bias = {bias, {9}};
  args_.offset = {&offset, {1}};
  args_.y = {y, {3, 9}};
  test::sweep_contract<Args>(args_,
                             {{"x", &Args::x},
                              {"w", &Args::w},
                              {"w_scale", &Args::w_scale},
                              {"x_scale", &Args::x_scale, false},
                              {"bias", &Args::bias, false},
                              {"offset", &Args::offset, false}},
                             {{"y", &Args::y}}, call);
}

TEST_F(QuantMatmul, Errors) {
  float y[4];
  int32_t y_i32[4];
  const float value = 1;
  const float bias[2] = {};
  args_.y = {y, {2, 2}};
  Args args = args_;
  args.offset = {&value, {1}};
  expect_refused(call(args), "grouped_matmul: offset is given, but y is not s8");
  args = args_;
  args.w_scale = {};
  expect_refused(call(args), "grouped_matmul: w_scale is missing");
  args = args_;
  args.y = {y_i32, {2, 2}};
  expect_refused(call(args), "grouped_matmul: w_scale is given, but y is i32");
  args.w_scale = {};
  expect_refused(call(args), "grouped_matmul: x_scale is given, but y is i32");
  args.x_scale = {};
  args.bias = {bias, {2}};
  expect_refused(call(args), "grouped_matmul: bias is f32, but y is i32");
  args = args_;
  args.w_scale = {y, {1}};
  expect_refused(call(args), "quant_matmul: output y overlaps input w_scale");
  args = args_;
  args.x = {x_, {0, 65537}};
  args.w = {w_, {0, 65537}};
  expect_refused(call(args),
                 "quant_matmul: K = 65537 is more than 65536, beyond which s32 overflows");
}

}  // namespace
}  // namespace moeops
