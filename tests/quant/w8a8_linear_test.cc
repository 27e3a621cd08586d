// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/quant/w8a8_linear.h>
#include <moeops/ref/ref.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <string>
#include <thread>
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
  bool transpose_w = false;
  int64_t x_gap = 0, y_gap = 0;
  Array::Against side = Array::Against::kBack;
};

struct Problem {
  int64_t M, K, N;
  Array x, w, w_scale, bias, y;
  W8a8LinearArgs args;
  ref::Weights weights;

  Problem(Draw& draw, DType x_dtype, DType y_dtype, int64_t m, int64_t k, int64_t n,
          const Extras& extras = {})
      : M(m),
        K(k),
        N(n),
        x(x_dtype, {M, K}, extras.x_gap, extras.side),
        w(extras.transpose_w ? Array(DType::kS8, {K, N}, 0, extras.side)
                             : Array(DType::kS8, {N, K}, 0, extras.side)),
        w_scale(DType::kF32, {extras.one_scale ? 1 : N}, 0, extras.side),
        y(y_dtype, {M, N}, extras.y_gap, extras.side) {
    x.set_normal(draw);
    w.set_integers(draw, -128, 127);
    w_scale.set_uniform(draw, 0.001f, 0.02f);
    if (extras.bias) {
      bias = Array(extras.bias_i32 ? DType::kI32 : DType::kF32, {N}, 0, extras.side);
      if (extras.bias_i32) {
        bias.set_integers(draw, -100000, 100000);
      } else {
        bias.set_normal(draw, 3.0f);
      }
    }
    weights = {w.in(), extras.transpose_w, w_scale.in()};
    args = {x.in(), bias.in(), y.out()};
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
  Array expected() const {
    Array result = y.like();
    result.fill(0x5A);
    W8a8LinearArgs reference = args;
    reference.y = result.out();
    const Status status = ref::w8a8_linear(weights, reference);
    EXPECT_TRUE(status.ok()) << status.message();
    return result;
  }
  void run(Context& ctx, const PackedWeights& packed) {
    y.fill(0x5A);
    const Status status = w8a8_linear(ctx, packed, args);
    ASSERT_TRUE(status.ok()) << status.message();
  }
};

// Bit for bit, on every ISA, for every number of workers.
TEST(W8a8Linear, EqualsTheReferenceOnRandomProblems) {
  const test::SplitSmallCalls split;
  for (uint64_t round = 0; round < 150; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    const Extras extras = {.one_scale = draw.flag(),
                           .bias = draw.flag(),
                           .bias_i32 = draw.flag(),
                           .transpose_w = draw.flag(),
                           .x_gap = draw.of<int64_t>({0, 0, 1, 5}),
                           .y_gap = draw.of<int64_t>({0, 0, 1, 9}),
                           .side = draw.of({Array::Against::kFront, Array::Against::kBack})};
    const DType x_dtype = draw.of({DType::kF32, DType::kBf16, DType::kF16});
    const DType y_dtype = draw.of({DType::kF32, DType::kBf16, DType::kF16});
    const int64_t M = draw.of<int64_t>({0, 1, 2, 7, 33, 60});
    const int64_t K = draw.of<int64_t>({0, 1, 3, 63, 64, 65, 200});
    const int64_t N = draw.of<int64_t>({0, 1, 31, 33, 64, 130});
    Problem problem(draw, x_dtype, y_dtype, M, K, N, extras);
    const Array expected = problem.expected();
    const PackedWeights packed = problem.pack();
    for (const Isa isa : isas()) {
      for (const int threads : {1, 2, 3, 7}) {
        Context ctx({.threads = threads, .isa = isa});
        ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
        ASSERT_TRUE(problem.y.same_bits(expected)) << to_string(isa) << " with " << threads;
      }
    }
  }
}

TEST(W8a8Linear, ANonFiniteValueIsItsRowsAlone) {
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    Draw draw(13);
    Problem problem(draw, DType::kF32, DType::kF32, 9, 96, 70);
    const PackedWeights packed = problem.pack();
    ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
    const std::vector<char> clean = problem.y.content();
    problem.x.set(4, 17, NAN);
    problem.x.set(6, 0, -INFINITY);
    ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
    for (int64_t i = 0; i < 9; ++i) {
      if (i == 4 || i == 6) {
        for (int64_t j = 0; j < 70; ++j) EXPECT_TRUE(std::isnan(problem.y.get(i, j)));
      } else {
        EXPECT_EQ(0, std::memcmp(problem.y.row<float>(i), clean.data() + i * 280, 280));
      }
    }
  }
}

TEST(W8a8Linear, SameBitsConcurrentlyAndNested) {
  const test::SplitSmallCalls split;
  const auto make = [] {
    Draw draw(17);
    return std::make_unique<Problem>(draw, DType::kBf16, DType::kBf16, 150, 130, 190);
  };
  const auto original = make();
  const PackedWeights packed = original->pack();
  const std::vector<char> expected = original->expected().content();
  std::vector<std::unique_ptr<Problem>> problems;
  for (int i = 0; i < 3; ++i) problems.push_back(make());
  std::vector<std::thread> threads;
  for (const auto& problem : problems) {
    threads.emplace_back([&packed, &problem] {
      Context ctx({.threads = 2});
      for (int repeat = 0; repeat < 20; ++repeat) problem->run(ctx, packed);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& problem : problems) EXPECT_EQ(problem->y.content(), expected);
#pragma omp parallel num_threads(3)
  {
    Context ctx({.threads = 2});
    problems[static_cast<size_t>(omp_get_thread_num())]->run(ctx, packed);
  }
  for (const auto& problem : problems) EXPECT_EQ(problem->y.content(), expected);
}

TEST(W8a8Linear, AllocatesNothingAfterTheFirstCall) {
  for (const int threads : {1, 2}) {
    Draw draw(19);
    Problem problem(draw, DType::kF32, DType::kF32, 64, 900, 96);
    const PackedWeights packed = problem.pack();
    Context ctx({.threads = threads});
    ASSERT_TRUE(w8a8_linear(ctx, packed, problem.args).ok());
    for (int i = 0; i < 3; ++i) {
      const int64_t inside = test::allocation_count();
      const Status status = w8a8_linear(ctx, packed, problem.args);
      ASSERT_EQ(test::allocation_count(), inside);
      ASSERT_TRUE(status.ok()) << status.message();
    }
  }
}

// Sizes of zero in views whose data is null but whose rows have a stride, and a number of empty
// rows that no memory could describe one by one.
TEST(W8a8Linear, EmptyViews) {
  Draw draw(20);
  Problem problem(draw, DType::kF32, DType::kF32, 5, 0, 40);
  problem.args.x = {nullptr, TensorLayout(DType::kF32, {5, 0}, 9)};
  const PackedWeights packed = problem.pack();
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
    EXPECT_TRUE(problem.y.same_bits(problem.expected()));
  }
  PackedWeights empty;
  ASSERT_TRUE(PackedWeights::create({.dtype = DType::kS8, .experts = 1}, &empty).ok());
  const int64_t rows = int64_t{1} << 61;
  Context ctx;
  EXPECT_TRUE(w8a8_linear(ctx, empty,
                          {{nullptr, TensorLayout(DType::kF32, {rows, 0})},
                           {},
                           {nullptr, TensorLayout(DType::kF32, {rows, 0})}})
                  .ok());
}

TEST(W8a8Linear, RefusesEveryMalformedView) {
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const bool bias_i32 : {false, true}) {
      SCOPED_TRACE(to_string(dtype));
      Draw draw(23);
      Problem problem(draw, dtype, dtype, 12, 33, 40, {.bias_i32 = bias_i32});
      Context ctx;
      const PackedWeights packed = problem.pack();
      test::sweep_contract<W8a8LinearArgs>(
          problem.args, {{"x", &W8a8LinearArgs::x}, {"bias", &W8a8LinearArgs::bias, false}},
          {{"y", &W8a8LinearArgs::y}},
          [&](const W8a8LinearArgs& a) { return w8a8_linear(ctx, packed, a); });
    }
  }
}

TEST(W8a8Linear, Errors) {
  Draw draw(29);
  Problem problem(draw, DType::kF32, DType::kF32, 10, 16, 8);
  const PackedWeights good = problem.pack();
  Context ctx;
  const std::vector<char> before = problem.y.content();
  const auto expect = [&](const PackedWeights& packed, const std::string& message) {
    test::expect_refused(w8a8_linear(ctx, packed, problem.args), "w8a8_linear: " + message);
    EXPECT_EQ(problem.y.content(), before) << "y was written";
  };
  const auto form = [](PackedWeightsForm f) {
    PackedWeights packed;
    EXPECT_TRUE(PackedWeights::create(f, &packed).ok());
    return packed;
  };
  expect(PackedWeights(), "weights hold nothing");
  expect(form({.dtype = DType::kBf16, .experts = 1, .n = 8, .k = 16}),
         "weights are bf16, expected s8");
  expect(form({.dtype = DType::kS8, .experts = 2, .n = 8, .k = 16}),
         "weights hold 2 matrices, expected one");
  expect(form({.dtype = DType::kS8, .experts = 1, .n = 8, .k = 16, .scales = false}),
         "the weights have no scales");
  expect(form({.dtype = DType::kS8, .experts = 1, .n = 8, .k = 16, .role = WeightRole::kGateUp}),
         "weights are packed as gate and up, expected plain ones");
  problem.args.y = {static_cast<float*>(const_cast<void*>(good.data())), {10, 8}};
  expect(good, "output y overlaps input weights");
}

}  // namespace
}  // namespace moeops
