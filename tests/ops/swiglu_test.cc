// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <malloc.h>
#include <moeops/ops/swiglu.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>
#include <cstring>
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

using namespace swiglu_internal;  // NOLINT(google-build-using-namespace)
using test::Draw;
using test::GuardedBuffer;
using test::GuardedMatrix;

std::vector<const RowKernels*> kernels() {
  std::vector<const RowKernels*> all;
  for (int i = 0; i < kRowKernelsCount; ++i) {
    if (kRowKernels[i]->isa <= machine().isa) all.push_back(kRowKernels[i]);
  }
  return all;
}

SwigluParams draw_params(Draw& draw) {
  SwigluParams params;
  params.activation =
      draw.of({GatedActivation::kSilu, GatedActivation::kSwigluOai, GatedActivation::kGeluTanh});
  params.gate = draw.of({Gate::kLeft, Gate::kRight, Gate::kInterleaved});
  params.limit = draw.of({7.0f, 0.0f, 1.5f, INFINITY});
  params.alpha = draw.of({1.702f, 1.0f, -0.5f});
  return params;
}

// g and u of element j of row i.
void gate_and_up(const GuardedMatrix& x, Gate gate, int64_t I, int64_t i, int64_t j, double* g,
                 double* u) {
  const int64_t left = gate == Gate::kInterleaved ? 2 * j : j;
  const int64_t right = gate == Gate::kInterleaved ? 2 * j + 1 : I + j;
  *g = static_cast<double>(x.get(i, gate == Gate::kRight ? right : left));
  *u = static_cast<double>(x.get(i, gate == Gate::kRight ? left : right));
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

struct Problem {
  int64_t M, I;
  DType dtype;
  GuardedBuffer::Against side;
  GuardedMatrix x, y, expected;
  SwigluArgs args;

  Problem(Draw& draw, int64_t m, int64_t i)
      : M(m),
        I(i),
        dtype(draw.of({DType::kF32, DType::kBf16, DType::kF16})),
        side(draw.of({GuardedBuffer::Against::kFront, GuardedBuffer::Against::kBack})),
        x(dtype, M, 2 * I, 2 * I + draw.of<int64_t>({0, 0, 1, 7}), side),
        y(dtype, M, I, I + draw.of<int64_t>({0, 0, 1, 37}), side),
        expected(dtype, M, I, I, side) {
    for (int64_t row = 0; row < M; ++row) {
      const float scale = draw.of({0.01f, 1.0f, 3.0f, 30.0f});
      const bool special = draw.chance(8);
      for (int64_t j = 0; j < 2 * I; ++j) {
        float v = draw.normal() * scale;
        if (special && draw.chance(10)) {
          v = draw.of({NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 0.0f, -0.0f, 1e-40f, -100.0f});
        }
        x.set(row, j, v);
      }
    }
    args.x = x.view();
    args.swiglu = draw_params(draw);
    args.y = expected.view();
    const Status status = ref::swiglu(args);
    EXPECT_TRUE(status.ok()) << status.message();
    args.y = y.view();
  }

  void check() const {
    ASSERT_TRUE(y.gaps_untouched());
    // A value that lies close to the middle of two may round to either.
    const double rounding = dtype == DType::kBf16 ? 0x1p-7 : dtype == DType::kF16 ? 0x1p-10 : 0;
    const double smallest = dtype == DType::kF16 ? 0x1p-24 : 1e-43;
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < I; ++j) {
        const float got = y.get(i, j);
        const float want = expected.get(i, j);
        if (same(got, want)) continue;
        double g;
        double u;
        gate_and_up(x, args.swiglu.gate, I, i, j, &g, &u);
        // The reference's 1 + tanh cancels for g < 0.
        const double cancelled =
            args.swiglu.activation == GatedActivation::kGeluTanh ? std::fabs(g * u) * 0x1p-22 : 0;
        if (std::isinf(cancelled) && !std::isfinite(got))
          continue;  // 0 or nearly 0, times infinity
        const double bound =
            std::fabs(static_cast<double>(want)) * (1e-6 + rounding) + cancelled + smallest;
        ASSERT_NEAR(got, want, bound) << "at " << i << "," << j << " g " << g << " u " << u;
      }
    }
  }
};

TEST(Swiglu, MatchesTheReferenceOnRandomProblems) {
  for (uint64_t round = 0; round < 3000; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    const int64_t M = draw.between(0, 6);
    const int64_t I = draw.chance(10) ? draw.between(0, 300) : draw.between(0, 40);
    const Problem problem(draw, M, I);
    split_small_calls(draw.chance(4));
    std::vector<float> first;
    for (const RowKernels* rows : kernels()) {
      SCOPED_TRACE(to_string(rows->isa));
      Context ctx({.threads = static_cast<int>(draw.between(1, 3)), .isa = rows->isa});
      problem.y.reset();
      const Status status = swiglu(ctx, problem.args);
      ASSERT_TRUE(status.ok()) << status.message();
      problem.check();
      if (HasFatalFailure()) return;
      std::vector<float> got;
      for (int64_t i = 0; i < M; ++i) {
        for (int64_t j = 0; j < I; ++j) got.push_back(problem.y.get(i, j));
      }
      if (first.empty()) first = got;
      ASSERT_TRUE(std::equal(got.begin(), got.end(), first.begin(), first.end(), same));

      // As large calls do it.
      problem.y.reset();
      for (int64_t i = 0; i < M; ++i) {
        const int64_t element = size_of(problem.dtype);
        const char* x = problem.x.row<char>(0) + i * problem.args.x.row_stride * element;
        rows->of(problem.dtype)(problem.args.swiglu, x, I,
                                problem.y.row<char>(0) + i * problem.args.y.row_stride * element,
                                x);
      }
      rows->fence();
      ASSERT_TRUE(problem.y.gaps_untouched());
      auto at = got.begin();
      for (int64_t i = 0; i < M; ++i) {
        for (int64_t j = 0; j < I; ++j) ASSERT_TRUE(same(problem.y.get(i, j), *at++));
      }
    }
  }
  split_small_calls(false);
}

TEST(Swiglu, AnyNumberOfWorkers) {
  for (uint64_t round = 0; round < 12; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    const Problem problem(draw, draw.between(60, 90), 1501);
    stream_small_outputs(draw.chance(2));
    for (const RowKernels* rows : kernels()) {
      std::vector<char> first;
      for (const int threads : {1, 2, 3, 7}) {
        SCOPED_TRACE(to_string(rows->isa));
        Context ctx({.threads = threads, .isa = rows->isa});
        problem.y.reset();
        ASSERT_TRUE(swiglu(ctx, problem.args).ok());
        problem.check();
        if (HasFatalFailure()) return;
        const char* bytes = problem.y.row<char>(0);
        const int64_t count =
            ((problem.M - 1) * problem.args.y.row_stride + problem.I) * size_of(problem.dtype);
        if (threads == 1) first.assign(bytes, bytes + count);
        ASSERT_EQ(std::memcmp(bytes, first.data(), first.size()), 0) << threads;
      }
    }
  }
  stream_small_outputs(false);
}

struct Simple {
  int64_t M, I;
  std::vector<float> x, y;
  SwigluArgs args;

  Simple(int64_t m, int64_t i) : M(m), I(i) {
    Draw draw(3);
    for (int64_t j = 0; j < 2 * M * I; ++j) x.push_back(draw.normal());
    y.assign(static_cast<size_t>(M * I), -5.0f);
    args.x = {x.data(), {M, 2 * I}};
    args.y = {y.data(), {M, I}};
  }
};

TEST(Swiglu, ANaNStaysInItsElement) {
  for (const RowKernels* rows : kernels()) {
    for (const auto activation :
         {GatedActivation::kSilu, GatedActivation::kSwigluOai, GatedActivation::kGeluTanh}) {
      Context ctx({.threads = 2, .isa = rows->isa});
      Simple clean(30, 999);
      Simple poisoned(30, 999);
      clean.args.swiglu.activation = poisoned.args.swiglu.activation = activation;
      poisoned.x[7 * 1998 + 998] = NAN;      // a gate
      poisoned.x[9 * 1998 + 999 + 5] = NAN;  // an up
      ASSERT_TRUE(swiglu(ctx, clean.args).ok());
      ASSERT_TRUE(swiglu(ctx, poisoned.args).ok());
      for (size_t i = 0; i < clean.y.size(); ++i) {
        if (i == 7 * 999 + 998 || i == 9 * 999 + 5) {
          EXPECT_TRUE(std::isnan(poisoned.y[i]));
        } else {
          ASSERT_EQ(poisoned.y[i], clean.y[i]) << i;
        }
      }
    }
  }
}

TEST(Swiglu, AllocatesNothingAfterTheFirstCall) {
  Context ctx({.threads = 1});  // one worker: mallinfo2 sees this thread's arena
  Simple call(64, 1000);
  ASSERT_TRUE(swiglu(ctx, call.args).ok());
  for (int i = 0; i < 20; ++i) {
    const struct mallinfo2 before = mallinfo2();
    ASSERT_TRUE(swiglu(ctx, call.args).ok());
    const struct mallinfo2 after = mallinfo2();
    ASSERT_EQ(after.uordblks, before.uordblks);
    ASSERT_EQ(after.hblkhd, before.hblkhd);
  }
}

TEST(Swiglu, RefusesEveryMalformedView) {
  Context ctx;
  Simple call(9, 33);
  const std::vector<test::InputView<SwigluArgs>> inputs = {{"x", &SwigluArgs::x}};
  const std::vector<test::OutputView<SwigluArgs>> outputs = {{"y", &SwigluArgs::y}};
  test::sweep_contract(call.args, inputs, outputs,
                       [&](const SwigluArgs& a) { return swiglu(ctx, a); });
}

class SwigluErrors : public ::testing::Test {
 protected:
  void expect(const char* message) {
    const Status status = swiglu(ctx_, call_.args);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_STREQ(status.message(), message);
    for (const float y : call_.y) ASSERT_EQ(y, -5.0f) << "y was written";
  }
  Context ctx_;
  Simple call_{4, 6};
};

TEST_F(SwigluErrors, OddWidth) {
  call_.args.x = {call_.x.data(), {4, 11}};
  expect("swiglu: 2I = 11 (from x) is odd, but holds gate and up");
}
TEST_F(SwigluErrors, Parameters) {
  test::expect_swiglu_refusals(
      call_.args.swiglu, [&](const std::string& wrong) { expect(("swiglu: " + wrong).c_str()); });
}
TEST_F(SwigluErrors, AnotherDType) {
  call_.args.y.dtype = DType::kBf16;
  expect("swiglu: y has dtype bf16, which is not legal here");
}

}  // namespace
}  // namespace moeops
