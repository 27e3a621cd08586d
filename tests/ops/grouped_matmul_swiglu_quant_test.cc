// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/grouped_matmul_swiglu_quant.h>
#include <moeops/ref/ref.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
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
#include "tests/support/swiglu_refusals.h"

namespace moeops {
namespace {

using test::Array;
using test::Draw;
using test::isas;
using test::SplitSmallCalls;

using Args = GroupedMatmulSwigluQuantArgs;

struct Extras {
  bool bias = true;
  bool bias_i32 = false;
  bool x_scale = true;
  bool transpose_w = false;
  int64_t x_gap = 0, q_gap = 0;
  Array::Against side = Array::Against::kBack;
};

struct Problem {
  int64_t M, K, I, E;
  Array x, w, w_scale, bias, x_scale, q, scale;
  std::vector<int64_t> list;
  Args args;
  ref::Weights weights;

  Problem(Draw& draw, int64_t m, int64_t k, int64_t i, int64_t e, std::vector<int64_t> rows,
          ListType type = ListType::kCount, const SwigluParams& swiglu = {},
          const Extras& extras = {})
      : M(m),
        K(k),
        I(i),
        E(e),
        x(DType::kS8, {M, K}, extras.x_gap, extras.side),
        w(extras.transpose_w ? Array(DType::kS8, {E, K, 2 * I}, 0, extras.side)
                             : Array(DType::kS8, {E, 2 * I, K}, 0, extras.side)),
        w_scale(DType::kF32, {E, 2 * I}, 0, extras.side),
        q(DType::kS8, {M, I}, extras.q_gap, extras.side),
        scale(DType::kF32, {M}, 0, extras.side),
        list(std::move(rows)) {
    x.set_integers(draw, -128, 127);
    w.set_integers(draw, -128, 127);
    // Gate and up deviate by 2 or so: SwiGLU's bends, and the clamp of 1.5 below, are met.
    const float unit = 1.0f / (73.0f * 73.0f * std::sqrt(static_cast<float>(K) + 1.0f));
    w_scale.set_uniform(draw, 0.5f * unit, 4.0f * unit);
    if (extras.x_scale) {
      x_scale = Array(DType::kF32, {M}, 0, extras.side);
      x_scale.set_uniform(draw, 0.1f, 2.0f);
    }
    if (extras.bias) {
      bias = Array(extras.bias_i32 ? DType::kI32 : DType::kF32, {E, 2 * I}, 0, extras.side);
      if (extras.bias_i32) {
        bias.set_integers(draw, -10000, 10000);
      } else {
        bias.set_normal(draw);
      }
    }
    weights = {w.in(), extras.transpose_w, w_scale.in()};
    args.x = x.in();
    args.list_type = type;
    const auto count = static_cast<int64_t>(list.size());
    args.group_list = type == ListType::kSparse ? ConstTensorView(list.data(), {count / 2, 2})
                                                : ConstTensorView(list.data(), {count});
    args.bias = bias.in();
    args.x_scale = x_scale.in();
    args.swiglu = swiglu;
    args.q = q.out();
    args.scale = scale.out();
  }
  Problem(const Problem&) = delete;

  PackedWeights pack() const {
    Context ctx;
    PackedWeights packed;
    const Status status = PackedWeights::pack(
        ctx, {.dtype = DType::kS8, .role = WeightRole::kGateUp, .gate = args.swiglu.gate},
        weights.w, weights.transpose_w, weights.w_scale, &packed);
    EXPECT_TRUE(status.ok()) << status.message();
    return packed;
  }

  void run(Context& ctx, const PackedWeights& packed) {
    q.fill(0xA5);
    scale.fill(0xA5);
    const Status status = grouped_matmul_swiglu_quant(ctx, packed, args);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  std::vector<char> results() const {
    std::vector<char> all = q.content();
    const std::vector<char> scales = scale.content();
    all.insert(all.end(), scales.begin(), scales.end());
    return all;
  }
};

// What the reference gives, and the values that it quantises.
struct Expected {
  Array q, scale, gate_up, h;

  explicit Expected(const Problem& p)
      : q(p.q.like()),
        scale(p.scale.like()),
        gate_up(DType::kF32, {p.M, 2 * p.I}),
        h(DType::kF32, {p.M, p.I}) {
    q.fill(0xA5);
    Args args = p.args;
    args.q = q.out();
    args.scale = scale.out();
    const Status status = ref::grouped_matmul_swiglu_quant(p.weights, args);
    EXPECT_TRUE(status.ok()) << status.message();

    GroupedMatmulArgs gemm;
    gemm.x = args.x;
    gemm.group_list = args.group_list;
    gemm.list_type = args.list_type;
    gemm.bias = args.bias;
    gemm.x_scale = args.x_scale;
    gemm.y = gate_up.out();
    EXPECT_TRUE(ref::grouped_matmul(p.weights, gemm).ok());
    EXPECT_TRUE(ref::swiglu({gate_up.in(), args.swiglu, h.out()}).ok());
  }
};

// Gate and up are bit-exact; what SwiGLU makes of them is off by some units in the last place
// (gated_error). So a scale is off by as much relatively, and a q by one where the value lies on
// the edge of rounding: within `edge` of it, in steps of the scale.
void check(const Problem& p, const Expected& expected) {
  int64_t off = 0;
  for (int64_t i = 0; i < p.M; ++i) {
    const float scale = expected.scale.row<float>(0)[i];
    double h_error = 0;
    for (int64_t j = 0; j < p.I; ++j) {
      const auto [g, u] =
          test::gate_and_up(p.args.swiglu.gate, expected.gate_up.row<float>(i), p.I, j);
      h_error = std::max(h_error, test::gated_error(p.args.swiglu, g, u, expected.h.get(i, j)));
    }
    ASSERT_NEAR(p.scale.row<float>(0)[i], scale, h_error / 127 + 2 * test::kRounding * scale)
        << "of row " << i;
    const double edge = 2 * h_error / scale + 127 * 4 * test::kRounding;
    // Unless all of the row lies in gelu_tanh's error in the negative tail.
    if (h_error > 0 && !(edge < 0.5)) continue;
    for (int64_t j = 0; j < p.I; ++j) {
      const int got = p.q.row<int8_t>(i)[j];
      const int want = expected.q.row<int8_t>(i)[j];
      if (got == want) continue;
      ++off;
      ASSERT_EQ(std::abs(got - want), 1) << "at " << i << ", " << j;
      const double steps = static_cast<double>(expected.h.get(i, j)) / scale;
      ASSERT_NEAR(std::fabs(steps - std::rint(steps)), 0.5, edge) << "at " << i << ", " << j;
    }
  }
  // At most 0.1% of the places, and one where there are few.
  ASSERT_LE(off, 1 + p.M * p.I / 1000);
  for (int64_t i = 0; i + 1 < p.M && p.I > 0; ++i) {
    for (int64_t j = p.I; j < p.q.layout().row_stride; ++j) {
      ASSERT_EQ(static_cast<uint8_t>(p.q.row<int8_t>(i)[j]), 0xA5) << "gap behind row " << i;
    }
  }
}

SwigluParams random_swiglu(Draw& draw) {
  return {
      draw.of({GatedActivation::kSilu, GatedActivation::kSwigluOai, GatedActivation::kGeluTanh}),
      draw.of({Gate::kLeft, Gate::kRight, Gate::kInterleaved}), draw.of({1.5f, 7.0f}),
      draw.of({1.702f, 1.0f})};
}

TEST(GroupedMatmulSwigluQuant, MatchesTheReferenceOnRandomProblems) {
  const SplitSmallCalls split;
  for (uint64_t round = 0; round < 250; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    const int64_t E = draw.between(0, 5);
    const int64_t I = draw.of<int64_t>({0, 1, 3, 8, 15, 16, 17, 31, 32, 33, 48, 64, 90});
    const int64_t K = draw.of<int64_t>({0, 1, 3, 7, 31, 64, 65, 128, 200});
    const auto type = draw.of({ListType::kCount, ListType::kCumsum, ListType::kSparse});
    std::vector<int64_t> list;
    int64_t rows = 0;
    const int64_t groups = E == 0 ? 0 : type == ListType::kSparse ? draw.between(0, 7) : E;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t count = draw.of<int64_t>({0, 0, 1, 2, 5, 7, 13, 40});
      rows += count;
      if (type == ListType::kSparse) list.push_back(draw.between(0, E - 1));
      list.push_back(type == ListType::kCumsum ? rows : count);
    }
    const Extras extras = {.bias = draw.flag(),
                           .bias_i32 = draw.flag(),
                           .x_scale = draw.flag(),
                           .transpose_w = draw.flag(),
                           .x_gap = draw.of<int64_t>({0, 0, 1, 5}),
                           .q_gap = draw.of<int64_t>({0, 0, 1, 9}),
                           .side = draw.of({Array::Against::kFront, Array::Against::kBack})};
    const int64_t M = rows + draw.of<int64_t>({0, 0, 1, 4});
    const SwigluParams swiglu = random_swiglu(draw);
    Problem problem(draw, M, K, I, E, list, type, swiglu, extras);
    const Expected expected(problem);
    const PackedWeights packed = problem.pack();
    std::vector<char> first;
    for (const Isa isa : isas()) {
      for (const int threads : {1, 2, 3, 7}) {
        SCOPED_TRACE(std::string(to_string(isa)) + " with " + std::to_string(threads) +
                     " workers, M " + std::to_string(problem.M) + " I " + std::to_string(I) +
                     " K " + std::to_string(K));
        Context ctx({.threads = threads, .isa = isa});
        ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
        if (first.empty()) {
          ASSERT_NO_FATAL_FAILURE(check(problem, expected));
          first = problem.results();
        }
        // The vector layer gives the same bits on every ISA, and the sums are exact.
        ASSERT_EQ(problem.results(), first);
      }
    }
  }
}

// Rows whose panels are shared out among several tasks and chunks, by whose last one they are
// quantised.
TEST(GroupedMatmulSwigluQuant, TallGroupsOfManyPanels) {
  Draw draw(3);
  Problem problem(draw, 420, 96, 300, 4, {3, 0, 400, 17});
  const Expected expected(problem);
  const PackedWeights packed = problem.pack();
  for (const Isa isa : isas()) {
    for (const int threads : {1, 2, 3, 7}) {
      Context ctx({.threads = threads, .isa = isa});
      for (int repeat = 0; repeat < 3; ++repeat) {
        ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
        ASSERT_NO_FATAL_FAILURE(check(problem, expected));
      }
    }
  }
}

TEST(GroupedMatmulSwigluQuant, ANonFiniteScaleIsItsRowsAlone) {
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    Draw draw(13);
    Problem problem(draw, 20, 96, 70, 2, {9, 11});
    const PackedWeights packed = problem.pack();
    ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
    const std::vector<char> q = problem.q.content(), scale = problem.scale.content();
    problem.x_scale.row<float>(0)[4] = NAN;
    problem.x_scale.row<float>(0)[12] = INFINITY;
    ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
    for (int64_t i = 0; i < 20; ++i) {
      if (i == 4 || i == 12) {
        EXPECT_TRUE(std::isnan(problem.scale.row<float>(0)[i]));
        for (int64_t j = 0; j < 70; ++j) EXPECT_EQ(problem.q.row<int8_t>(i)[j], 0);
      } else {
        EXPECT_EQ(0, std::memcmp(problem.scale.row<float>(0) + i, scale.data() + i * 4, 4));
        EXPECT_EQ(0, std::memcmp(problem.q.row<int8_t>(i), q.data() + i * 70, 70)) << "row " << i;
      }
    }
  }
}

TEST(GroupedMatmulSwigluQuant, SameBitsConcurrentlyAndNested) {
  const SplitSmallCalls split;
  const auto make = [] {
    Draw draw(17);
    return std::make_unique<Problem>(draw, 150, 130, 190, 3, std::vector<int64_t>{50, 0, 97});
  };
  const auto original = make();
  const PackedWeights packed = original->pack();
  Context alone({.threads = 2});
  ASSERT_NO_FATAL_FAILURE(original->run(alone, packed));
  const std::vector<char> expected = original->results();

  std::vector<std::thread> threads;
  std::vector<std::unique_ptr<Problem>> problems;
  for (size_t i = 0; i < 2; ++i) problems.push_back(make());
  for (const auto& problem : problems) {
    threads.emplace_back([&packed, &problem] {
      Context ctx({.threads = 2});
      for (int repeat = 0; repeat < 20; ++repeat) problem->run(ctx, packed);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& problem : problems) EXPECT_EQ(problem->results(), expected);

  problems.push_back(make());
#pragma omp parallel num_threads(3)
  {
    Context ctx({.threads = 2});
    problems[static_cast<size_t>(omp_get_thread_num())]->run(ctx, packed);
  }
  for (const auto& problem : problems) EXPECT_EQ(problem->results(), expected);

  omp_set_dynamic(1);  // no more threads than CPUs
  Context many({.threads = 61});
  original->run(many, packed);
  omp_set_dynamic(0);
  EXPECT_EQ(original->results(), expected);
}

TEST(GroupedMatmulSwigluQuant, AllocatesNothingAfterTheFirstCall) {
  for (const int threads : {1, 2}) {
    Draw draw(19);
    Problem problem(draw, 64, 900, 96, 4, {16, 16, 16, 16});
    const PackedWeights packed = problem.pack();
    Context ctx({.threads = threads});
    const int64_t before = test::allocation_count();
    ASSERT_TRUE(grouped_matmul_swiglu_quant(ctx, packed, problem.args).ok());
    EXPECT_EQ(test::allocation_count() > before, test::kCountsAllocations);
    for (int64_t i = 0; i <= 64; ++i) {
      std::copy_n(std::vector<int64_t>{i, 0, 64 - i, 0}.data(), 4, problem.list.data());
      const int64_t inside = test::allocation_count();
      const Status status = grouped_matmul_swiglu_quant(ctx, packed, problem.args);
      ASSERT_EQ(test::allocation_count(), inside) << "with " << threads;
      ASSERT_TRUE(status.ok()) << status.message();
    }
  }
}

// Sizes of zero in views whose data is null but whose rows have a stride.
TEST(GroupedMatmulSwigluQuant, EmptyViews) {
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    Draw draw(20);
    Problem no_sums(draw, 5, 0, 40, 2, {2, 2});
    no_sums.args.x = {nullptr, TensorLayout(DType::kS8, {5, 0}, 9)};
    ASSERT_NO_FATAL_FAILURE(no_sums.run(ctx, no_sums.pack()));
    check(no_sums, Expected(no_sums));
    Problem narrow(draw, 5, 7, 0, 2, {2, 2});
    narrow.args.q = {nullptr, TensorLayout(DType::kS8, {5, 0}, 9)};
    ASSERT_NO_FATAL_FAILURE(narrow.run(ctx, narrow.pack()));
    for (int64_t i = 0; i < 5; ++i) EXPECT_EQ(narrow.scale.row<float>(0)[i], 0.0f);
  }
}

TEST(GroupedMatmulSwigluQuant, RefusesEveryMalformedView) {
  for (const bool bias_i32 : {false, true}) {
    Draw draw(23);
    Problem problem(draw, 12, 33, 20, 3, {5, 0, 7}, ListType::kCount, {}, {.bias_i32 = bias_i32});
    Context ctx;
    const PackedWeights packed = problem.pack();
    test::sweep_contract<Args>(problem.args,
                               {{"x", &Args::x},
                                {"group_list", &Args::group_list},
                                {"bias", &Args::bias, false},
                                {"x_scale", &Args::x_scale, false}},
                               {{"q", &Args::q}, {"scale", &Args::scale}}, [&](const Args& a) {
                                 return grouped_matmul_swiglu_quant(ctx, packed, a);
                               });
  }
}

TEST(GroupedMatmulSwigluQuant, Errors) {
  Draw draw(29);
  Problem problem(draw, 10, 16, 8, 3, {3, 4, 3});
  const PackedWeights good = problem.pack();
  Context ctx;
  const std::vector<char> before = problem.results();
  const auto expect = [&](const PackedWeights& packed, const char* message) {
    test::expect_refused(grouped_matmul_swiglu_quant(ctx, packed, problem.args),
                         std::string("grouped_matmul_swiglu_quant: ") + message);
    EXPECT_EQ(problem.results(), before) << "an output was written";
  };
  const auto form = [](PackedWeightsForm f) {
    PackedWeights packed;
    EXPECT_TRUE(PackedWeights::create(f, &packed).ok());
    return packed;
  };
  expect(PackedWeights(), "weights hold nothing");
  expect(form({.dtype = DType::kS8, .experts = 3, .n = 16, .k = 16}),
         "weights are packed as plain ones, expected gate and up");
  expect(form({.experts = 3, .n = 16, .k = 16, .role = WeightRole::kGateUp}),
         "weights are f32, expected s8");
  expect(form({.dtype = DType::kS8,
               .experts = 3,
               .n = 16,
               .k = 16,
               .role = WeightRole::kGateUp,
               .scales = false}),
         "the weights have no scales");
  expect(form({.dtype = DType::kS8, .experts = 3, .n = 18, .k = 16, .role = WeightRole::kGateUp}),
         "bias.shape[1] = 16, expected 2I = 18 (from weights)");
  problem.args.swiglu.gate = Gate::kInterleaved;
  expect(good, "weights were packed with another gate layout than swiglu.gate");
  test::expect_swiglu_refusals(problem.args.swiglu,
                               [&](const std::string& wrong) { expect(good, wrong.c_str()); });
  problem.args.list_type = static_cast<ListType>(3);
  expect(good, "list_type = 3 is not one of its 3 choices");
  problem.args.list_type = static_cast<ListType>(-1);
  expect(good, "list_type = -1 is not one of its 3 choices");
  problem.args.list_type = ListType::kCount;
  problem.list[2] = 4;
  expect(good, "group_list makes more rows than there are: 7 + 4 at entry 2, M = 10");
  problem.list[2] = -1;
  expect(good, "group_list[2] = -1 is negative");
  problem.list[2] = 3;
  problem.args.q = {static_cast<int8_t*>(const_cast<void*>(good.data())), {10, 8}};
  expect(good, "output q overlaps input weights");
}

}  // namespace
}  // namespace moeops
