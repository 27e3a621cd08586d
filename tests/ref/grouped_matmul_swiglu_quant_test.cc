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

// K = 2, I = 2, two experts. Expert 0 makes g = {x0, 2 x0}, u = {x1, -x1}, expert 1 twice that.
// With alpha 0 swiglu is g / 2 * (u + 1), exact: x = {2, 126} gives h = {127, -250} in expert 0.
struct Args : GroupedMatmulSwigluQuantArgs, ref::Weights {};

Status call(const Args& args) { return ref::grouped_matmul_swiglu_quant(args, args); }

class GroupedMatmulSwigluQuant : public testing::Test {
 protected:
  GroupedMatmulSwigluQuant() {
    args_.w = {w_, {2, 4, 2}};
    args_.w_scale = {w_scale_, {2, 4}};
    args_.x = {x_, {3, 2}};
    args_.group_list = {group_list_, {2}};
    args_.swiglu = {GatedActivation::kSwigluOai, Gate::kLeft, 1e30f, 0.0f};
    args_.q = {q_.data(), {3, 2}};
    args_.scale = {scale_.data(), {3}};
  }
  void expect(const std::vector<int8_t>& q, const std::vector<float>& scale) {
    const Status status = call(args_);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(q_, q);
    EXPECT_EQ(scale_, scale);
  }

  const int8_t w_[16] = {1, 0, 2, 0, 0, 1, 0, -1, 2, 0, 4, 0, 0, 2, 0, -2};
  float w_scale_[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  const int8_t x_[6] = {2, 126, 127, 1, 1, 63};
  int64_t group_list_[2] = {2, 1};
  std::vector<int8_t> q_ = std::vector<int8_t>(6, 55);
  std::vector<float> scale_ = std::vector<float>(3, 55.0f);
  Args args_;
};

TEST_F(GroupedMatmulSwigluQuant, ByHand) {
  // h = {127, -250}, {127, 0}, and for expert 1, whose g = {2, 4}, u = {126, -126}: {127, -250}.
  // 127 * (127 / 250) = 64.5 and a little.
  expect({65, -127, 127, 0, 65, -127}, {250.0f / 127, 1, 250.0f / 127});
}

TEST_F(GroupedMatmulSwigluQuant, ScalesOfRowsAndChannels) {
  const float x_scale[3] = {0.5f, 1, 1};
  w_scale_[0] = 2;  // g0 = 2 * 2 / 2 = 2
  w_scale_[1] = 0;  // g1 = 0
  w_scale_[2] = 2;  // u0 = 126 * 2 / 2 = 126
  args_.x_scale = {x_scale, {3}};
  group_list_[0] = 1;
  group_list_[1] = 0;
  expect({127, 0, 0, 0, 0, 0}, {1, 0, 0});
}

TEST_F(GroupedMatmulSwigluQuant, IntegerBiasBeforeAndFloatBiasAfterTheScales) {
  for (float& scale : w_scale_) scale = 2;
  group_list_[0] = 1;
  group_list_[1] = 0;
  // g = {(2 - 1) * 2, (4 - 4) * 2}, u0 = (126 - 63) * 2
  const int32_t bias_i32[8] = {-1, -4, -63, 0, 9, 9, 9, 9};
  args_.bias = {bias_i32, {2, 4}};
  expect({127, 0, 0, 0, 0, 0}, {1, 0, 0});
  // g = {2 * 2 - 2, 4 * 2 - 8}, u0 = 126 * 2 - 126
  const float bias_f32[8] = {-2, -8, -126, 0, 9, 9, 9, 9};
  args_.bias = {bias_f32, {2, 4}};
  expect({127, 0, 0, 0, 0, 0}, {1, 0, 0});
}

TEST_F(GroupedMatmulSwigluQuant, TransposedWeights) {
  const int8_t w[16] = {1, 2, 0, 0, 0, 0, 1, -1, 2, 4, 0, 0, 0, 0, 2, -2};
  args_.w = {w, {2, 2, 4}};
  args_.transpose_w = true;
  expect({65, -127, 127, 0, 65, -127}, {250.0f / 127, 1, 250.0f / 127});
}

TEST_F(GroupedMatmulSwigluQuant, EveryListType) {
  const int64_t cumsum[2] = {2, 3};
  args_.group_list = {cumsum, {2}};
  args_.list_type = ListType::kCumsum;
  expect({65, -127, 127, 0, 65, -127}, {250.0f / 127, 1, 250.0f / 127});

  // Expert 1 sees 2, 126: g = {4, 8}, u = {252, -252}, h = {506, -1004}; 506 * 127 / 1004 = 64.006.
  const int64_t sparse[6] = {1, 1, 0, 1, 1, 0};
  args_.group_list = {sparse, {3, 2}};
  args_.list_type = ListType::kSparse;
  expect({64, -127, 127, 0, 0, 0}, {1004.0f / 127, 1, 0});
}

TEST_F(GroupedMatmulSwigluQuant, ANonFiniteScaleIsItsRowsAlone) {
  const float x_scale[3] = {1, std::numeric_limits<float>::quiet_NaN(), 1};
  args_.x_scale = {x_scale, {3}};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(q_, (std::vector<int8_t>{65, -127, 0, 0, 65, -127}));
  EXPECT_EQ(scale_[0], 250.0f / 127);
  EXPECT_TRUE(std::isnan(scale_[1]));
  EXPECT_EQ(scale_[2], 250.0f / 127);
}

TEST_F(GroupedMatmulSwigluQuant, RowsMayBeStrided) {
  const int8_t x[8] = {2, 126, 99, 127, 1, 99, 1, 63};
  std::vector<int8_t> q(10, 55);
  args_.x = {x, {3, 2}, 3};
  args_.q = {q.data(), {3, 2}, 4};
  ASSERT_TRUE(call(args_).ok());
  EXPECT_EQ(q, (std::vector<int8_t>{65, -127, 55, 55, 127, 0, 55, 55, 65, -127}));
}

TEST_F(GroupedMatmulSwigluQuant, ZeroSizes) {
  Args args = args_;  // no rows
  group_list_[0] = group_list_[1] = 0;
  args.x = {x_, {0, 2}};
  args.q = {q_.data(), {0, 2}};
  args.scale = {scale_.data(), {0}};
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(scale_[0], 55.0f);

  args = args_;  // nothing to sum
  group_list_[0] = 3;
  args.x = {x_, {3, 0}};
  args.w = {w_, {2, 4, 0}};
  EXPECT_TRUE(call(args).ok());
  EXPECT_EQ(scale_, (std::vector<float>{0, 0, 0}));
  EXPECT_EQ(q_, std::vector<int8_t>(6, 0));
}

TEST_F(GroupedMatmulSwigluQuant, EveryViewIsChecked) {
  const float bias[8] = {}, x_scale[3] = {};
  args_.bias = {bias, {2, 4}};
  args_.x_scale = {x_scale, {3}};
  test::sweep_contract<Args>(args_,
                             {{"x", &Args::x},
                              {"w", &Args::w},
                              {"w_scale", &Args::w_scale},
                              {"group_list", &Args::group_list},
                              {"bias", &Args::bias, false},
                              {"x_scale", &Args::x_scale, false}},
                             {{"q", &Args::q}, {"scale", &Args::scale}}, call);
}

TEST_F(GroupedMatmulSwigluQuant, GroupListErrors) {
  group_list_[1] = -1;
  expect_refused(call(args_), "grouped_matmul_swiglu_quant: group_list[1] = -1 is negative");
  group_list_[1] = 2;
  expect_refused(call(args_),
                 "grouped_matmul_swiglu_quant: group_list makes more rows than there are: 2 + 2 at "
                 "entry 1, M = 3");
  args_.list_type = ListType::kCumsum;
  group_list_[1] = 1;
  expect_refused(call(args_),
                 "grouped_matmul_swiglu_quant: group_list[1] = 1 is less than the 2 before it");
  const int64_t sparse[2] = {2, 1};
  args_.group_list = {sparse, {1, 2}};
  args_.list_type = ListType::kSparse;
  expect_refused(call(args_), "grouped_matmul_swiglu_quant: group_list[0,0] = 2 is not in [0, 2)");
}

TEST_F(GroupedMatmulSwigluQuant, WeightErrors) {
  Args args = args_;
  args.w = {w_, {2, 3, 2}};
  expect_refused(call(args),
                 "grouped_matmul_swiglu_quant: 2I = 3 (from w) is odd, but holds gate and up");
  args = args_;
  args.swiglu.limit = -1;
  expect_refused(call(args), "grouped_matmul_swiglu_quant: limit = -1 is not a number from 0 on");
  args = args_;
  args.x = {x_, {0, 65537}};
  args.w = {w_, {0, 4, 65537}};
  expect_refused(call(args),
                 "grouped_matmul_swiglu_quant: K = 65537 is more than 65536, beyond which s32 "
                 "overflows");
}

}  // namespace
}  // namespace moeops
