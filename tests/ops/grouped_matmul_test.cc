// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <malloc.h>
#include <moeops/ops/grouped_matmul.h>
#include <moeops/ref/ref.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "ops/grouped_matmul/kernels.h"
#include "ops/grouped_matmul/plan.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/guarded_buffer.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::GuardedBuffer;

std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (int i = 0; i <= static_cast<int>(machine().isa); ++i) all.push_back(static_cast<Isa>(i));
  return all;
}

std::vector<float> normal(std::mt19937_64& random, int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = distribution(random);
  return values;
}

// A call with everything it needs to live.
struct Problem {
  int64_t M, K, N, E;
  std::vector<float> x, w, bias, y;
  std::vector<int64_t> group_list;
  GroupedMatmulArgs args;
  ref::Weights weights;

  Problem(std::mt19937_64& random, int64_t m, int64_t k, int64_t n, std::vector<int64_t> rows)
      : M(m), K(k), N(n), E(static_cast<int64_t>(rows.size())), group_list(std::move(rows)) {
    x = normal(random, M * K);
    w = normal(random, E * N * K);
    bias = normal(random, E * N);
    y.assign(static_cast<size_t>(M * N), NAN);
    args.x = {x.data(), {M, K}};
    args.group_list = {group_list.data(), {E}};
    args.bias = {bias.data(), {E, N}};
    args.y = {y.data(), {M, N}};
    weights.w = {w.data(), {E, N, K}};
  }

  PackedWeights pack(Context& ctx) const {
    PackedWeights packed;
    const Status status = PackedWeights::pack(ctx, weights.w, weights.transpose_w, &packed);
    EXPECT_TRUE(status.ok()) << status.message();
    return packed;
  }

  std::vector<float> run(Context& ctx) {
    const PackedWeights packed = pack(ctx);
    std::fill(y.begin(), y.end(), NAN);
    const Status status = grouped_matmul(ctx, packed, args);
    EXPECT_TRUE(status.ok()) << status.message();
    return y;
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Draw {
  explicit Draw(uint64_t seed) : random(seed) {}
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return *(choices.begin() + between(0, static_cast<int64_t>(choices.size()) - 1));
  }
  std::mt19937_64 random;
};

// Random small problems with every option against the reference, on every ISA and several worker
// counts, inputs and outputs between guard pages, at odd starts and with wide rows.
TEST(GroupedMatmul, MatchesTheReferenceOnRandomProblems) {
  for (uint64_t round = 0; round < 250; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    const int64_t E = draw.between(0, 6);
    const int64_t N = draw.of<int64_t>({0, 1, 3, 16, 31, 32, 33, 48, 49, 63, 64, 65, 96, 130});
    const int64_t K = draw.of<int64_t>({0, 1, 2, 7, 63, 64, 65, 128, 200});
    const int64_t x_stride = K + draw.of<int64_t>({0, 0, 1, 5});
    const int64_t y_stride = N + draw.of<int64_t>({0, 0, 1, 9});

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

    const auto side = draw.of({GuardedBuffer::Against::kFront, GuardedBuffer::Against::kBack});
    const auto floats = [&](int64_t matrix_rows, int64_t columns, int64_t stride) {
      return static_cast<size_t>(
                 matrix_rows == 0 || columns == 0 ? 0 : (matrix_rows - 1) * stride + columns) *
             sizeof(float);
    };
    const GuardedBuffer x(floats(M, K, x_stride), side);
    const GuardedBuffer y(floats(M, N, y_stride), side);
    const std::vector<float> values = normal(draw.random, static_cast<int64_t>(x.bytes() / 4));
    std::copy(values.begin(), values.end(), x.as<float>());

    const bool transpose_w = draw.of({false, true});
    const std::vector<float> w = normal(draw.random, E * N * K);
    const std::vector<float> bias = normal(draw.random, E * N);
    ref::Weights weights;
    weights.transpose_w = transpose_w;
    weights.w =
        transpose_w ? ConstTensorView(w.data(), {E, K, N}) : ConstTensorView(w.data(), {E, N, K});

    GroupedMatmulArgs args;
    args.x = {x.as<float>(), {M, K}, x_stride};
    args.list_type = type;
    args.group_list = type == ListType::kSparse ? ConstTensorView(list.data(), {groups, 2})
                                                : ConstTensorView(list.data(), {E});
    if (draw.of({false, true})) args.bias = {bias.data(), {E, N}};
    args.activation =
        draw.of({Activation::kNone, Activation::kRelu, Activation::kGeluTanh, Activation::kSilu});
    args.uncovered = draw.of({Uncovered::kZero, Uncovered::kKeep});

    std::vector<float> expected(y.bytes() / sizeof(float), -7.0f);
    args.y = {expected.data(), {M, N}, y_stride};
    const Status reference = ref::grouped_matmul(weights, args);
    ASSERT_TRUE(reference.ok()) << reference.message();

    args.y = {y.as<float>(), {M, N}, y_stride};
    for (const Isa isa : isas()) {
      std::vector<float> first;
      for (const int threads : {1, 2, 3, 7}) {
        Context ctx({.threads = threads, .isa = isa});
        PackedWeights packed;
        const Status status = PackedWeights::pack(ctx, weights.w, transpose_w, &packed);
        ASSERT_TRUE(status.ok()) << status.message();
        std::fill_n(y.as<float>(), expected.size(), -7.0f);
        const Status ran = grouped_matmul(ctx, packed, args);
        ASSERT_TRUE(ran.ok()) << ran.message();
        const std::vector<float> got(y.as<float>(), y.as<float>() + expected.size());
        if (threads == 1) {
          first = got;
          // |x w| sums to about K; every rounding of the f32 chain is below 2^-24 of that.
          const float bound = 1e-6f + static_cast<float>(K + 8) * 0x1p-22f;
          for (size_t i = 0; i < got.size(); ++i) {
            ASSERT_NEAR(got[i], expected[i], bound * (1.0f + std::fabs(expected[i])))
                << to_string(isa) << " at " << i << " M " << M << " N " << N << " K " << K;
          }
        }
        ASSERT_TRUE(same_bits(got, first)) << to_string(isa) << " with " << threads << " workers";
      }
    }
  }
}

// A K of several blocks and rows of several chunks and tasks, whatever the machine's caches.
TEST(GroupedMatmul, LongSumsAndTallGroups) {
  std::mt19937_64 random(3);
  Problem problem(random, 1500, 5000, 65, {1, 0, 1300, 199});
  std::vector<float> expected(problem.y.size());
  GroupedMatmulArgs args = problem.args;
  args.y = {expected.data(), {problem.M, problem.N}};
  ASSERT_TRUE(ref::grouped_matmul(problem.weights, args).ok());
  for (const Isa isa : isas()) {
    Context one({.threads = 1, .isa = isa});
    Context three({.threads = 3, .isa = isa});
    const std::vector<float> got = problem.run(one);
    EXPECT_TRUE(same_bits(got, problem.run(three))) << to_string(isa);
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], 2e-3) << to_string(isa) << " at " << i;
    }
  }
}

TEST(GroupedMatmul, PlansAreWholeTilesAndIgnoreTheRouting) {
  using namespace grouped_matmul_internal;
  for (const int64_t rows : {1, 7, 128, 100000}) {
    for (const int64_t panels : {0, 1, 112}) {
      for (const int64_t k_chunks : {0, 1, 64, 112, 1563}) {
        for (const int64_t l2 : {0, 1 << 18, 1 << 21}) {
          for (const int tile_rows : {6, 24, 32}) {
            grouped_matmul_internal::Problem problem = {rows,      {rows, 1}, panels, k_chunks,
                                                        tile_rows, l2,        2};
            const Plan plan = make_plan(problem);
            EXPECT_GT(plan.k_block, 0);
            EXPECT_GT(plan.chunk_rows, 0);
            EXPECT_EQ(plan.chunk_rows % tile_rows, 0);
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
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    std::mt19937_64 random(11);
    Problem together(random, 29, 200, 161, {29});
    const std::vector<float> all = together.run(ctx);
    const PackedWeights packed = together.pack(ctx);
    for (int64_t row = 0; row < together.M; ++row) {
      const int64_t one = 1;
      std::vector<float> alone(static_cast<size_t>(together.N));
      GroupedMatmulArgs args = together.args;
      args.x = {together.x.data() + row * together.K, {1, together.K}};
      args.group_list = {&one, {1}};
      args.y = {alone.data(), {1, together.N}};
      ASSERT_TRUE(grouped_matmul(ctx, packed, args).ok());
      ASSERT_EQ(
          0, std::memcmp(alone.data(), all.data() + row * together.N, alone.size() * sizeof(float)))
          << to_string(isa) << " row " << row;
    }
  }
}

TEST(GroupedMatmul, ANaNStaysInItsRowAndColumn) {
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    std::mt19937_64 random(13);
    Problem problem(random, 20, 96, 70, {9, 11});
    const std::vector<float> clean = problem.run(ctx);
    problem.x[4 * 96 + 17] = NAN;              // row 4
    problem.w[(1 * 70 + 66) * 96] = INFINITY;  // column 66 of the second expert
    const std::vector<float> got = problem.run(ctx);
    for (int64_t row = 0; row < 20; ++row) {
      for (int64_t n = 0; n < 70; ++n) {
        const auto at = static_cast<size_t>(row * 70 + n);
        if (row == 4) {
          EXPECT_TRUE(std::isnan(got[at]));
        } else if (row >= 9 && n == 66) {
          EXPECT_TRUE(std::isinf(got[at]));
        } else {
          EXPECT_EQ(got[at], clean[at]) << to_string(isa) << " at " << row << "," << n;
        }
      }
    }
  }
}

// Two contexts on two threads at once, and a call inside the caller's parallel region.
TEST(GroupedMatmul, SameBitsConcurrentlyAndNested) {
  std::mt19937_64 random(17);
  const Problem original(random, 150, 300, 190, {50, 0, 97});
  const auto fresh = [&] {
    Problem copy = original;
    copy.args.x.data = copy.x.data();
    copy.args.group_list.data = copy.group_list.data();
    copy.args.bias.data = copy.bias.data();
    copy.args.y.data = copy.y.data();
    copy.weights.w.data = copy.w.data();
    return copy;
  };
  Context alone({.threads = 2});
  Problem first = fresh();
  const std::vector<float> expected = first.run(alone);

  std::vector<std::vector<float>> results(2);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      Context ctx({.threads = 2});
      Problem problem = fresh();
      const PackedWeights packed = problem.pack(ctx);
      for (int repeat = 0; repeat < 50; ++repeat) {
        EXPECT_TRUE(grouped_matmul(ctx, packed, problem.args).ok());
      }
      results[i] = problem.y;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(same_bits(results[0], expected));
  EXPECT_TRUE(same_bits(results[1], expected));

  std::vector<std::vector<float>> nested(3);
#pragma omp parallel num_threads(3)
  {
    Context ctx({.threads = 2});
    Problem problem = fresh();
    nested[static_cast<size_t>(omp_get_thread_num())] = problem.run(ctx);
  }
  for (const auto& result : nested) {
    if (!result.empty()) {
      EXPECT_TRUE(same_bits(result, expected));
    }
  }
  EXPECT_FALSE(nested[0].empty());
}

// Once a shape was seen, nothing is allocated, whatever the routing.
TEST(GroupedMatmul, AllocatesNothingAfterTheFirstCall) {
  std::mt19937_64 random(19);
  Problem problem(random, 64, 128, 96, {64, 0, 0, 0});
  Context ctx({.threads = 1});  // one worker: mallinfo2 sees this thread's arena
  const PackedWeights packed = problem.pack(ctx);
  problem.group_list = {16, 16, 16, 16};
  problem.args.group_list = {problem.group_list.data(), {4}};
  ASSERT_TRUE(grouped_matmul(ctx, packed, problem.args).ok());
  const struct mallinfo2 before = mallinfo2();
  for (int64_t i = 0; i < 64; ++i) {
    problem.group_list = {i, 0, 64 - i, 0};
    problem.args.group_list = {problem.group_list.data(), {4}};
    const struct mallinfo2 inside = mallinfo2();
    ASSERT_TRUE(grouped_matmul(ctx, packed, problem.args).ok());
    const struct mallinfo2 after = mallinfo2();
    ASSERT_EQ(after.uordblks, inside.uordblks);
    ASSERT_EQ(after.hblkhd, inside.hblkhd);
  }
  EXPECT_EQ(mallinfo2().hblkhd, before.hblkhd);
}

TEST(GroupedMatmul, RefusesEveryMalformedView) {
  std::mt19937_64 random(23);
  Problem problem(random, 12, 33, 40, {5, 0, 7});
  Context ctx;
  const PackedWeights packed = problem.pack(ctx);
  const std::vector<test::InputView<GroupedMatmulArgs>> inputs = {
      {"x", &GroupedMatmulArgs::x},
      {"group_list", &GroupedMatmulArgs::group_list},
      {"bias", &GroupedMatmulArgs::bias, false}};
  const std::vector<test::OutputView<GroupedMatmulArgs>> outputs = {{"y", &GroupedMatmulArgs::y}};
  test::sweep_contract(problem.args, inputs, outputs,
                       [&](const GroupedMatmulArgs& a) { return grouped_matmul(ctx, packed, a); });
}

class GroupedMatmulErrors : public ::testing::Test {
 protected:
  GroupedMatmulErrors() : random_(29), problem_(random_, 10, 16, 8, {3, 4, 3}) {
    packed_ = problem_.pack(ctx_);
  }
  void expect(const char* message) {
    std::fill(problem_.y.begin(), problem_.y.end(), NAN);
    const Status status = grouped_matmul(ctx_, packed_, problem_.args);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_STREQ(status.message(), message);
    for (const float v : problem_.y) ASSERT_TRUE(std::isnan(v)) << "y was written";
  }
  std::mt19937_64 random_;
  Problem problem_;
  Context ctx_;
  PackedWeights packed_;
};

TEST_F(GroupedMatmulErrors, NegativeCount) {
  problem_.group_list[1] = -4;
  expect("grouped_matmul: group_list[1] gives a group of -4 rows");
}
TEST_F(GroupedMatmulErrors, MoreRowsThanThereAre) {
  problem_.group_list[2] = 4;
  expect("grouped_matmul: group_list makes more rows than there are: 7 + 4 at entry 2, M = 10");
}
TEST_F(GroupedMatmulErrors, CountsThatOverflow) {
  problem_.group_list = {INT64_MAX, INT64_MAX, 2};
  expect(
      "grouped_matmul: group_list makes more rows than there are: 0 + 9223372036854775807 at "
      "entry 0, M = 10");
}
TEST_F(GroupedMatmulErrors, DecreasingCumsum) {
  problem_.args.list_type = ListType::kCumsum;
  problem_.group_list = {5, 3, 10};
  expect("grouped_matmul: group_list[1] gives a group of -2 rows");
}
TEST_F(GroupedMatmulErrors, ExpertOutOfRange) {
  problem_.args.list_type = ListType::kSparse;
  problem_.group_list = {2, 3, 3, 1};
  problem_.args.group_list = {problem_.group_list.data(), {2, 2}};
  expect("grouped_matmul: group_list[1,0] = 3 is not in [0, 3)");
}
TEST_F(GroupedMatmulErrors, OutputInTheWeights) {
  problem_.args.y = {static_cast<float*>(const_cast<void*>(packed_.data())), {10, 8}};
  expect("grouped_matmul: output y overlaps input weights");
}
TEST_F(GroupedMatmulErrors, EmptyWeights) {
  packed_ = PackedWeights();
  expect("grouped_matmul: weights hold nothing");
}
TEST_F(GroupedMatmulErrors, ScalesWithoutS8) {
  problem_.args.x_scale = {problem_.bias.data(), {10}};
  expect("grouped_matmul: x_scale is given, but x is not s8");
}

}  // namespace
}  // namespace moeops
