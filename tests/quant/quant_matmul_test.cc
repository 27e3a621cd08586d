// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/quant/quant_matmul.h>
#include <moeops/ref/ref.h>

#include <cmath>
#include <string>
#include <vector>

#include "tests/support/allocation_count.h"
#include "tests/support/array.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/draw.h"
#include "tests/support/gemm_error.h"
#include "tests/support/refused.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::Array;
using test::Draw;
using test::isas;

struct Extras {
  bool one_scale = false;
  bool bias = true;
  bool bias_i32 = false;
  bool x_scale = true;
  bool offset = true;
  bool transpose_w = false;
  int64_t x_gap = 0, y_gap = 0;
  Array::Against side = Array::Against::kBack;
};

struct Problem {
  int64_t M, K, N;
  Array x, w, w_scale, x_scale, bias, offset, y;
  QuantMatmulArgs args;
  ref::Weights weights;

  Problem(Draw& draw, DType y_dtype, int64_t m, int64_t k, int64_t n, const Extras& extras = {})
      : M(m),
        K(k),
        N(n),
        x(DType::kS8, {M, K}, extras.x_gap, extras.side),
        w(extras.transpose_w ? Array(DType::kS8, {K, N}, 0, extras.side)
                             : Array(DType::kS8, {N, K}, 0, extras.side)),
        y(y_dtype, {M, N}, extras.y_gap, extras.side) {
    x.set_integers(draw, -128, 127);
    w.set_integers(draw, -128, 127);
    const bool exact = y_dtype == DType::kI32;
    if (!exact) {
      const float unit = 1.0f / (73.0f * std::sqrt(static_cast<float>(K) + 1.0f));
      w_scale = Array(DType::kF32, {extras.one_scale ? 1 : N}, 0, extras.side);
      w_scale.set_uniform(draw, 0.1f * unit, 2.0f * unit);
      if (extras.x_scale) {
        x_scale = Array(DType::kF32, {M}, 0, extras.side);
        x_scale.set_uniform(draw, 0.01f, 1.0f);
      }
    }
    if (extras.bias) {
      const bool i32 = exact || extras.bias_i32;
      bias = Array(i32 ? DType::kI32 : DType::kF32, {N}, 0, extras.side);
      if (i32) {
        bias.set_integers(draw, -100000, 100000);
      } else {
        bias.set_normal(draw, 3.0f);
      }
    }
    if (y_dtype == DType::kS8 && extras.offset) {
      offset = Array(DType::kF32, {1}, 0, extras.side);
      offset.set(0, 0, draw.uniform(-20.0f, 20.0f));
    }
    weights = {w.in(), extras.transpose_w, w_scale.in()};
    args = {x.in(), x_scale.in(), bias.in(), offset.in(), y.out()};
  }
  Problem(const Problem&) = delete;

  PackedWeights pack() const {
    Context ctx;
    PackedWeights packed;
    const Status status = PackedWeights::pack(ctx, {.dtype = DType::kS8}, weights.w,
                                              weights.transpose_w, weights.w_scale, &packed);
    EXPECT_TRUE(status.ok()) << status.message();
    return packed;
  }
};

// Bit for bit, on every ISA, for every number of workers.
TEST(QuantMatmul, EqualsTheReferenceOnRandomProblems) {
  const test::SplitSmallCalls split;
  for (uint64_t round = 0; round < 150; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    const Extras extras = {.one_scale = draw.flag(),
                           .bias = draw.flag(),
                           .bias_i32 = draw.flag(),
                           .x_scale = draw.flag(),
                           .offset = draw.flag(),
                           .transpose_w = draw.flag(),
                           .x_gap = draw.of<int64_t>({0, 0, 1, 5}),
                           .y_gap = draw.of<int64_t>({0, 0, 1, 9}),
                           .side = draw.of({Array::Against::kFront, Array::Against::kBack})};
    const DType y_dtype = draw.of({DType::kF32, DType::kBf16, DType::kS8, DType::kI32});
    const int64_t M = draw.of<int64_t>({0, 1, 2, 7, 33, 60});
    const int64_t K = draw.of<int64_t>({0, 1, 3, 63, 64, 65, 200});
    const int64_t N = draw.of<int64_t>({0, 1, 31, 33, 64, 130});
    Problem problem(draw, y_dtype, M, K, N, extras);
    const Array expected = problem.y.like();
    std::fill_n(expected.data(), expected.bytes(), char{0x5A});
    QuantMatmulArgs reference = problem.args;
    reference.y = expected.out();
    const Status status = ref::quant_matmul(problem.weights, reference);
    ASSERT_TRUE(status.ok()) << status.message();
    const PackedWeights packed = problem.pack();
    for (const Isa isa : isas()) {
      for (const int threads : {1, 2, 3, 7}) {
        Context ctx({.threads = threads, .isa = isa});
        problem.y.fill(0x5A);
        const Status ran = quant_matmul(ctx, packed, problem.args);
        ASSERT_TRUE(ran.ok()) << ran.message();
        ASSERT_TRUE(problem.y.same_bits(expected)) << to_string(isa) << " with " << threads;
      }
    }
  }
}

TEST(QuantMatmul, AllocatesNothingAfterTheFirstCall) {
  for (const int threads : {1, 2}) {
    Draw draw(19);
    Problem problem(draw, DType::kF32, 64, 900, 96);
    const PackedWeights packed = problem.pack();
    Context ctx({.threads = threads});
    ASSERT_TRUE(quant_matmul(ctx, packed, problem.args).ok());
    for (int i = 0; i < 3; ++i) {
      const int64_t inside = test::allocation_count();
      const Status status = quant_matmul(ctx, packed, problem.args);
      ASSERT_EQ(test::allocation_count(), inside);
      ASSERT_TRUE(status.ok()) << status.message();
    }
  }
}

TEST(QuantMatmul, RefusesEveryMalformedView) {
  for (const DType y : {DType::kF32, DType::kBf16, DType::kS8, DType::kI32}) {
    SCOPED_TRACE(to_string(y));
    Draw draw(23);
    Problem problem(draw, y, 12, 33, 40);
    Context ctx;
    const PackedWeights packed = problem.pack();
    std::vector<test::InputView<QuantMatmulArgs>> inputs = {
        {"x", &QuantMatmulArgs::x}, {"bias", &QuantMatmulArgs::bias, false}};
    if (problem.x_scale.present()) inputs.push_back({"x_scale", &QuantMatmulArgs::x_scale, false});
    if (problem.offset.present()) inputs.push_back({"offset", &QuantMatmulArgs::offset, false});
    const std::vector<test::OutputView<QuantMatmulArgs>> outputs = {{"y", &QuantMatmulArgs::y}};
    test::sweep_contract(problem.args, inputs, outputs,
                         [&](const QuantMatmulArgs& a) { return quant_matmul(ctx, packed, a); });
  }
}

TEST(QuantMatmul, Errors) {
  Draw draw(29);
  Problem scaled(draw, DType::kF32, 10, 16, 8);
  Problem exact(draw, DType::kI32, 10, 16, 8);
  const PackedWeights with_scales = scaled.pack();
  const PackedWeights without = exact.pack();
  Context ctx;
  const std::vector<char> before = scaled.y.content(), before_exact = exact.y.content();
  const auto expect = [&](const PackedWeights& packed, const QuantMatmulArgs& args,
                          const std::string& message) {
    test::expect_refused(quant_matmul(ctx, packed, args), message);
    EXPECT_EQ(scaled.y.content(), before) << "y was written";
    EXPECT_EQ(exact.y.content(), before_exact) << "y was written";
  };
  const auto form = [](PackedWeightsForm f) {
    PackedWeights packed;
    EXPECT_TRUE(PackedWeights::create(f, &packed).ok());
    return packed;
  };
  expect(PackedWeights(), scaled.args, "quant_matmul: weights hold nothing");
  expect(form({.experts = 1, .n = 8, .k = 16}), scaled.args,
         "quant_matmul: weights are f32, expected s8");
  expect(form({.dtype = DType::kS8, .experts = 2, .n = 8, .k = 16}), scaled.args,
         "quant_matmul: weights hold 2 matrices, expected one");
  expect(form({.dtype = DType::kS8, .experts = 1, .n = 8, .k = 16, .role = WeightRole::kGateUp}),
         scaled.args, "quant_matmul: weights are packed as gate and up, expected plain ones");
  expect(form({.dtype = DType::kS8, .experts = 1, .n = 9, .k = 16}), scaled.args,
         "quant_matmul: bias.shape[0] = 8, expected N = 9 (from weights)");
  expect(form({.dtype = DType::kS8, .experts = 1, .n = 8, .k = 15}), scaled.args,
         "quant_matmul: x.shape[1] = 16, expected K = 15 (from weights)");
  // Which of scales, bias and offset go together grouped_matmul says.
  QuantMatmulArgs args = scaled.args;
  args.bias = {};
  expect(without, args, "grouped_matmul: the weights have no scales");
  const float value = 1.0f;
  args.offset = {&value, {1}};
  expect(with_scales, args, "grouped_matmul: offset is given, but y is not s8");
  expect(with_scales, exact.args, "grouped_matmul: the weights have scales, but y is i32");
  args = exact.args;
  args.x_scale = scaled.args.x_scale;
  expect(without, args, "grouped_matmul: x_scale is given, but y is i32");
  args = exact.args;
  args.bias = scaled.args.bias;
  expect(without, args, "grouped_matmul: bias is f32, but y is i32");
  args = scaled.args;
  args.y = {static_cast<float*>(const_cast<void*>(with_scales.data())), {10, 8}};
  expect(with_scales, args, "quant_matmul: output y overlaps input weights");
}

}  // namespace
}  // namespace moeops
