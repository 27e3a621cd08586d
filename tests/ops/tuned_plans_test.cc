// SPDX-License-Identifier: Apache-2.0
// Operators whose context has a tuning cache: other plans, the same bits.
#include <gtest/gtest.h>
#include <moeops/ops/grouped_matmul.h>
#include <moeops/ops/grouped_matmul_swiglu_quant.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "ops/core/tuning.h"
#include "ops/grouped_matmul/tile_driver.h"
#include "tests/support/allocation_count.h"
#include "tests/support/array.h"
#include "tests/support/gemm_error.h"

namespace moeops {
namespace {

using grouped_matmul_internal::kTileKernelCount;
using grouped_matmul_internal::kTileKernels;
using grouped_matmul_internal::TileDriver;
using test::Array;
using test::Draw;
using test::isas;

constexpr int64_t kExperts = 3, kRows = 203, kN = 330;
constexpr int64_t kCounts[kExperts] = {150, 1, 50};  // two rows are nobody's

class TunedPlans : public testing::TestWithParam<DType> {
 protected:
  TunedPlans() {
    std::string name = (std::filesystem::temp_directory_path() / "moeops-tuned-XXXXXX").string();
    folder_ = mkdtemp(name.data());
    path_ = (folder_ / "cache").string();
  }
  ~TunedPlans() override { std::filesystem::remove_all(folder_); }

  // Writes a cache that has `plan`, its chunk_rows counted in the kernel's blocks, for calls of
  // that many rows and weights in contexts like `ctx`.
  void write_cache(Context& ctx, const PackedWeights& weights, int64_t rows, TunedPlan plan) {
    TileDriver driver;
    ASSERT_TRUE(driver.prepare(ctx, weights, rows, 1, ctx.threads(), false).ok());
    plan.chunk_rows *= driver.kernel().row_block;
    Tuning tuning;
    tuning.plans[driver.tuned_shape(ctx)] = plan;
    std::ofstream(path_, std::ios::binary) << tuning.text();
  }

  // Runs `call` without a cache and with caches of several plans, and compares what it leaves in
  // `outputs`.
  void expect_same_bits(const PackedWeights& weights, const std::vector<Array*>& outputs,
                        const std::function<Status(Context&)>& call) {
    const auto results = [&](Context& ctx) {
      for (Array* output : outputs) output->fill(0xA5);
      const Status status = call(ctx);
      EXPECT_TRUE(status.ok()) << status.message();
      std::vector<std::vector<char>> all;
      for (Array* output : outputs) all.push_back(output->content());
      return all;
    };
    // The smallest, the largest, and some between.
    constexpr int64_t kAll = 1 << 20;
    const TunedPlan plans[] = {{1, 1, 1},       {1, 1, kAll}, {1, kAll, 1}, {kAll, 1, 1},
                               {kAll, kAll, 1}, {1, kAll, 3}, {5, 2, 2},    {2, 3, kAll}};
    for (const Isa isa : isas()) {
      for (const int threads : {1, 3}) {
        Context plain({.threads = threads, .isa = isa});
        const auto expected = results(plain);
        for (TunedPlan plan : plans) {
          SCOPED_TRACE(std::string(to_string(isa)) + ", " + std::to_string(threads) +
                       " threads: " + std::to_string(plan.chunk_rows) + " " +
                       std::to_string(plan.k_block) + " " + std::to_string(plan.task_panels));
          if (plan.chunk_rows == kAll) plan.chunk_rows = 1000;
          ASSERT_NO_FATAL_FAILURE(write_cache(plain, weights, kRows, plan));
          Context tuned({.threads = threads, .isa = isa, .tuning_cache = path_.c_str()});
          ASSERT_TRUE(tuned.tuning_status().ok()) << tuned.tuning_status().message();
          ASSERT_EQ(tuned.tuned_plans(), 1);
          TileDriver driver;
          ASSERT_TRUE(driver.prepare(tuned, weights, kRows, kExperts, threads, false).ok());
          ASSERT_GT(driver.problem().tuned.chunk_rows, 0) << "the call would not be tuned";
          EXPECT_EQ(results(tuned), expected);
        }
      }
    }
  }

  std::filesystem::path folder_;
  std::string path_;
  test::SplitSmallCalls split_;  // so that all threads take part
};

TEST_P(TunedPlans, GroupedMatmulGivesTheSameBits) {
  const DType dtype = GetParam();
  const int64_t K = 5 * 64 / size_of(dtype) + 1;
  Draw draw(1);
  Array x(dtype, {kRows, K}), w(dtype, {kExperts, kN, K}), y(DType::kF32, {kRows, kN});
  Array w_scale;
  if (dtype == DType::kS8) {
    x.set_integers(draw, -128, 127);
    w.set_integers(draw, -128, 127);
    w_scale = Array(DType::kF32, {kExperts, kN});
    w_scale.set_uniform(draw, 0.01f, 0.02f);
  } else {
    x.set_normal(draw);
    w.set_normal(draw);
  }
  Context packing;
  PackedWeights weights;
  ASSERT_TRUE(
      PackedWeights::pack(packing, {.dtype = dtype}, w.in(), false, w_scale.in(), &weights).ok());
  GroupedMatmulArgs args;
  args.x = x.in();
  args.group_list = {kCounts, {kExperts}};
  args.y = y.out();
  expect_same_bits(weights, {&y}, [&](Context& ctx) { return grouped_matmul(ctx, weights, args); });
}

INSTANTIATE_TEST_SUITE_P(All, TunedPlans, testing::Values(DType::kF32, DType::kBf16, DType::kS8),
                         [](const auto& info) { return std::string(to_string(info.param)); });

using TunedOperators = TunedPlans;

TEST_F(TunedOperators, SwigluQuantGivesTheSameBits) {
  constexpr int64_t K = 5 * 64 + 1;
  Draw draw(2);
  Array x(DType::kS8, {kRows, K}), w(DType::kS8, {kExperts, kN, K});
  Array w_scale(DType::kF32, {kExperts, kN}), x_scale(DType::kF32, {kRows});
  Array q(DType::kS8, {kRows, kN / 2}), scale(DType::kF32, {kRows});
  x.set_integers(draw, -128, 127);
  w.set_integers(draw, -128, 127);
  w_scale.set_uniform(draw, 0.001f, 0.002f);
  x_scale.set_uniform(draw, 0.01f, 1.0f);
  Context packing;
  PackedWeights weights;
  ASSERT_TRUE(PackedWeights::pack(packing, {.dtype = DType::kS8, .role = WeightRole::kGateUp},
                                  w.in(), false, w_scale.in(), &weights)
                  .ok());
  GroupedMatmulSwigluQuantArgs args;
  args.x = x.in();
  args.x_scale = x_scale.in();
  args.group_list = {kCounts, {kExperts}};
  args.q = q.out();
  args.scale = scale.out();
  expect_same_bits(weights, {&q, &scale},
                   [&](Context& ctx) { return grouped_matmul_swiglu_quant(ctx, weights, args); });
}

// Looking plans up must not allocate, nor may a tuned plan after its first call.
TEST_F(TunedOperators, NoAllocationAfterTheFirstCall) {
  Draw draw(3);
  Array x(DType::kF32, {kRows, 64}), w(DType::kF32, {kExperts, kN, 64}),
      y(DType::kF32, {kRows, kN});
  x.set_normal(draw);
  w.set_normal(draw);
  Context plain({.threads = 2});
  PackedWeights weights;
  ASSERT_TRUE(PackedWeights::pack(plain, w.in(), false, &weights).ok());
  ASSERT_NO_FATAL_FAILURE(write_cache(plain, weights, kRows, {4, 2, 2}));
  Context ctx({.threads = 2, .tuning_cache = path_.c_str()});
  ASSERT_EQ(ctx.tuned_plans(), 1);
  GroupedMatmulArgs args;
  args.x = x.in();
  args.group_list = {kCounts, {kExperts}};
  args.y = y.out();
  const int64_t at_first = test::allocation_count();
  ASSERT_TRUE(grouped_matmul(ctx, weights, args).ok());
  const int64_t before = test::allocation_count();
  EXPECT_EQ(before > at_first, test::kCountsAllocations);
  ASSERT_TRUE(grouped_matmul(ctx, weights, args).ok());
  EXPECT_EQ(test::allocation_count(), before);
}

// A plan made for other blocks of rows, and a context whose workers are not all there.
TEST_F(TunedOperators, WhatDoesNotFitIsNotUsed) {
  using namespace grouped_matmul_internal;  // NOLINT(google-build-using-namespace)
  Problem problem = {.max_rows = 1000,
                     .groups = {1000, 4},
                     .panels = 24,
                     .k_chunks = 32,
                     .row_block = 6,
                     .tile_rows = 24,
                     .panels_together = 1,
                     .l2_bytes = 1 << 20,
                     .workers = 2};
  const Plan untuned = make_plan(problem);
  problem.tuned = {.chunk_rows = 16, .k_block = 1, .task_panels = 1};
  const Plan unfit = make_plan(problem);
  EXPECT_EQ(unfit.chunk_rows, untuned.chunk_rows);
  EXPECT_EQ(unfit.k_block, untuned.k_block);
  EXPECT_EQ(unfit.task_panels, untuned.task_panels);
  EXPECT_EQ(describe(problem, unfit).find("default plan"), 0u);

  problem.tuned = {.chunk_rows = 18, .k_block = 5, .task_panels = 1};
  const Plan fit = make_plan(problem);
  EXPECT_EQ(fit.chunk_rows, 18);
  EXPECT_EQ(fit.k_block, 5);
  EXPECT_EQ(fit.task_panels, 1);
  EXPECT_EQ(describe(problem, fit).find("tuned plan"), 0u);

  problem.tuned = {.chunk_rows = 6 << 17, .k_block = 1 << 20, .task_panels = 1 << 20};
  const Plan beyond = make_plan(problem);
  EXPECT_LE(beyond.chunk_rows, 4 * untuned.chunk_rows);
  EXPECT_EQ(beyond.k_block, 32);
  EXPECT_GE(4 * 24 / beyond.task_panels, 8 * 2) << "tasks for every worker";

  Draw draw(4);
  Array w(DType::kF32, {kExperts, kN, 64});
  w.set_normal(draw);
  Context ctx({.threads = 2});
  PackedWeights weights;
  ASSERT_TRUE(PackedWeights::pack(ctx, w.in(), false, &weights).ok());
  ASSERT_NO_FATAL_FAILURE(write_cache(ctx, weights, kRows, {4, 2, 2}));
  Context tuned({.threads = 2, .tuning_cache = path_.c_str()});
  TileDriver driver;
  for (const int workers : {1, 2}) {
    ASSERT_TRUE(driver.prepare(tuned, weights, kRows, kExperts, workers, false).ok());
    EXPECT_EQ(driver.problem().tuned.chunk_rows > 0, workers == 2);
  }
  // 203 rows are tuned, 68 of an expert, and so all up to 256 that come to more than 64.
  for (const int64_t rows : {192, 193, 256, 257}) {
    ASSERT_TRUE(driver.prepare(tuned, weights, rows, kExperts, 2, false).ok());
    EXPECT_EQ(driver.problem().tuned.chunk_rows > 0, rows == 193 || rows == 256);
  }
}

TEST(TunedShape, HoldsEveryKernelsName) {
  for (int i = 0; i < kTileKernelCount; ++i) {
    const std::string name = kTileKernels[i]->name;
    EXPECT_EQ(TunedShape::name_of(name).data(), name);
    EXPECT_EQ(name.find_first_of(" \n"), std::string::npos);
  }
}

}  // namespace
}  // namespace moeops
