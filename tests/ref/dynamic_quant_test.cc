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

struct Result {
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<float> offset;
};

// Dense f32 rows of H.
Result quantise(const std::vector<float>& x, int64_t H, bool asymmetric = false,
                const ConstTensorView& smooth = {}, const ConstTensorView& group_list = {}) {
  const int64_t M = static_cast<int64_t>(x.size()) / H;
  const auto rows = static_cast<size_t>(M);
  Result result{std::vector<int8_t>(x.size(), 55), std::vector<float>(rows, 55.0f),
                std::vector<float>(asymmetric ? rows : 0, 55.0f)};
  DynamicQuantArgs args;
  args.x = {x.data(), {M, H}};
  args.smooth = smooth;
  args.group_list = group_list;
  args.asymmetric = asymmetric;
  args.q = {result.q.data(), {M, H}};
  args.scale = {result.scale.data(), {M}};
  if (asymmetric) args.offset = {result.offset.data(), {M}};
  const Status status = ref::dynamic_quant(args);
  EXPECT_TRUE(status.ok()) << status.message();
  return result;
}

TEST(DynamicQuant, RoundsHalfToEvenAgainstTheRowsLargest) {
  const Result r = quantise({127, -63.5, 0.5, 1.5,  //
                             -254, 127, 1, 3},
                            4);
  EXPECT_EQ(r.q, (std::vector<int8_t>{127, -64, 0, 2, -127, 64, 0, 2}));
  EXPECT_EQ(r.scale, (std::vector<float>{1, 2}));
}

TEST(DynamicQuant, TinyRowsAreZero) {
  const Result r = quantise({0, -0.0f, 9e-37f, -9e-37f, 1.2e-36f, -1.2e-36f}, 2);
  EXPECT_EQ(r.q, (std::vector<int8_t>{0, 0, 0, 0, 127, -127}));
  EXPECT_EQ(r.scale, (std::vector<float>{0, 0, 1.2e-36f / 127}));
}

TEST(DynamicQuant, AsymmetricUsesTheWholeRange) {
  // (255 - 0) / 255 = 1, 127 - 255 / 1 = -128.
  const Result r = quantise({255, 0, 128, 0.5}, 4, true);
  EXPECT_EQ(r.q, (std::vector<int8_t>{127, -128, 0, -128}));
  EXPECT_EQ(r.scale, (std::vector<float>{1}));
  EXPECT_EQ(r.offset, (std::vector<float>{-128}));
}

TEST(DynamicQuant, AsymmetricKeepsItsSmallestScale) {
  const Result r = quantise({0, 0}, 2, true);
  EXPECT_EQ(r.q, (std::vector<int8_t>{127, 127}));
  EXPECT_EQ(r.scale, (std::vector<float>{1e-12f}));
  EXPECT_EQ(r.offset, (std::vector<float>{127}));
}

TEST(DynamicQuant, SmoothMultipliesTheColumns) {
  const std::vector<float> smooth = {127, 10};
  const Result r = quantise({1, 2}, 2, false, {smooth.data(), {2}});
  EXPECT_EQ(r.q, (std::vector<int8_t>{127, 20}));
  EXPECT_EQ(r.scale, (std::vector<float>{1}));
}

TEST(DynamicQuant, EachGroupHasItsSmooth) {
  const std::vector<float> smooth = {127, 10, 1000, 1000, 30, 127};
  const std::vector<int64_t> group_list = {1, 1, 3};
  const Result r =
      quantise({1, 2, 1, 1, 2, 1}, 2, false, {smooth.data(), {3, 2}}, {group_list.data(), {3}});
  EXPECT_EQ(r.q, (std::vector<int8_t>{127, 20, 30, 127, 60, 127}));
  EXPECT_EQ(r.scale, (std::vector<float>{1, 1, 1}));
}

TEST(DynamicQuant, ReadsBf16AndF16) {
  const bf16 x_bf16[] = {{0x3F80}, {0xBF00}};  // 1, -0.5
  const f16 x_f16[] = {{0x3C00}, {0xB800}};
  for (const ConstTensorView& x :
       {ConstTensorView(x_bf16, {1, 2}), ConstTensorView(x_f16, {1, 2})}) {
    std::vector<int8_t> q(2);
    float scale = 0;
    DynamicQuantArgs args;
    args.x = x;
    args.q = {q.data(), {1, 2}};
    args.scale = {&scale, {1}};
    ASSERT_TRUE(ref::dynamic_quant(args).ok());
    EXPECT_EQ(q, (std::vector<int8_t>{127, -64})) << to_string(x.dtype);
    EXPECT_EQ(scale, 1.0f / 127.0f) << to_string(x.dtype);
  }
}

TEST(DynamicQuant, ANonFiniteValueIsItsRowsAlone) {
  for (const bool asymmetric : {false, true}) {
    const Result clean = quantise({1, 2, 3, 4, 5, 6}, 2, asymmetric);
    for (const float bad : {kNan, kInf, -kInf}) {
      const Result r = quantise({1, 2, 3, bad, 5, 6}, 2, asymmetric);
      EXPECT_EQ(r.q, (std::vector<int8_t>{clean.q[0], clean.q[1], 0, 0, clean.q[4], clean.q[5]}));
      EXPECT_EQ(r.scale[0], clean.scale[0]);
      EXPECT_TRUE(std::isnan(r.scale[1]));
      EXPECT_EQ(r.scale[2], clean.scale[2]);
      EXPECT_EQ(asymmetric, !r.offset.empty() && std::isnan(r.offset[1]));
    }
  }
  const std::vector<float> smooth = {1e30f, 1};  // makes an infinity of finite values
  const Result r = quantise({1e30f, 1, 1, 1}, 2, false, {smooth.data(), {2}});
  EXPECT_TRUE(std::isnan(r.scale[0]));
  EXPECT_EQ(r.q[0], 0);
  EXPECT_EQ(r.q[2], 127);
}

TEST(DynamicQuant, RowsMayBeStrided) {
  const std::vector<float> x = {127, 1, 1000, 1, 127};
  std::vector<int8_t> q(6, 55);
  std::vector<float> scale(2);
  DynamicQuantArgs args;
  args.x = {x.data(), {2, 2}, 3};
  args.q = {q.data(), {2, 2}, 4};
  args.scale = {scale.data(), {2}};
  ASSERT_TRUE(ref::dynamic_quant(args).ok());
  EXPECT_EQ(q, (std::vector<int8_t>{127, 1, 55, 55, 1, 127}));
  EXPECT_EQ(scale, (std::vector<float>{1, 1}));
}

TEST(DynamicQuant, ZeroSizes) {
  float scale = 55;
  int64_t group_list = 0;
  DynamicQuantArgs args;
  args.x = {static_cast<const float*>(nullptr), {0, 3}};
  args.q = {static_cast<int8_t*>(nullptr), {0, 3}};
  args.scale = {static_cast<float*>(nullptr), {0}};
  EXPECT_TRUE(ref::dynamic_quant(args).ok());
  args.smooth = {static_cast<const float*>(nullptr), {0, 3}};
  args.group_list = {&group_list, {0}};
  EXPECT_TRUE(ref::dynamic_quant(args).ok());

  args = {};
  args.x = {static_cast<const float*>(nullptr), {1, 0}};
  args.q = {static_cast<int8_t*>(nullptr), {1, 0}};
  args.scale = {&scale, {1}};
  EXPECT_TRUE(ref::dynamic_quant(args).ok());
  EXPECT_EQ(scale, 0.0f);
}

class DynamicQuantErrors : public testing::Test {
 protected:
  DynamicQuantErrors() {
    args_.x = {x_, {3, 2}};
    args_.smooth = {smooth_, {2, 2}};
    args_.group_list = {group_list_, {2}};
    args_.q = {q_, {3, 2}};
    args_.scale = {scale_, {3}};
  }
  Status call(int64_t first, int64_t second) {
    group_list_[0] = first;
    group_list_[1] = second;
    return ref::dynamic_quant(args_);
  }
  float x_[6] = {1, 2, 3, 4, 5, 6};
  float smooth_[4] = {1, 1, 1, 1};
  int64_t group_list_[2] = {1, 3};
  int8_t q_[6] = {};
  float scale_[3] = {};
  float offset_[3] = {};
  DynamicQuantArgs args_;
};

TEST_F(DynamicQuantErrors, EveryViewIsChecked) {
  args_.asymmetric = true;
  args_.offset = {offset_, {3}};
  test::sweep_contract<DynamicQuantArgs>(
      args_,
      {{"x", &DynamicQuantArgs::x},
       {"smooth", &DynamicQuantArgs::smooth},
       {"group_list", &DynamicQuantArgs::group_list}},
      {{"q", &DynamicQuantArgs::q},
       {"scale", &DynamicQuantArgs::scale},
       {"offset", &DynamicQuantArgs::offset}},
      [](const DynamicQuantArgs& args) { return ref::dynamic_quant(args); });
}

TEST_F(DynamicQuantErrors, GroupListCoversTheRowsExactly) {
  EXPECT_TRUE(call(1, 3).ok());
  expect_refused(call(2, 1), "dynamic_quant: group_list[1] = 1 is less than the 2 before it");
  expect_refused(call(-1, 3), "dynamic_quant: group_list[0] = -1 is less than the 0 before it");
  expect_refused(
      call(1, 4),
      "dynamic_quant: group_list makes more rows than there are: 1 + 3 at entry 1, M = 3");
  expect_refused(call(1, 2), "dynamic_quant: group_list ends with 2, expected M = 3");
}

TEST_F(DynamicQuantErrors, ViewsWithoutAUse) {
  args_.smooth = {};
  expect_refused(ref::dynamic_quant(args_), "dynamic_quant: smooth is missing");
  args_.group_list = {};
  EXPECT_TRUE(ref::dynamic_quant(args_).ok());
  args_.offset = {offset_, {3}};
  expect_refused(ref::dynamic_quant(args_),
                 "dynamic_quant: offset is given, but asymmetric is false");
}

}  // namespace
}  // namespace moeops
