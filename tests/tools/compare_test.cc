// SPDX-License-Identifier: Apache-2.0
#include "tools/opdiff/compare.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/tools/test_support.h"

namespace moeops::tools {
namespace {

using Index = std::vector<int64_t>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

Tensor f32(std::initializer_list<float> values) {
  return make_tensor<float>(FileDType::kF32, {std::ssize(values)}, values);
}

Tensor i32(std::initializer_list<int32_t> values) {
  return make_tensor<int32_t>(FileDType::kI32, {std::ssize(values)}, values);
}

bool passes(const Tensor& expected, const Tensor& got, const Tolerance& tolerance) {
  return compare(expected.ref(), got.ref(), tolerance).pass;
}

TEST(Compare, ExactIsExact) {
  EXPECT_TRUE(passes(f32({1, -2}), f32({1, -2}), kExact));
  EXPECT_FALSE(passes(f32({1, -2}), f32({1, std::nextafter(-2.0f, 0.0f)}), kExact));
  EXPECT_FALSE(passes(i32({1}), i32({2}), kExact));
  EXPECT_TRUE(passes(f32({0.0f}), f32({-0.0f}), kExact));
  const float denormal = std::numeric_limits<float>::denorm_min();
  EXPECT_FALSE(passes(f32({denormal}), f32({-denormal}), kExact));
}

TEST(Compare, ExactTellsLargeIntegersApart) {
  const int64_t big = int64_t{1} << 53;
  const auto i64 = [](int64_t value) { return make_tensor(FileDType::kI64, {1}, {value}); };
  EXPECT_FALSE(passes(i64(big), i64(big + 1), kExact));
  EXPECT_TRUE(passes(i64(big), i64(big + 1), OffByOne{1}));
  EXPECT_FALSE(passes(i64(INT64_MIN), i64(INT64_MAX), OffByOne{1}));
  EXPECT_EQ(compare(i64(big).ref(), i64(big + 1).ref(), kExact).absolute->value, 1.0);
  EXPECT_EQ(compare(i64(INT64_MIN).ref(), i64(INT64_MAX).ref(), kExact).absolute->value, 0x1p64);
}

TEST(Compare, NanMatchesAnyNanAndInfinityItself) {
  for (const Tolerance& tolerance :
       {Tolerance{kExact}, Tolerance{Close{1, 1}}, Tolerance{WithinUlps{int64_t{1} << 40}}}) {
    EXPECT_TRUE(passes(f32({kNaN, kInf, -kInf}), f32({-kNaN, kInf, -kInf}), tolerance));
    EXPECT_FALSE(passes(f32({kNaN}), f32({1}), tolerance));
    EXPECT_FALSE(passes(f32({1}), f32({kNaN}), tolerance));
    EXPECT_FALSE(passes(f32({kInf}), f32({-kInf}), tolerance));
    EXPECT_FALSE(passes(f32({kInf}), f32({kNaN}), tolerance));
    EXPECT_FALSE(passes(f32({kInf}), f32({std::numeric_limits<float>::max()}), tolerance));
    EXPECT_FALSE(passes(f32({std::numeric_limits<float>::max()}), f32({kInf}), tolerance));
  }
}

TEST(Compare, CloseAddsAbsoluteAndRelative) {
  const Close tolerance{.relative = 0.125, .absolute = 0.5};
  EXPECT_TRUE(passes(f32({8, -8, 0}), f32({9.5f, -6.5f, 0.5f}), tolerance));
  EXPECT_FALSE(passes(f32({8}), f32({9.625f}), tolerance));
  EXPECT_FALSE(passes(f32({8}), f32({6.375f}), tolerance));
  // Relative to the expected value, not to what we got.
  EXPECT_FALSE(passes(f32({0}), f32({0.53125f}), tolerance));
  EXPECT_TRUE(passes(i32({80}), i32({90}), tolerance));
  EXPECT_FALSE(passes(i32({80}), i32({91}), tolerance));
}

TEST(Compare, UlpsAreThoseOfTheDtype) {
  const float next = std::nextafter(1.0f, 2.0f);
  EXPECT_TRUE(passes(f32({1}), f32({next}), WithinUlps{1}));
  EXPECT_FALSE(passes(f32({1}), f32({std::nextafter(next, 2.0f)}), WithinUlps{1}));

  for (FileDType dtype : {FileDType::kF16, FileDType::kBf16}) {
    const auto bits = [&](uint16_t value) { return make_tensor(dtype, {1}, {value}); };
    EXPECT_TRUE(passes(bits(0x3C00), bits(0x3C02), WithinUlps{2}));
    EXPECT_FALSE(passes(bits(0x3C00), bits(0x3C02), WithinUlps{1}));
    EXPECT_TRUE(passes(bits(0x0001), bits(0x8001), WithinUlps{2})) << "across both zeros";
    EXPECT_FALSE(passes(bits(0x0001), bits(0x8001), WithinUlps{1}));
    EXPECT_EQ(compare(bits(0xBC00).ref(), bits(0xBC03).ref(), kExact).ulps->value, 3.0);
  }

  const double one = 1;
  const Tensor f64 = make_tensor<double>(FileDType::kF64, {1}, {one});
  const Tensor after = make_tensor<double>(FileDType::kF64, {1}, {std::nextafter(one, 2.0)});
  EXPECT_TRUE(passes(f64, after, WithinUlps{1}));
  EXPECT_FALSE(passes(f64, after, kExact));
}

TEST(Compare, OffByOneInAFractionOfThePlaces) {
  const Tensor expected = i32({10, 20, 30, 40});
  EXPECT_TRUE(passes(expected, i32({11, 20, 30, 40}), OffByOne{0.25}));
  EXPECT_FALSE(passes(expected, i32({11, 19, 30, 40}), OffByOne{0.25}));
  EXPECT_FALSE(passes(expected, i32({12, 20, 30, 40}), OffByOne{1})) << "by more is never allowed";
  EXPECT_TRUE(passes(expected, expected, OffByOne{0}));

  // Too many: all of them are reported. Few enough: only what is off by more.
  EXPECT_EQ(compare(expected.ref(), i32({11, 19, 30, 40}).ref(), OffByOne{0.25}).beyond, 2);
  const Comparison one = compare(expected.ref(), i32({11, 20, 33, 40}).ref(), OffByOne{0.25});
  EXPECT_EQ(one.beyond, 1);
  EXPECT_EQ(one.mismatches.at(0).index, Index{2});
}

TEST(Compare, OffByOneIsForIntegers) {
  const Comparison result = compare(f32({1}).ref(), f32({1}).ref(), OffByOne{1});
  EXPECT_FALSE(result.pass);
  EXPECT_NE(result.message.find("F32"), std::string::npos);
}

TEST(Compare, ShapesAndDtypesMustAgree) {
  const Comparison shape =
      compare(Tensor(FileDType::kF32, {2, 3}).ref(), Tensor(FileDType::kF32, {3, 2}).ref(), kExact);
  EXPECT_FALSE(shape.pass);
  EXPECT_EQ(shape.message, "shape is [3,2], expected [2,3]");
  const Comparison dtype =
      compare(Tensor(FileDType::kF32, {1}).ref(), Tensor(FileDType::kI32, {1}).ref(), kExact);
  EXPECT_FALSE(dtype.pass);
  EXPECT_EQ(dtype.message, "dtype is I32, expected F32");
}

TEST(Compare, Figures) {
  const Tensor expected = make_tensor<float>(FileDType::kF32, {2, 3}, {1, 2, 0, 4, kNaN, 100});
  const Tensor got = make_tensor<float>(FileDType::kF32, {2, 3}, {1.5f, 2, 1, 4, 7, 103});
  const Comparison result = compare(expected.ref(), got.ref(), Close{0, 0.75});
  EXPECT_FALSE(result.pass);
  EXPECT_EQ(result.count, 6);
  EXPECT_EQ(result.differing, 4);
  EXPECT_EQ(result.beyond, 3);
  EXPECT_EQ(result.nonfinite, 1);
  EXPECT_EQ(result.absolute->value, 3.0);
  EXPECT_EQ(result.absolute->index, (Index{1, 2}));
  EXPECT_EQ(result.relative->value, 0.5) << "the place where 0 was expected does not count";
  EXPECT_EQ(result.relative->index, (Index{0, 0}));
  EXPECT_EQ(result.ulps->value, 0x3F800000);
  EXPECT_EQ(result.ulps->index, (Index{0, 2}));
  EXPECT_DOUBLE_EQ(result.relative_rms, std::sqrt((0.25 + 1 + 9) / (1 + 4 + 16 + 10000.0)));
  EXPECT_DOUBLE_EQ(result.cosine, (1.5 + 4 + 16 + 10300) / std::sqrt(1 + 4 + 16 + 10000.0) /
                                      std::sqrt(2.25 + 4 + 1 + 16 + 10609));
  ASSERT_EQ(result.mismatches.size(), 3u);
  EXPECT_EQ(result.mismatches[0].index, (Index{0, 2}));
  EXPECT_EQ(result.mismatches[1].got, "7");
  EXPECT_EQ(result.mismatches[1].expected, "nan");
}

TEST(Compare, FiguresOfEqualAndOfZeroTensors) {
  for (const Tensor& tensor : {f32({0, 0}), f32({1, 2}), f32({}), i32({0})}) {
    const Comparison same = compare(tensor.ref(), tensor.ref(), kExact);
    EXPECT_TRUE(same.pass);
    EXPECT_FALSE(same.absolute || same.relative || same.ulps);
    EXPECT_EQ(same.relative_rms, 0);
    EXPECT_EQ(same.cosine, 1);
  }
  const Comparison zero = compare(f32({0, 0}).ref(), f32({0, 1}).ref(), kExact);
  EXPECT_TRUE(std::isinf(zero.relative_rms));
  EXPECT_EQ(zero.cosine, 0);
  EXPECT_FALSE(compare(i32({1}).ref(), i32({5}).ref(), kExact).ulps);
}

TEST(Compare, ListsTheFirstMismatches) {
  const Comparison result = compare(i32({1, 2, 3, 4}).ref(), i32({1, 0, 0, 0}).ref(), kExact, 2);
  EXPECT_EQ(result.beyond, 3);
  ASSERT_EQ(result.mismatches.size(), 2u);
  EXPECT_EQ(result.mismatches[0].index, Index{1});
  EXPECT_EQ(result.mismatches[1].index, Index{2});
}

TEST(Compare, ReadsMisalignedTensors) {
  const Tensor expected = f32({1, 2});
  std::vector<std::byte> bytes(9);
  std::memcpy(bytes.data() + 1, expected.data.data(), 8);
  const TensorRef got{FileDType::kF32, {2}, bytes.data() + 1, 8};
  EXPECT_TRUE(compare(expected.ref(), got, kExact).pass);
}

TEST(Compare, TextForPeople) {
  const Comparison result = compare(f32({1, 2}).ref(), f32({1, 2.5f}).ref(), Close{0.125, 0});
  EXPECT_EQ(to_text("y", result),
            "FAIL y: 1 of 2 values beyond tolerance (rtol 0.125 atol 0)\n"
            "  1 differ, 0 of them NaN or infinite; largest error: absolute 0.5 at [1], relative "
            "0.25 at [1], ulp 2.1e+06 at [1]; relative rms 0.224, cosine 0.996545758\n"
            "  [1]: got 2.5, expected 2\n");
  EXPECT_EQ(to_text("y", compare(f32({1}).ref(), i32({1}).ref(), kExact)),
            "FAIL y: dtype is I32, expected F32\n");
  EXPECT_EQ(to_text("y", compare(f32({1}).ref(), f32({1}).ref(), kExact)).substr(0, 7), "PASS y:");
}

TEST(Compare, Json) {
  const nlohmann::json json =
      compare(f32({1, kNaN}).ref(), f32({1.5f, 2}).ref(), Close{0.125, 0.25});
  EXPECT_EQ(json["pass"], false);
  EXPECT_EQ(json["count"], 2);
  EXPECT_EQ(json["differing"], 2);
  EXPECT_EQ(json["beyond_tolerance"], 2);
  EXPECT_EQ(json["nonfinite"], 1);
  EXPECT_EQ(json["tolerance"], "rtol 0.125 atol 0.25");
  EXPECT_EQ(json["largest_absolute"], nlohmann::json::parse(R"({"value": 0.5, "index": [0]})"));
  EXPECT_EQ(json["mismatches"],
            nlohmann::json::parse(R"([{"index": [0], "got": "1.5", "expected": "1"},
                                      {"index": [1], "got": "2", "expected": "nan"}])"));
}

TEST(Tolerance, ParsesEveryKind) {
  const auto all = parse_tolerance("case", R"({"ids": {"exact": true},
                                               "x": {"rtol": 1e-3, "atol": 0},
                                               "y": {"ulp": 2},
                                               "q": {"off_by_one": 0.01}})");
  EXPECT_EQ(all.size(), 4u);
  EXPECT_EQ(to_string(all.at("ids")), "exact");
  EXPECT_EQ(to_string(all.at("x")), "rtol 0.001 atol 0");
  EXPECT_EQ(to_string(all.at("y")), "2 ulp");
  EXPECT_EQ(to_string(all.at("q")), "off by one in at most 0.01 of the places");
}

TEST(Tolerance, RefusesWhatIsNone) {
  const auto refuse = [](std::string_view json, std::initializer_list<std::string_view> parts) {
    expect_error([&] { parse_tolerance("c.safetensors", json); }, {"c.safetensors", "'tolerance'"});
    expect_error([&] { parse_tolerance("c.safetensors", json); }, parts);
  };
  refuse("", {"not JSON"});
  refuse("{\"x\": {\"rtol\": 1e999, \"atol\": 0}}", {"not JSON"});
  refuse("[]", {"is '[]'", "an object"});
  refuse(R"({"x": 1})", {"'x'", "is '1'", "expected"});
  refuse(R"({"x": {}})", {"'x'", "is '{}'", "expected"});
  refuse(R"({"x": {"percent": 1}})", {"'x'", "percent", "expected"});
  refuse(R"({"x": {"exact": false}})", {"'x'", "false", "expected"});
  refuse(R"({"x": {"exact": true, "ulp": 1}})", {"'x'", "expected"});
  refuse(R"({"x": {"rtol": 1}})", {"'x'", "expected"});
  refuse(R"({"x": {"rtol": -1e-3, "atol": 0}})", {"'x'", "rtol is '-0.001'", "[0, "});
  refuse(R"({"x": {"rtol": 0, "atol": "0"}})", {"'x'", "atol is '\"0\"'", "number"});
  refuse(R"({"x": {"ulp": -1}})", {"'x'", "ulp is '-1'", "[0, "});
  refuse(R"({"x": {"ulp": 1.5}})", {"'x'", "1.5", "integer"});
  refuse(R"({"x": {"off_by_one": 2}})", {"'x'", "off_by_one is '2'", "[0, 1]"});
}

TEST(Tolerance, DefaultsByDtype) {
  EXPECT_EQ(to_string(default_tolerance(FileDType::kI32)), "exact");
  EXPECT_EQ(to_string(default_tolerance(FileDType::kBool)), "exact");
  EXPECT_EQ(to_string(default_tolerance(FileDType::kBf16)), "rtol 1e-05 atol 1e-06");
}

}  // namespace
}  // namespace moeops::tools
