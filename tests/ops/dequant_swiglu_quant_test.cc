// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <malloc.h>
#include <moeops/ops/dequant_swiglu_quant.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "ops/core/team.h"
#include "ops/swiglu/kernels.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/draw.h"
#include "tests/support/guarded_buffer.h"
#include "tests/support/seed.h"
#include "tests/support/swiglu_refusals.h"

namespace moeops {
namespace {

using test::Draw;
using test::GuardedBuffer;
using test::GuardedMatrix;

// The ISAs that have kernels of their own.
std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (int i = 0; i < swiglu_internal::kRowKernelsCount; ++i) {
    const Isa isa = swiglu_internal::kRowKernels[i]->isa;
    if (isa <= machine().isa) all.push_back(isa);
  }
  return all;
}

struct Problem {
  int64_t M, I, E;
  GuardedBuffer::Against side;
  GuardedMatrix x, weight_scale, x_scale, bias, quant_scale;
  std::vector<int64_t> counts;
  DequantSwigluQuantArgs args;

  // `rows`: of each expert.
  Problem(Draw& draw, std::vector<int64_t> rows, int64_t uncovered, int64_t i)
      : M(uncovered),
        I(i),
        E(static_cast<int64_t>(rows.size())),
        side(draw.of({GuardedBuffer::Against::kFront, GuardedBuffer::Against::kBack})),
        x(DType::kI32, total(rows) + uncovered, 2 * I, 2 * I + draw.of<int64_t>({0, 0, 1, 7}),
          side),
        weight_scale(DType::kF32, E, 2 * I, 2 * I + draw.of<int64_t>({0, 3}), side),
        x_scale(DType::kF32, 1, total(rows) + uncovered, total(rows) + uncovered, side),
        bias(DType::kI32, E, 2 * I, 2 * I, side),
        quant_scale(DType::kF32, E, I, I + draw.of<int64_t>({0, 3}), side),
        counts(std::move(rows)) {
    M += total(counts);
    args.swiglu.activation =
        draw.of({GatedActivation::kSilu, GatedActivation::kSwigluOai, GatedActivation::kGeluTanh});
    args.swiglu.gate = draw.of({Gate::kLeft, Gate::kRight, Gate::kInterleaved});
    args.swiglu.limit = draw.of({7.0f, 0.5f});
    // The reference's gelu_tanh of a negative gate is what a cancellation leaves: a row of those
    // only could not be compared. swiglu's own test does.
    const bool positive = args.swiglu.activation == GatedActivation::kGeluTanh;
    const auto any_sign = [&](float v) { return positive ? std::fabs(v) : v; };
    const bool float_bias = draw.chance(2);
    for (int64_t row = 0; row < M; ++row) {
      x_scale.row<float>(0)[row] = draw.chance(15) ? NAN : 0.01f * std::fabs(draw.normal());
      for (int64_t j = 0; j < 2 * I; ++j) {
        const bool wraps = !positive && draw.chance(40);
        x.row<int32_t>(row)[j] =
            wraps ? INT32_MAX : static_cast<int32_t>(any_sign(30000 * draw.normal()));
      }
    }
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t j = 0; j < 2 * I; ++j) {
        weight_scale.row<float>(e)[j] = 0.01f * std::fabs(draw.normal());
        if (float_bias) {
          bias.row<float>(e)[j] = any_sign(draw.normal());
        } else {
          bias.row<int32_t>(e)[j] = static_cast<int32_t>(any_sign(1000 * draw.normal()));
        }
      }
      for (int64_t j = 0; j < I; ++j) {
        quant_scale.row<float>(e)[j] = 0.5f + std::fabs(draw.normal());
      }
    }
    args.x = x.view();
    args.weight_scale = weight_scale.view();
    args.x_scale = x_scale.vector();
    args.group_list = {counts.data(), {E}};
    if (draw.chance(2)) args.bias = bias.view();
    if (float_bias && args.bias.present()) args.bias.dtype = DType::kF32;
    if (draw.chance(2)) args.quant_scale = quant_scale.view();
  }

  static int64_t total(const std::vector<int64_t>& rows) {
    int64_t sum = 0;
    for (const int64_t count : rows) sum += count;
    return sum;
  }
};

struct Result {
  GuardedMatrix q, scale;
  Result(const Problem& problem, int64_t q_stride)
      : q(DType::kS8, problem.M, problem.I, q_stride, problem.side),
        scale(DType::kF32, 1, problem.M, problem.M, problem.side) {}
  void bind(DequantSwigluQuantArgs& args) const {
    q.reset();
    scale.reset();
    args.q = q.view();
    args.scale = scale.vector();
  }
};

// One unit of q, in the few places where a rounding differs.
void expect_close(const Problem& problem, const Result& got, const Result& expected) {
  ASSERT_TRUE(got.q.gaps_untouched());
  int64_t off = 0;
  for (int64_t i = 0; i < problem.M; ++i) {
    const float scale = got.scale.row<float>(0)[i];
    const float wanted = expected.scale.row<float>(0)[i];
    if (std::isnan(wanted)) {
      ASSERT_TRUE(std::isnan(scale)) << "row " << i;
    } else {
      ASSERT_NEAR(scale, wanted, 4e-6f * wanted) << "row " << i;
    }
    for (int64_t j = 0; j < problem.I; ++j) {
      const int difference = got.q.row<int8_t>(i)[j] - expected.q.row<int8_t>(i)[j];
      ASSERT_LE(std::abs(difference), 1) << "at " << i << "," << j;
      off += difference != 0;
    }
  }
  ASSERT_LE(off, 2 + problem.M * problem.I / 200);
}

TEST(DequantSwigluQuant, MatchesTheReferenceOnRandomProblems) {
  for (uint64_t round = 0; round < 2500; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    std::vector<int64_t> rows(static_cast<size_t>(draw.between(0, 5)));
    for (int64_t& count : rows) count = draw.of<int64_t>({0, 0, 1, 2, 3});
    const int64_t I = draw.chance(10) ? draw.between(0, 300) : draw.between(0, 40);
    Problem problem(draw, rows, draw.of<int64_t>({0, 0, 1, 3}), I);
    const int64_t q_stride = I + draw.of<int64_t>({0, 0, 1, 37});
    const Result expected(problem, q_stride);
    expected.bind(problem.args);
    const Status reference = ref::dequant_swiglu_quant(problem.args);
    ASSERT_TRUE(reference.ok()) << reference.message();

    split_small_calls(draw.chance(4));
    stream_small_outputs(draw.chance(2));
    const Result first(problem, q_stride);
    const Result got(problem, q_stride);
    for (const Isa isa : isas()) {
      SCOPED_TRACE(to_string(isa));
      const Result& result = isa == isas().front() ? first : got;
      Context ctx({.threads = static_cast<int>(draw.between(1, 3)), .isa = isa});
      result.bind(problem.args);
      const Status status = dequant_swiglu_quant(ctx, problem.args);
      ASSERT_TRUE(status.ok()) << status.message();
      expect_close(problem, result, expected);
      if (HasFatalFailure()) return;
      ASSERT_TRUE(result.q.same_bytes(first.q));
      ASSERT_TRUE(result.scale.same_bytes(first.scale));
    }
  }
  split_small_calls(false);
  stream_small_outputs(false);
}

TEST(DequantSwigluQuant, AnyNumberOfWorkers) {
  for (uint64_t round = 0; round < 6; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    Problem problem(draw, {0, 17, 1, 0, 40, 9}, 5, 777);
    const Result expected(problem, 777);
    expected.bind(problem.args);
    ASSERT_TRUE(ref::dequant_swiglu_quant(problem.args).ok());
    const Result first(problem, 777);
    const Result got(problem, 777);
    for (const Isa isa : isas()) {
      for (const int threads : {1, 2, 3, 7}) {
        const Result& result = threads == 1 ? first : got;
        Context ctx({.threads = threads, .isa = isa});
        result.bind(problem.args);
        ASSERT_TRUE(dequant_swiglu_quant(ctx, problem.args).ok());
        expect_close(problem, result, expected);
        if (HasFatalFailure()) return;
        ASSERT_TRUE(result.q.same_bytes(first.q)) << to_string(isa) << " " << threads;
        ASSERT_TRUE(result.scale.same_bytes(first.scale)) << to_string(isa) << " " << threads;
      }
    }
  }
}

struct Simple {
  std::vector<int32_t> x;
  std::vector<float> weight_scale, x_scale, bias, quant_scale, scale;
  std::vector<int8_t> q;
  std::vector<int64_t> counts;
  DequantSwigluQuantArgs args;

  Simple(int64_t M, int64_t I, std::vector<int64_t> rows) : counts(std::move(rows)) {
    const auto E = static_cast<int64_t>(counts.size());
    Draw draw(3);
    for (int64_t j = 0; j < 2 * M * I; ++j) {
      x.push_back(static_cast<int32_t>(10000 * draw.normal()));
    }
    for (int64_t j = 0; j < 2 * E * I; ++j) {
      weight_scale.push_back(0.01f * std::fabs(draw.normal()));
      bias.push_back(draw.normal());
    }
    for (int64_t j = 0; j < E * I; ++j) quant_scale.push_back(1.0f + std::fabs(draw.normal()));
    x_scale.assign(static_cast<size_t>(M), 0.01f);
    q.assign(static_cast<size_t>(M * I), 55);
    scale.assign(static_cast<size_t>(M), -5.0f);
    args.x = {x.data(), {M, 2 * I}};
    args.weight_scale = {weight_scale.data(), {E, 2 * I}};
    args.x_scale = {x_scale.data(), {M}};
    args.group_list = {counts.data(), {E}};
    args.bias = {bias.data(), {E, 2 * I}};
    args.quant_scale = {quant_scale.data(), {E, I}};
    args.q = {q.data(), {M, I}};
    args.scale = {scale.data(), {M}};
  }
};

// A token's NaN reaches its row, an expert's its rows, and nothing else changes.
TEST(DequantSwigluQuant, ANaNStaysWithItsTokenAndItsExpert) {
  for (const Isa isa : isas()) {
    Context ctx({.threads = 2, .isa = isa});
    Simple clean(40, 500, {10, 0, 20, 10});
    Simple poisoned(40, 500, {10, 0, 20, 10});
    poisoned.x_scale[4] = NAN;
    poisoned.weight_scale[3 * 1000 + 700] = NAN;
    ASSERT_TRUE(dequant_swiglu_quant(ctx, clean.args).ok());
    ASSERT_TRUE(dequant_swiglu_quant(ctx, poisoned.args).ok());
    for (size_t i = 0; i < 40; ++i) {
      const bool bad = i == 4 || i >= 30;
      EXPECT_EQ(std::isnan(poisoned.scale[i]), bad) << i;
      for (size_t j = 0; j < 500; ++j) {
        ASSERT_EQ(poisoned.q[i * 500 + j], bad ? 0 : clean.q[i * 500 + j]) << i << "," << j;
      }
    }
  }
}

TEST(DequantSwigluQuant, AllocatesNothingAfterTheFirstCall) {
  Context ctx({.threads = 1});  // one worker: mallinfo2 sees this thread's arena
  Simple call(64, 1000, {20, 0, 44});
  ASSERT_TRUE(dequant_swiglu_quant(ctx, call.args).ok());
  for (int64_t i = 0; i < 20; ++i) {
    call.counts = {i, 64 - 2 * i, i};
    call.args.group_list = {call.counts.data(), {3}};
    const struct mallinfo2 before = mallinfo2();
    ASSERT_TRUE(dequant_swiglu_quant(ctx, call.args).ok());
    const struct mallinfo2 after = mallinfo2();
    ASSERT_EQ(after.uordblks, before.uordblks);
    ASSERT_EQ(after.hblkhd, before.hblkhd);
  }
}

TEST(DequantSwigluQuant, RefusesEveryMalformedView) {
  using Args = DequantSwigluQuantArgs;
  Context ctx;
  Simple call(9, 33, {3, 1, 5});
  const std::vector<test::InputView<Args>> inputs = {{"x", &Args::x},
                                                     {"weight_scale", &Args::weight_scale},
                                                     {"x_scale", &Args::x_scale},
                                                     {"group_list", &Args::group_list},
                                                     {"bias", &Args::bias, false},
                                                     {"quant_scale", &Args::quant_scale, false}};
  const std::vector<test::OutputView<Args>> outputs = {{"q", &Args::q}, {"scale", &Args::scale}};
  test::sweep_contract(call.args, inputs, outputs,
                       [&](const Args& a) { return dequant_swiglu_quant(ctx, a); });
}

class DequantSwigluQuantErrors : public ::testing::Test {
 protected:
  void expect(const char* message) {
    const Status status = dequant_swiglu_quant(ctx_, call_.args);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_STREQ(status.message(), message);
    for (const int8_t q : call_.q) ASSERT_EQ(q, 55) << "q was written";
    for (const float scale : call_.scale) ASSERT_EQ(scale, -5.0f) << "scale was written";
  }
  Context ctx_;
  Simple call_{6, 10, {1, 2, 3}};
};

TEST_F(DequantSwigluQuantErrors, NegativeCount) {
  call_.counts[1] = -2;
  expect("dequant_swiglu_quant: group_list[1] = -2 is negative");
}
TEST_F(DequantSwigluQuantErrors, MoreRowsThanThereAre) {
  call_.counts[2] = 4;
  expect(
      "dequant_swiglu_quant: group_list makes more rows than there are: 3 + 4 at entry 2, M = 6");
}
TEST_F(DequantSwigluQuantErrors, OddWidth) {
  call_.args.x = {call_.x.data(), {6, 19}};
  expect("dequant_swiglu_quant: 2I = 19 (from x) is odd, but holds gate and up");
}
TEST_F(DequantSwigluQuantErrors, Parameters) {
  test::expect_swiglu_refusals(call_.args.swiglu, [&](const std::string& wrong) {
    expect(("dequant_swiglu_quant: " + wrong).c_str());
  });
}

}  // namespace
}  // namespace moeops
