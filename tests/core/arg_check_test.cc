// SPDX-License-Identifier: Apache-2.0
#include "ops/core/arg_check.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace moeops {
namespace {

class ArgCheckTest : public ::testing::Test {
 protected:
  std::vector<float> memory_ = std::vector<float>(64);
  ConstTensorView x_{memory_.data(), {2, 3}};
  TensorView y_{memory_.data() + 32, {2, 4}};
};

TEST_F(ArgCheckTest, AcceptsWhatAgrees) {
  ArgCheck check("op");
  Dim T{"T"}, H{"H"};
  check.input("x", x_, {DType::kBf16, DType::kF32}, {T, H});
  check.optional_input("absent", {}, {DType::kF32}, {T});
  check.output("y", y_, {DType::kF32}, {T, 4});
  EXPECT_TRUE(check.finish().ok());
  EXPECT_EQ(T.value, 2);
  EXPECT_EQ(H.value, 3);
}

TEST_F(ArgCheckTest, NamesTheSizeThatDisagreesAndWhereItCameFrom) {
  ArgCheck check("op");
  Dim T{"T"}, H{"H"};
  check.input("x", x_, {DType::kF32}, {T, H});
  check.output("y", y_, {DType::kF32}, {T, H});
  EXPECT_STREQ(check.finish().message(), "op: y.shape[1] = 4, expected H = 3 (from x)");
}

TEST_F(ArgCheckTest, KeepsTheFirstViolation) {
  ArgCheck check("op");
  Dim T{"T"};
  check.input("x", {}, {DType::kF32}, {T});
  check.input("z", x_, {DType::kI64}, {T, 3});
  check.require(false, "never seen");
  EXPECT_STREQ(check.finish().message(), "op: x is missing");
}

TEST_F(ArgCheckTest, AChoiceIsOneOfTheEnumerators) {
  enum class Colour { kRed, kGreen, kBlue };
  enum class Small : uint8_t { kOne, kOther };
  const auto message = [](auto value, auto last) {
    ArgCheck check("op");
    check.choice("colour", value, last);
    return std::string(check.finish().message());
  };
  for (int i = 0; i < 3; ++i) EXPECT_EQ(message(static_cast<Colour>(i), Colour::kBlue), "");
  for (const int i : {3, -1, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(message(static_cast<Colour>(i), Colour::kBlue),
              "op: colour = " + std::to_string(i) + " is not one of its 3 choices");
  }
  EXPECT_EQ(message(Small::kOther, Small::kOther), "");
  EXPECT_EQ(message(static_cast<Small>(255), Small::kOther),
            "op: colour = 255 is not one of its 2 choices");
}

TEST_F(ArgCheckTest, SeesTheSmallestOverlap) {
  const auto message = [&](int64_t first) {
    ArgCheck check("op");
    check.input("x", x_, {DType::kF32}, {2, 3});
    check.output("y", {memory_.data() + first, {2, 4}}, {DType::kF32}, {2, 4});
    return std::string(check.finish().message());
  };
  EXPECT_EQ(message(5), "op: output y overlaps input x");
  EXPECT_EQ(message(6), "");
}

TEST_F(ArgCheckTest, CountsAStridedViewFromFirstToLastElement) {
  ArgCheck check("op");
  // Rows 0 and 8 floats in: the second view lies between them, which is an overlap all the same.
  check.input("x", {memory_.data(), {2, 3}, 8}, {DType::kF32}, {2, 3});
  check.output("y", {memory_.data() + 4, {1, 2}}, {DType::kF32}, {1, 2});
  EXPECT_STREQ(check.finish().message(), "op: output y overlaps input x");
}

TEST_F(ArgCheckTest, OutputsMayNotOverlapEachOtherAndInputsMay) {
  ArgCheck check("op");
  check.input("a", x_, {DType::kF32}, {2, 3});
  check.input("b", x_, {DType::kF32}, {2, 3});
  check.output("y", y_, {DType::kF32}, {2, 4});
  check.output("z", y_, {DType::kF32}, {2, 4});
  EXPECT_STREQ(check.finish().message(), "op: output y overlaps output z");
}

TEST_F(ArgCheckTest, EmptyViewsNeedNoData) {
  ArgCheck check("op");
  check.input("x", {static_cast<const float*>(nullptr), {0, 3}}, {DType::kF32}, {0, 3});
  check.output("y", {static_cast<float*>(nullptr), {4, 0}}, {DType::kF32}, {4, 0});
  EXPECT_TRUE(check.finish().ok());
}

TEST_F(ArgCheckTest, FindsProductsThatOverflow) {
  Dim A{"A"}, B{"B"}, C{"C"};
  ArgCheck check("op");
  check.input("x", {memory_.data(), {int64_t{1} << 40, int64_t{1} << 40, 1}}, {DType::kF32},
              {A, B, C});
  EXPECT_STREQ(check.finish().message(), "op: x: the product of its sizes overflows");
  Dim D{"D"}, E{"E"};
  ArgCheck bytes("op");
  bytes.input("x", {memory_.data(), {int64_t{1} << 61, 1}}, {DType::kF32}, {D, E});
  EXPECT_STREQ(bytes.finish().message(), "op: x: the product of its sizes overflows");
}

}  // namespace
}  // namespace moeops
