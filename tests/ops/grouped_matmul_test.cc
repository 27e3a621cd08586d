// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/grouped_matmul.h>
#include <moeops/ref/ref.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ops/core/team.h"
#include "ops/grouped_matmul/plan.h"
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
using test::SplitSmallCalls;

// The legal pairs of x (and w) and y.
struct Types {
  DType x, y;
};
constexpr Types kTypes[] = {{DType::kF32, DType::kF32},  {DType::kBf16, DType::kBf16},
                            {DType::kBf16, DType::kF32}, {DType::kS8, DType::kI32},
                            {DType::kS8, DType::kF32},   {DType::kS8, DType::kBf16},
                            {DType::kS8, DType::kS8}};

std::string name_of(const Types& types) {
  return std::string(to_string(types.x)) + " to " + to_string(types.y);
}

// What a problem has beside x, w, y and the list.
struct Extras {
  bool bias = true;
  bool bias_i32 = false;
  bool x_scale = true;
  bool offset = true;
  bool transpose_w = false;
  int64_t x_gap = 0, w_gap = 0, y_gap = 0;
  Array::Against side = Array::Against::kBack;
};

// What the reference gives, and before the activation.
struct Expected {
  Array y;
  Array values;  // f32
};

// A call with everything it needs to live. Values of x and w deviate by 1, s8 ones are any;
// scales bring the products of s8 to some tens.
struct Problem {
  Types types;
  int64_t M, K, N, E;
  Array x, w, w_scale, bias, x_scale, offset, y;
  std::vector<int64_t> list;
  ListType list_type = ListType::kCount;
  GroupedMatmulArgs args;
  ref::Weights weights;

  Problem(Draw& draw, Types t, int64_t m, int64_t k, int64_t n, int64_t e,
          std::vector<int64_t> rows, ListType type = ListType::kCount, const Extras& extras = {})
      : types(t), M(m), K(k), N(n), E(e), list(std::move(rows)), list_type(type) {
    const bool s8 = types.x == DType::kS8;
    const bool exact = types.y == DType::kI32;
    x = Array(types.x, {M, K}, extras.x_gap, extras.side);
    w = extras.transpose_w ? Array(types.x, {E, K, N}, extras.w_gap, extras.side)
                           : Array(types.x, {E, N, K}, extras.w_gap, extras.side);
    y = Array(types.y, {M, N}, extras.y_gap, extras.side);
    if (s8) {
      x.set_integers(draw, -128, 127);
      w.set_integers(draw, -128, 127);
    } else {
      x.set_normal(draw);
      w.set_normal(draw);
    }
    if (s8 && !exact) {
      // The sums deviate by 73^2 sqrt(K).
      const float unit = 1.0f / (73.0f * std::sqrt(static_cast<float>(K) + 1.0f));
      w_scale = Array(DType::kF32, {E, N}, 0, extras.side);
      w_scale.set_uniform(draw, 0.1f * unit, 2.0f * unit);
      if (extras.x_scale) {
        x_scale = Array(DType::kF32, {M}, 0, extras.side);
        x_scale.set_uniform(draw, 0.01f, 1.0f);
      }
    }
    if (extras.bias) {
      if (exact || (s8 && extras.bias_i32)) {
        bias = Array(DType::kI32, {E, N}, 0, extras.side);
        for (int64_t i = 0; i < E; ++i) {
          for (int64_t j = 0; j < N; ++j) {
            bias.row<int32_t>(i)[j] = static_cast<int32_t>(
                draw.of<int64_t>({draw.between(-100000, 100000), INT32_MAX, INT32_MIN}));
          }
        }
      } else {
        bias = Array(DType::kF32, {E, N}, 0, extras.side);
        bias.set_normal(draw, 3.0f);
      }
    }
    if (types.y == DType::kS8 && extras.offset) {
      offset = Array(DType::kF32, {1}, 0, extras.side);
      offset.set(0, 0, draw.uniform(-20.0f, 20.0f));
    }
    weights = {w.in(), extras.transpose_w, w_scale.in()};
    args.x = x.in();
    args.list_type = list_type;
    set_list(list);
    args.bias = bias.in();
    args.x_scale = x_scale.in();
    args.offset = offset.in();
    args.y = y.out();
  }
  Problem(const Problem&) = delete;

  void set_list(std::vector<int64_t> values) {
    list = std::move(values);
    const auto count = static_cast<int64_t>(list.size());
    args.group_list = list_type == ListType::kSparse ? ConstTensorView(list.data(), {count / 2, 2})
                                                     : ConstTensorView(list.data(), {count});
  }

  PackedWeights pack() const {
    Context ctx;
    PackedWeights packed;
    const Status status = PackedWeights::pack(ctx, {.dtype = types.x}, weights.w,
                                              weights.transpose_w, weights.w_scale, &packed);
    EXPECT_TRUE(status.ok()) << status.message();
    return packed;
  }

  // y from the optimised operator; what it does not write is 0xA5.
  void run(Context& ctx, const PackedWeights& packed) {
    y.fill(0xA5);
    const Status status = grouped_matmul(ctx, packed, args);
    ASSERT_TRUE(status.ok()) << status.message();
  }

  Expected expected() const {
    Expected result{y.like(), Array(DType::kF32, {M, N})};
    result.y.fill(0xA5);
    GroupedMatmulArgs reference = args;
    reference.y = result.y.out();
    const Status status = ref::grouped_matmul(weights, reference);
    EXPECT_TRUE(status.ok()) << status.message();
    if (!is_exact()) {
      reference.activation = Activation::kNone;
      reference.uncovered = Uncovered::kZero;
      reference.offset = {};
      reference.y = result.values.out();
      EXPECT_TRUE(ref::grouped_matmul(weights, reference).ok());
    }
    return result;
  }

  bool is_exact() const {
    return types.x == DType::kS8 &&
           (args.activation == Activation::kNone || args.activation == Activation::kRelu);
  }

  // Rows that the groups cover, each with its expert.
  std::vector<int64_t> experts_of_rows() const {
    std::vector<int64_t> experts;
    const auto count = static_cast<int64_t>(list.size());
    const int64_t step = list_type == ListType::kSparse ? 2 : 1;
    for (int64_t i = 0; i < count; i += step) {
      const auto at = static_cast<size_t>(i);
      int64_t rows = list_type == ListType::kSparse ? list[at + 1] : list[at];
      if (list_type == ListType::kCumsum && i > 0) rows -= list[at - 1];
      experts.insert(experts.end(), static_cast<size_t>(rows),
                     list_type == ListType::kSparse ? list[at] : i);
    }
    return experts;
  }

  // How far each element of y may be from the reference's: what gemm_error.h derives, by the sum
  // before the activation. Without s8, also the error of the sum itself.
  void expect_close(const Expected& reference) const {
    const std::vector<int64_t> experts = experts_of_rows();
    const std::vector<double> x_norms = test::row_norms(x.in(), false);
    const std::vector<double> w_norms = test::row_norms(w.in(), weights.transpose_w);
    Array rest = y.like();  // as y, but for what was compared
    std::memcpy(rest.data(), y.data(), y.bytes());
    for (int64_t i = 0; i < static_cast<int64_t>(experts.size()); ++i) {
      const int64_t e = experts[static_cast<size_t>(i)];
      for (int64_t j = 0; j < N; ++j) {
        const double v = reference.values.get(i, j);
        double error = 0;
        if (types.x != DType::kS8) {
          error = test::sum_error(K, x_norms[static_cast<size_t>(i)],
                                  w_norms[static_cast<size_t>(e * N + j)]) +
                  test::kRoundings * std::fabs(v);  // of the bias, on either side
        }
        error = test::activation_error(args.activation, v, error);
        const double want = reference.y.get(i, j);
        ASSERT_NEAR(y.get(i, j), want, test::stored_error(types.y, want, error))
            << "at " << i << ", " << j << ", before the activation " << v;
        std::memcpy(rest.data() + (i * y.layout().row_stride + j) * size_of(types.y),
                    reference.y.data() + (i * y.layout().row_stride + j) * size_of(types.y),
                    static_cast<size_t>(size_of(types.y)));
      }
    }
    ASSERT_TRUE(rest.same_bits(reference.y)) << "other rows, or gaps between them";
  }

  void check(const Expected& reference) const {
    if (is_exact()) {
      ASSERT_TRUE(y.same_bits(reference.y));
    } else {
      ASSERT_NO_FATAL_FAILURE(expect_close(reference));
    }
  }
};

// Random small problems with every option against the reference, on every ISA and several worker
// counts, inputs and outputs between guard pages, at odd starts and with wide rows.
TEST(GroupedMatmul, MatchesTheReferenceOnRandomProblems) {
  const SplitSmallCalls split;
  for (uint64_t round = 0; round < 500; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    const Types types = kTypes[draw.between(0, std::ssize(kTypes) - 1)];
    const int64_t E = draw.between(0, 6);
    const int64_t N = draw.of<int64_t>({0, 1, 3, 16, 31, 32, 33, 48, 49, 63, 64, 65, 96, 130});
    const int64_t K = draw.of<int64_t>({0, 1, 2, 3, 7, 31, 63, 64, 65, 128, 200});

    const auto type = draw.of({ListType::kCount, ListType::kCumsum, ListType::kSparse});
    std::vector<int64_t> list;
    int64_t rows = 0;
    const int64_t groups = E == 0 ? 0 : type == ListType::kSparse ? draw.between(0, 8) : E;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t count = draw.of<int64_t>({0, 0, 1, 2, 5, 6, 7, 13, 40});
      rows += count;
      if (type == ListType::kSparse) list.push_back(draw.between(0, E - 1));
      list.push_back(type == ListType::kCumsum ? rows : count);
    }
    const int64_t M = rows + draw.of<int64_t>({0, 0, 1, 4});
    const Extras extras = {.bias = draw.flag(),
                           .bias_i32 = draw.flag(),
                           .x_scale = draw.flag(),
                           .offset = draw.flag(),
                           .transpose_w = draw.flag(),
                           .x_gap = draw.of<int64_t>({0, 0, 1, 5}),
                           .w_gap = draw.of<int64_t>({0, 0, 3}),
                           .y_gap = draw.of<int64_t>({0, 0, 1, 9}),
                           .side = draw.of({Array::Against::kFront, Array::Against::kBack})};
    Problem problem(draw, types, M, K, N, E, list, type, extras);
    if (types.y != DType::kI32) {
      problem.args.activation =
          draw.of({Activation::kNone, Activation::kRelu, Activation::kGeluTanh, Activation::kSilu});
    }
    problem.args.uncovered = draw.of({Uncovered::kZero, Uncovered::kKeep});

    const Expected expected = problem.expected();
    const PackedWeights packed = problem.pack();
    for (const Isa isa : isas()) {
      SCOPED_TRACE(name_of(types) + " on " + to_string(isa) + " M " + std::to_string(M) + " N " +
                   std::to_string(N) + " K " + std::to_string(K));
      std::vector<char> first;
      for (const int threads : {1, 2, 3, 7}) {
        Context ctx({.threads = threads, .isa = isa});
        ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
        if (threads == 1) {
          ASSERT_NO_FATAL_FAILURE(problem.check(expected));
          first = problem.y.content();
        }
        ASSERT_EQ(problem.y.content(), first) << "with " << threads << " workers";
      }
    }
  }
}

// A K of several blocks and rows of several chunks and tasks, whatever the machine's caches.
TEST(GroupedMatmul, LongSumsAndTallGroups) {
  for (const Types& types : kTypes) {
    SCOPED_TRACE(name_of(types));
    if (types.y == DType::kF32 && types.x != DType::kF32) continue;  // as into bf16
    Draw draw(3);
    // 200 chunks of 64 bytes: with a block of 256 KiB, and more in L2, two and more blocks.
    const int64_t K = 12800 / size_of(types.x) + 1;
    const int64_t tall = 110;
    Problem problem(draw, types, tall + 5, K, 33, 4, {1, 0, tall, 4});
    const Expected expected = problem.expected();
    const PackedWeights packed = problem.pack();
    for (const Isa isa : isas()) {
      SCOPED_TRACE(to_string(isa));
      Context one({.threads = 1, .isa = isa});
      Context three({.threads = 3, .isa = isa});
      ASSERT_NO_FATAL_FAILURE(problem.run(one, packed));
      ASSERT_NO_FATAL_FAILURE(problem.check(expected));
      const std::vector<char> first = problem.y.content();
      ASSERT_NO_FATAL_FAILURE(problem.run(three, packed));
      EXPECT_EQ(problem.y.content(), first);
    }
  }
}

// A few rows, whose kernels may take several panels at once, with a K of several blocks and a last
// panel of another width; and an output that is too large for the caches, whose rows start at every
// alignment.
TEST(GroupedMatmul, ManyPanels) {
  for (const Types& types : kTypes) {
    SCOPED_TRACE(name_of(types));
    if (types.y == DType::kF32 && types.x != DType::kF32) continue;  // as into bf16
    Draw draw(4);
    const int64_t K = 8320 / size_of(types.x) + 1;  // 131 chunks
    std::vector<std::unique_ptr<Problem>> problems;
    problems.push_back(
        std::make_unique<Problem>(draw, types, 37, K, 266, 4, std::vector<int64_t>{1, 17, 0, 19}));
    if (types.y == DType::kF32 || (types.x == DType::kS8 && types.y == DType::kBf16)) {
      const int64_t rows = (int64_t{8} << 20) / (1031 * size_of(types.y)) + 40;
      problems.push_back(std::make_unique<Problem>(draw, types, rows, 2, 1031, 2,
                                                   std::vector<int64_t>{rows - 40, 40},
                                                   ListType::kCount, Extras{.y_gap = 1}));
    }
    for (const auto& problem : problems) {
      const Expected expected = problem->expected();
      const PackedWeights packed = problem->pack();
      std::vector<Isa> rungs = isas();
      if (problem->K == 2) rungs = {Isa::kAvx2, machine().isa};
      for (const Isa isa : rungs) {
        if (isa > machine().isa) continue;
        SCOPED_TRACE(to_string(isa));
        Context one({.threads = 1, .isa = isa});
        Context three({.threads = 3, .isa = isa});
        ASSERT_NO_FATAL_FAILURE(problem->run(one, packed));
        ASSERT_NO_FATAL_FAILURE(problem->check(expected));
        const std::vector<char> first = problem->y.content();
        ASSERT_NO_FATAL_FAILURE(problem->run(three, packed));
        EXPECT_TRUE(problem->y.content() == first);
      }
    }
  }
}

// The largest sums that there are: K = 65536 of +-127 and -128. What x + 128 in the dot
// instructions' operand comes to nearly fills s32.
TEST(GroupedMatmul, TheLargestSumsAreExact) {
  constexpr int64_t kK = 65536, kN = 34;
  const std::vector<int8_t> fills = {127, -128, -127};
  const auto rows = static_cast<int64_t>(fills.size()) + 2;
  for (const DType y : {DType::kI32, DType::kF32}) {
    Draw draw(5);
    Problem problem(draw, {DType::kS8, y}, rows, kK, kN, 1, {rows}, ListType::kCount,
                    {.bias = false});
    const auto fill = [&](Array& a, int64_t i) {
      const auto n = static_cast<int64_t>(fills.size());
      for (int64_t k = 0; k < kK; ++k) {
        // Of one value, then alternating, then random.
        const int64_t which = i < n ? i : i == n ? k % 2 : draw.between(0, n - 1);
        a.row<int8_t>(i)[k] = fills[static_cast<size_t>(which)];
      }
    };
    for (int64_t i = 0; i < rows; ++i) fill(problem.x, i);
    for (int64_t i = 0; i < kN; ++i) fill(problem.w, i);
    const Expected expected = problem.expected();
    if (y == DType::kI32) {
      EXPECT_EQ(expected.y.row<int32_t>(1)[1], 1 << 30);
    }
    const PackedWeights packed = problem.pack();
    for (const Isa isa : isas()) {
      Context ctx({.isa = isa});
      ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
      EXPECT_TRUE(problem.y.same_bits(expected.y)) << to_string(isa);
    }
  }
}

TEST(GroupedMatmul, PlansAreWholeTilesAndIgnoreTheRouting) {
  using namespace grouped_matmul_internal;
  for (const int64_t rows : {int64_t{1}, int64_t{7}, int64_t{128}, int64_t{100000}}) {
    for (const int64_t panels : {0, 1, 112}) {
      for (const int64_t k_chunks :
           {int64_t{0}, int64_t{1}, int64_t{64}, int64_t{112}, int64_t{1563}, int64_t{1} << 54}) {
        for (const int64_t l2 : {int64_t{0}, int64_t{1} << 18, int64_t{1} << 21}) {
          for (const int row_block : {1, 6, 16}) {
            grouped_matmul_internal::Problem problem = {.max_rows = rows,
                                                        .groups = {rows, 1},
                                                        .panels = panels,
                                                        .k_chunks = k_chunks,
                                                        .row_block = row_block,
                                                        .tile_rows = 4 * row_block,
                                                        .panels_together = 4,
                                                        .l2_bytes = l2,
                                                        .workers = 2};
            const Plan plan = make_plan(problem);
            EXPECT_GT(plan.k_block, 0);
            EXPECT_GT(plan.chunk_rows, 0);
            EXPECT_EQ(plan.chunk_rows % row_block, 0);
            EXPECT_GT(plan.task_panels, 0);
            EXPECT_LE(plan.task_panels, std::max<int64_t>(panels, 1));
            problem.groups = {rows / 2, std::min<int64_t>(rows, 256)};
            const Plan other = make_plan(problem);
            EXPECT_EQ(plan.chunk_rows, other.chunk_rows);
            EXPECT_EQ(plan.k_block, other.k_block);
          }
        }
      }
    }
  }
}

// The bits of a row do not depend on its company.
TEST(GroupedMatmul, ARowAloneHasTheSameBits) {
  for (const Types& types : kTypes) {
    Draw draw(11);
    Problem together(draw, types, 53, 200, 161, 1, {53});
    const PackedWeights packed = together.pack();
    for (const Isa isa : isas()) {
      Context ctx({.isa = isa});
      ASSERT_NO_FATAL_FAILURE(together.run(ctx, packed));
      for (int64_t row = 0; row < together.M; ++row) {
        const int64_t one = 1;
        Array alone(types.y, {1, together.N});
        GroupedMatmulArgs args = together.args;
        args.x = {together.x.data() + row * together.K * size_of(types.x),
                  TensorLayout(types.x, {1, together.K})};
        if (together.x_scale.present()) args.x_scale = {together.x_scale.row<float>(0) + row, {1}};
        args.group_list = {&one, {1}};
        args.y = alone.out();
        ASSERT_TRUE(grouped_matmul(ctx, packed, args).ok());
        ASSERT_EQ(0, std::memcmp(alone.data(),
                                 together.y.row<char>(0) + row * together.N * size_of(types.y),
                                 alone.bytes()))
            << name_of(types) << " on " << to_string(isa) << " row " << row;
      }
    }
  }
}

TEST(GroupedMatmul, ANaNStaysInItsRowAndColumn) {
  for (const Types& types : {kTypes[0], kTypes[2], kTypes[4]}) {
    for (const Isa isa : isas()) {
      SCOPED_TRACE(name_of(types) + " on " + to_string(isa));
      Context ctx({.isa = isa});
      Draw draw(13);
      Problem problem(draw, types, 20, 96, 70, 2, {9, 11});
      ASSERT_NO_FATAL_FAILURE(problem.run(ctx, problem.pack()));
      const Array clean = problem.y.like();
      std::memcpy(clean.data(), problem.y.data(), clean.bytes());
      if (types.x == DType::kS8) {
        problem.x_scale.row<float>(0)[4] = NAN;        // row 4
        problem.w_scale.row<float>(1)[66] = INFINITY;  // column 66 of the second expert
      } else {
        problem.x.set(4, 17, NAN);
        problem.w.set(70 + 66, 0, INFINITY);
      }
      ASSERT_NO_FATAL_FAILURE(problem.run(ctx, problem.pack()));
      for (int64_t row = 0; row < 20; ++row) {
        for (int64_t n = 0; n < 70; ++n) {
          const float got = problem.y.get(row, n);
          if (row == 4) {
            EXPECT_TRUE(std::isnan(got));
          } else if (row >= 9 && n == 66) {
            EXPECT_TRUE(std::isinf(got) || std::isnan(got));  // 0 * inf where a sum is 0
          } else {
            EXPECT_EQ(got, clean.get(row, n)) << "at " << row << "," << n;
          }
        }
      }
    }
  }
}

// A NaN that an s8 output would have to hold is 0.
TEST(GroupedMatmul, ANaNBecomesZeroInS8) {
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    Draw draw(14);
    Problem problem(draw, {DType::kS8, DType::kS8}, 3, 64, 40, 1, {3});
    problem.x_scale.row<float>(0)[1] = NAN;
    const Expected expected = problem.expected();
    ASSERT_NO_FATAL_FAILURE(problem.run(ctx, problem.pack()));
    EXPECT_TRUE(problem.y.same_bits(expected.y)) << to_string(isa);
    EXPECT_EQ(problem.y.get(1, 7), 0.0f);
  }
}

// Contexts on several threads at once, calls inside the caller's parallel region, and a runtime
// that gives smaller teams than were asked for.
TEST(GroupedMatmul, SameBitsConcurrentlyAndNested) {
  const SplitSmallCalls split;
  for (const Types& types : kTypes) {
    SCOPED_TRACE(name_of(types));
    const auto make = [&] {
      Draw draw(17);
      return std::make_unique<Problem>(draw, types, 150, 130, 190, 3,
                                       std::vector<int64_t>{50, 0, 97});
    };
    const auto original = make();
    const PackedWeights packed = original->pack();
    Context alone({.threads = 2});
    ASSERT_NO_FATAL_FAILURE(original->run(alone, packed));
    const std::vector<char> expected = original->y.content();

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
    for (const auto& problem : problems) EXPECT_EQ(problem->y.content(), expected);

    problems.push_back(make());
#pragma omp parallel num_threads(3)
    {
      Context ctx({.threads = 2});
      problems[static_cast<size_t>(omp_get_thread_num())]->run(ctx, packed);
    }
    for (const auto& problem : problems) EXPECT_EQ(problem->y.content(), expected);

    omp_set_dynamic(1);  // no more threads than CPUs
    Context many({.threads = 61});
    original->run(many, packed);
    omp_set_dynamic(0);
    EXPECT_EQ(original->y.content(), expected);
  }
}

// Once a shape was seen, nothing is allocated, whatever the routing.
TEST(GroupedMatmul, AllocatesNothingAfterTheFirstCall) {
  for (const Types& types : kTypes) {
    for (const int threads : {1, 2}) {
      Draw draw(19);
      Problem problem(draw, types, 64, 900, 96, 4, {16, 16, 16, 16});
      const PackedWeights packed = problem.pack();
      Context ctx({.threads = threads});
      const int64_t before = test::allocation_count();
      ASSERT_TRUE(grouped_matmul(ctx, packed, problem.args).ok());
      EXPECT_EQ(test::allocation_count() > before, test::kCountsAllocations);
      for (int64_t i = 0; i <= 64; ++i) {
        std::copy_n(std::vector<int64_t>{i, 0, 64 - i, 0}.data(), 4, problem.list.data());
        const int64_t inside = test::allocation_count();
        const Status status = grouped_matmul(ctx, packed, problem.args);
        ASSERT_EQ(test::allocation_count(), inside) << name_of(types) << " with " << threads;
        ASSERT_TRUE(status.ok()) << status.message();
      }
    }
  }
}

// Sizes of zero in views whose data is null but whose rows have a stride.
TEST(GroupedMatmul, EmptyViews) {
  for (const Types& types : kTypes) {
    SCOPED_TRACE(name_of(types));
    Draw draw(20);
    Problem problem(draw, types, 5, 0, 40, 2, {2, 2});
    problem.args.x = {nullptr, TensorLayout(types.x, {5, 0}, 9)};
    const Expected expected = problem.expected();
    const PackedWeights packed = problem.pack();
    for (const Isa isa : isas()) {
      Context ctx({.isa = isa});
      ASSERT_NO_FATAL_FAILURE(problem.run(ctx, packed));
      problem.check(expected);
    }
    Problem narrow(draw, types, 5, 7, 0, 2, {2, 2});
    narrow.args.y = {nullptr, TensorLayout(types.y, {5, 0}, 9)};
    narrow.args.bias = {};
    Context ctx;
    EXPECT_TRUE(grouped_matmul(ctx, narrow.pack(), narrow.args).ok());
  }
}

TEST(GroupedMatmul, RefusesEveryMalformedView) {
  for (const Types& types : kTypes) {
    for (const bool bias_i32 : {false, true}) {
      SCOPED_TRACE(name_of(types));
      Draw draw(23);
      Problem problem(draw, types, 12, 33, 40, 3, {5, 0, 7}, ListType::kCount,
                      {.bias_i32 = bias_i32});
      Context ctx;
      const PackedWeights packed = problem.pack();
      std::vector<test::InputView<GroupedMatmulArgs>> inputs = {
          {"x", &GroupedMatmulArgs::x},
          {"group_list", &GroupedMatmulArgs::group_list},
          {"bias", &GroupedMatmulArgs::bias, false}};
      if (problem.x_scale.present())
        inputs.push_back({"x_scale", &GroupedMatmulArgs::x_scale, false});
      if (problem.offset.present()) inputs.push_back({"offset", &GroupedMatmulArgs::offset, false});
      const std::vector<test::OutputView<GroupedMatmulArgs>> outputs = {
          {"y", &GroupedMatmulArgs::y}};
      test::sweep_contract(problem.args, inputs, outputs, [&](const GroupedMatmulArgs& a) {
        return grouped_matmul(ctx, packed, a);
      });
    }
  }
}

class GroupedMatmulErrors : public ::testing::Test {
 protected:
  GroupedMatmulErrors() : draw_(29) { make({DType::kF32, DType::kF32}); }
  void make(Types types, const Extras& extras = {}) {
    problem_ = std::make_unique<Problem>(draw_, types, 10, 16, 8, 3, std::vector<int64_t>{3, 4, 3},
                                         ListType::kCount, extras);
    packed_ = problem_->pack();
  }
  GroupedMatmulArgs& args() { return problem_->args; }
  void expect(const char* message) {
    problem_->y.fill(0xA5);
    const std::vector<char> before = problem_->y.content();
    test::expect_refused(grouped_matmul(ctx_, packed_, args()), message);
    EXPECT_EQ(problem_->y.content(), before) << "y was written";
  }

  Draw draw_;
  std::unique_ptr<Problem> problem_;
  Context ctx_;
  PackedWeights packed_;
  float floats_[80] = {};
  int32_t ints_[24] = {};
};

TEST_F(GroupedMatmulErrors, NegativeCount) {
  problem_->list[1] = -4;
  expect("grouped_matmul: group_list[1] = -4 is negative");
}
TEST_F(GroupedMatmulErrors, MoreRowsThanThereAre) {
  problem_->list[2] = 4;
  expect("grouped_matmul: group_list makes more rows than there are: 7 + 4 at entry 2, M = 10");
}
TEST_F(GroupedMatmulErrors, CountsThatOverflow) {
  problem_->set_list({INT64_MAX, INT64_MAX, 2});
  expect(
      "grouped_matmul: group_list makes more rows than there are: 0 + 9223372036854775807 at "
      "entry 0, M = 10");
}
TEST_F(GroupedMatmulErrors, DecreasingCumsum) {
  args().list_type = ListType::kCumsum;
  problem_->set_list({5, 3, 10});
  expect("grouped_matmul: group_list[1] = 3 is less than the 5 before it");
  problem_->set_list({5, INT64_MIN, 10});
  expect("grouped_matmul: group_list[1] = -9223372036854775808 is less than the 5 before it");
}
TEST_F(GroupedMatmulErrors, ExpertOutOfRange) {
  args().list_type = problem_->list_type = ListType::kSparse;
  problem_->set_list({2, 3, 3, 1});
  expect("grouped_matmul: group_list[1,0] = 3 is not in [0, 3)");
  problem_->set_list({2, 3, -1, 1});
  expect("grouped_matmul: group_list[1,0] = -1 is not in [0, 3)");
  problem_->set_list({2, 3, 1, -1});
  expect("grouped_matmul: group_list[1,1] = -1 is negative");
}
TEST_F(GroupedMatmulErrors, ValuesThatAreNoEnumerators) {
  args().activation = static_cast<Activation>(4);
  expect("grouped_matmul: activation = 4 is not one of its 4 choices");
  args().activation = static_cast<Activation>(-1);
  expect("grouped_matmul: activation = -1 is not one of its 4 choices");
  args().activation = Activation::kNone;
  args().uncovered = static_cast<Uncovered>(2);
  expect("grouped_matmul: uncovered = 2 is not one of its 2 choices");
  args().uncovered = static_cast<Uncovered>(-1);
  expect("grouped_matmul: uncovered = -1 is not one of its 2 choices");
  args().uncovered = Uncovered::kZero;
  args().list_type = static_cast<ListType>(3);
  expect("grouped_matmul: list_type = 3 is not one of its 3 choices");
  args().list_type = static_cast<ListType>(-1);
  expect("grouped_matmul: list_type = -1 is not one of its 3 choices");
}
TEST_F(GroupedMatmulErrors, OutputInTheWeights) {
  args().y = {static_cast<float*>(const_cast<void*>(packed_.data())), {10, 8}};
  expect("grouped_matmul: output y overlaps input weights");
}
TEST_F(GroupedMatmulErrors, WrongWeights) {
  packed_ = PackedWeights();
  expect("grouped_matmul: weights hold nothing");
  ASSERT_TRUE(
      PackedWeights::create({.experts = 3, .n = 8, .k = 16, .role = WeightRole::kGateUp}, &packed_)
          .ok());
  expect("grouped_matmul: weights are packed as gate and up, expected plain ones");
  ASSERT_TRUE(
      PackedWeights::create({.dtype = DType::kBf16, .experts = 3, .n = 8, .k = 16}, &packed_).ok());
  expect("grouped_matmul: x is f32, but the weights are bf16");
  ASSERT_TRUE(PackedWeights::create({.experts = 4, .n = 8, .k = 16}, &packed_).ok());
  expect("grouped_matmul: group_list.shape[0] = 3, expected E = 4 (from weights)");
  ASSERT_TRUE(PackedWeights::create({.experts = 3, .n = 9, .k = 16}, &packed_).ok());
  args().bias = {};
  expect("grouped_matmul: y.shape[1] = 8, expected N = 9 (from weights)");
  ASSERT_TRUE(PackedWeights::create({.experts = 3, .n = 8, .k = 15}, &packed_).ok());
  expect("grouped_matmul: x.shape[1] = 16, expected K = 15 (from weights)");
}
TEST_F(GroupedMatmulErrors, FloatsTakeNoScalesAndFewOutputs) {
  for (const Types& types : {kTypes[0], kTypes[1], kTypes[2]}) {
    make(types);
    args().x_scale = {floats_, {10}};
    expect("grouped_matmul: x_scale is given, but x is not s8");
    args().x_scale = {};
    args().offset = {floats_, {1}};
    expect("grouped_matmul: offset is given, but y is not s8");
    args().offset = {};
    args().bias = {ints_, {3, 8}};
    expect((std::string("grouped_matmul: bias is i32, but x is ") + to_string(types.x)).c_str());
    args().bias = {};
    for (const DType y : {DType::kS8, DType::kI32, DType::kBf16}) {
      if (y == DType::kBf16 && types.x == DType::kBf16) continue;
      args().y = {floats_, TensorLayout(y, {10, 8})};
      expect(
          (std::string("grouped_matmul: x is ") + to_string(types.x) + ", but y is " + to_string(y))
              .c_str());
    }
    args().y = {floats_, TensorLayout(DType::kF16, {10, 8})};
    expect("grouped_matmul: y has dtype f16, which is not legal here");
  }
}
TEST_F(GroupedMatmulErrors, ExactIntegersTakeNothingElse) {
  make({DType::kS8, DType::kI32});
  args().x_scale = {floats_, {10}};
  expect("grouped_matmul: x_scale is given, but y is i32");
  args().x_scale = {};
  args().offset = {floats_, {1}};
  expect("grouped_matmul: offset is given, but y is not s8");
  args().offset = {};
  args().activation = Activation::kRelu;
  expect("grouped_matmul: activation is given, but y is i32");
  args().activation = Activation::kNone;
  args().bias = {floats_, {3, 8}};
  expect("grouped_matmul: bias is f32, but y is i32");
  args().bias = {};
  // A pack without scales is for i32 alone.
  args().y = {floats_, {10, 8}};
  expect("grouped_matmul: the weights have no scales");
}
TEST_F(GroupedMatmulErrors, ScaledIntegers) {
  make({DType::kS8, DType::kF32});
  args().offset = {floats_, {1}};
  expect("grouped_matmul: offset is given, but y is not s8");
  args().offset = {};
  args().y = {reinterpret_cast<int32_t*>(floats_), {10, 8}};
  expect("grouped_matmul: the weights have scales, but y is i32");
}
// A stride that in bytes is beyond 63 bits, though a single row has no use for it.
TEST_F(GroupedMatmulErrors, AbsurdStrideOfASingleRow) {
  args().x = {problem_->x.row<float>(0), {1, 16}, INT64_MAX / 2};
  expect("grouped_matmul: x: the product of its sizes overflows");
}

}  // namespace
}  // namespace moeops
