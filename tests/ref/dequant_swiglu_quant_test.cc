// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"

namespace moeops {
namespace {

using test::expect_refused;

// One to a few rows of I = 2 and two experts. With alpha 0 swiglu is g / 2 * (u + 1), exact: the
// row {2, 4, 126, 15} makes h = {127, 32}.
class DequantSwigluQuant : public testing::Test {
 protected:
  void run(std::vector<int64_t> group_list) {
    group_list_ = std::move(group_list);
    const int64_t M = static_cast<int64_t>(x_.size()) / 4;
    x_scale_.resize(static_cast<size_t>(M), 1.0f);
    q_.assign(static_cast<size_t>(2 * M), 55);
    scale_.assign(static_cast<size_t>(M), 55.0f);
    args_.x = {x_.data(), {M, 4}};
    args_.weight_scale = {weight_scale_.data(), {2, 4}};
    args_.x_scale = {x_scale_.data(), {M}};
    args_.group_list = {group_list_.data(), {2}};
    args_.swiglu = {GatedActivation::kSwigluOai, Gate::kLeft,
                    std::numeric_limits<float>::infinity(), 0.0f};
    args_.q = {q_.data(), {M, 2}};
    args_.scale = {scale_.data(), {M}};
    status_ = ref::dequant_swiglu_quant(args_);
  }
  void expect(const std::vector<int8_t>& q, const std::vector<float>& scale) {
    EXPECT_TRUE(status_.ok()) << status_.message();
    EXPECT_EQ(q_, q);
    EXPECT_EQ(scale_, scale);
  }

  std::vector<int32_t> x_ = {2, 4, 126, 15};
  std::vector<float> weight_scale_ = {1, 1, 1, 1, 2, 2, 1, 1};
  std::vector<float> x_scale_;
  std::vector<int64_t> group_list_;
  std::vector<int8_t> q_;
  std::vector<float> scale_;
  DequantSwigluQuantArgs args_;
  Status status_;
};

TEST_F(DequantSwigluQuant, EachExpertHasItsScales) {
  x_ = {2, 4, 126, 15, 1, 2, 126, 15};
  run({1, 1});
  expect({127, 32, 127, 32}, {1, 1});
}

TEST_F(DequantSwigluQuant, XScaleMultipliesItsRow) {
  x_ = {2, 4, 126, 15, 1, 2, 63, 30};
  x_scale_ = {1, 2};
  run({2, 0});
  // 2, 4, 126, 60 -> h = {127, 122}
  expect({127, 32, 127, 122}, {1, 1});
}

TEST_F(DequantSwigluQuant, IntegerBiasComesBeforeTheScales) {
  x_ = {0, 3, 132, 10};
  const std::vector<int32_t> bias = {9, 9, 9, 9, 1, -1, -6, 5};
  args_.bias = {bias.data(), {2, 4}};
  run({0, 1});
  // (0 + 1) * 2, (3 - 1) * 2, 126, 15
  expect({127, 32}, {1});
}

TEST_F(DequantSwigluQuant, IntegerBiasWraps) {
  weight_scale_ = {0x1p-31f, 1, 1, 1, 1, 1, 1, 1};
  x_ = {INT32_MAX, 0, 253, 0};
  const std::vector<int32_t> bias = {1, 0, 0, 0, 0, 0, 0, 0};
  args_.bias = {bias.data(), {2, 4}};
  run({1, 0});
  // -2^31 * 2^-31 / 2 * 254
  expect({-127, 0}, {1});
}

TEST_F(DequantSwigluQuant, FloatBiasComesAfterTheScales) {
  x_ = {1, 2, 3, 4};
  const std::vector<float> bias = {9, 9, 9, 9, 0, 0, 123, 11};
  args_.bias = {bias.data(), {2, 4}};
  run({0, 1});
  expect({127, 32}, {1});
}

TEST_F(DequantSwigluQuant, ScalesMultiplyFromLeftToRight) {
  weight_scale_ = {1e30f, 1, 1, 1, 1, 1, 1, 1};
  x_ = {1000000000, 4, 126, 15, 2, 4, 126, 15};
  x_scale_ = {1e-30f, 1};
  run({1, 1});
  // 1e9 * 1e30 overflows before x_scale can bring it back; the row beside it has nothing of that.
  EXPECT_TRUE(status_.ok());
  EXPECT_TRUE(std::isnan(scale_[0]));
  EXPECT_EQ(scale_[1], 1.0f);
  EXPECT_EQ(q_, (std::vector<int8_t>{0, 0, 127, 32}));
}

TEST_F(DequantSwigluQuant, QuantScaleMultipliesTheResult) {
  const std::vector<float> quant_scale = {9, 9, 1, 2};
  weight_scale_.assign(8, 1.0f);
  args_.quant_scale = {quant_scale.data(), {2, 2}};
  run({0, 1});
  expect({127, 64}, {1});
}

TEST_F(DequantSwigluQuant, RowsPastTheTotalAreZero) {
  x_ = {2, 4, 126, 15, 1, 1, 1, 1, 1, 1, 1, 1};
  run({1, 0});
  expect({127, 32, 0, 0, 0, 0}, {1, 0, 0});
}

TEST_F(DequantSwigluQuant, NoRows) {
  x_.clear();
  run({0, 0});
  expect({}, {});
}

TEST_F(DequantSwigluQuant, NoExperts) {
  int8_t q[2] = {55, 55};
  float scale = 55;
  const float x_scale = 1;
  args_.x = {x_.data(), {1, 4}};
  args_.weight_scale = {static_cast<const float*>(nullptr), {0, 4}};
  args_.x_scale = {&x_scale, {1}};
  args_.group_list = {static_cast<const int64_t*>(nullptr), {0}};
  args_.q = {q, {1, 2}};
  args_.scale = {&scale, {1}};
  ASSERT_TRUE(ref::dequant_swiglu_quant(args_).ok());
  EXPECT_EQ(q[1], 0);
  EXPECT_EQ(scale, 0.0f);
}

TEST_F(DequantSwigluQuant, RowsMayBeStrided) {
  run({1, 0});
  const std::vector<int32_t> x = {2, 4, 126, 15, 1000, 1, 2, 126, 15};
  const std::vector<float> x_scale = {1, 1};
  const std::vector<int64_t> group_list = {1, 1};
  std::vector<int8_t> q(5, 55);
  std::vector<float> scale(2);
  args_.x = {x.data(), {2, 4}, 5};
  args_.x_scale = {x_scale.data(), {2}};
  args_.group_list = {group_list.data(), {2}};
  args_.q = {q.data(), {2, 2}, 3};
  args_.scale = {scale.data(), {2}};
  ASSERT_TRUE(ref::dequant_swiglu_quant(args_).ok());
  EXPECT_EQ(q, (std::vector<int8_t>{127, 32, 55, 127, 32}));
}

TEST_F(DequantSwigluQuant, EveryViewIsChecked) {
  x_ = {2, 4, 126, 15, 1, 2, 126, 15, 1, 2, 3, 4};
  const std::vector<float> bias(8), quant_scale(4);
  args_.bias = {bias.data(), {2, 4}};
  args_.quant_scale = {quant_scale.data(), {2, 2}};
  run({1, 1});
  using Args = DequantSwigluQuantArgs;
  test::sweep_contract<Args>(args_,
                             {{"x", &Args::x},
                              {"weight_scale", &Args::weight_scale},
                              {"x_scale", &Args::x_scale},
                              {"group_list", &Args::group_list},
                              {"bias", &Args::bias, false},
                              {"quant_scale", &Args::quant_scale, false}},
                             {{"q", &Args::q}, {"scale", &Args::scale}},
                             [](const Args& args) { return ref::dequant_swiglu_quant(args); });
}

TEST_F(DequantSwigluQuant, Errors) {
  run({-1, 1});
  expect_refused(status_, "dequant_swiglu_quant: group_list[0] = -1 is negative");
  run({1, 1});
  expect_refused(status_,
                 "dequant_swiglu_quant: group_list makes more rows than there are: 1 + 1 at entry "
                 "1, M = 1");
  run({1, 0});
  args_.swiglu.limit = -1;
  expect_refused(ref::dequant_swiglu_quant(args_),
                 "dequant_swiglu_quant: limit = -1 is not a number from 0 on");
  args_.x = {x_.data(), {1, 3}};
  expect_refused(ref::dequant_swiglu_quant(args_),
                 "dequant_swiglu_quant: 2I = 3 (from x) is odd, but holds gate and up");
}

}  // namespace
}  // namespace moeops
