// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/tile_driver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "tests/support/draw.h"
#include "tests/support/guarded_buffer.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using namespace grouped_matmul_internal;  // NOLINT(google-build-using-namespace)
using test::Draw;
using test::GuardedBuffer;

// Counts how often each panel of each row comes.
class Counter final : public TileSink {
 public:
  Counter(int64_t rows, int64_t panels)
      : panels_(panels),
        taken_(static_cast<size_t>(rows * panels)),
        completed_(static_cast<size_t>(rows)) {}

  void take(const TileResult& tile) override {
    for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
      ++taken_[static_cast<size_t>(row * panels_ + tile.panel)];
    }
    // The taker may write to all of it.
    std::memset(tile.c, 0xEE, static_cast<size_t>(tile.rows) * kPanelColumns * 4);
  }
  void rows_complete(int64_t row, int64_t rows) override {
    for (int64_t i = row; i < row + rows; ++i) {
      ++completed_[static_cast<size_t>(i)];
      for (int64_t p = 0; p < panels_; ++p) {
        EXPECT_EQ(taken_[static_cast<size_t>(i * panels_ + p)], 1) << "row " << i;
      }
    }
  }
  void expect_all(int64_t covered, bool told) const {
    for (size_t i = 0; i < completed_.size(); ++i) {
      const int once = static_cast<int64_t>(i) < covered ? 1 : 0;
      EXPECT_EQ(completed_[i], told ? once : 0) << "row " << i;
      for (size_t p = 0; p < static_cast<size_t>(panels_); ++p) {
        EXPECT_EQ(taken_[i * static_cast<size_t>(panels_) + p], once) << "row " << i;
      }
    }
  }

 private:
  int64_t panels_;
  std::vector<int> taken_, completed_;
};

// One worker of a team that others did not come to does all the work, in its own part of the
// scratch, of which not a byte too few was asked for.
TEST(TileDriver, EveryTileComesOnceAndTheScratchSuffices) {
  for (uint64_t round = 0; round < 100; ++round) {
    const uint64_t seed = test::seed_of(round);
    Draw draw(seed);
    const DType dtype = draw.of({DType::kF32, DType::kBf16, DType::kS8});
    const int64_t E = draw.between(1, 5);
    const int64_t N = draw.of<int64_t>({0, 1, 33, 64, 100, 250, 330});
    const int64_t chunk = 64 / size_of(dtype);
    const int64_t K = draw.of<int64_t>({0, 1, chunk, 3 * chunk + 1, 9 * chunk, 280 * chunk});
    std::vector<int64_t> groups;
    int64_t rows = 0;
    for (int64_t g = draw.between(0, 6); g > 0; --g) {
      groups.push_back(draw.of<int64_t>({1, 2, 6, 7, 15, 17, 33, 64, 100, 150}));
      rows += groups.back();
    }
    const int64_t max_rows = rows + draw.of<int64_t>({0, 0, 1, 50});
    const auto max_groups = static_cast<int64_t>(groups.size()) + draw.of<int64_t>({0, 0, 3});
    const bool tell = draw.flag();
    const int workers = static_cast<int>(draw.between(1, 3));
    const bool is_tuned = draw.flag();
    const int64_t tuned_blocks = draw.of<int64_t>({1, 2, 5, 10000});
    const TunedPlan tuned = {.chunk_rows = 0,
                             .k_block = draw.of<int64_t>({1, 2, 7, 10000}),
                             .task_panels = draw.of<int64_t>({1, 2, 10000})};
    SCOPED_TRACE(test::replay_hint(seed) + ": " + to_string(dtype) + " N " + std::to_string(N) +
                 " K " + std::to_string(K) + " rows " + std::to_string(rows));

    PackedWeights weights;
    ASSERT_TRUE(
        PackedWeights::create({.dtype = dtype, .experts = E, .n = N, .k = K}, &weights).ok());
    const std::vector<char> x(static_cast<size_t>(std::max<int64_t>(rows * K * size_of(dtype), 1)));
    for (const Isa isa : test::isas()) {
      SCOPED_TRACE(to_string(isa));
      const auto prepare = [&](TileDriver* driver, int threads) {
        Context ctx({.threads = threads, .isa = isa});
        ASSERT_TRUE(driver->prepare(ctx, weights, max_rows, max_groups, threads, tell).ok());
        if (!is_tuned) return;
        auto tuning = std::make_shared<Tuning>();
        TunedPlan& plan = tuning->plans[driver->tuned_shape(ctx)];
        plan = tuned;
        plan.chunk_rows = tuned_blocks * driver->kernel().row_block;
        ctx.set_tuning(tuning);
        ASSERT_TRUE(driver->prepare(ctx, weights, max_rows, max_groups, threads, tell).ok());
        EXPECT_EQ(driver->problem().tuned, plan);
      };
      TileDriver driver, of_one;
      ASSERT_NO_FATAL_FAILURE(prepare(&driver, workers));
      ASSERT_NO_FATAL_FAILURE(prepare(&of_one, 1));
      const int64_t others = driver.scratch_bytes() - of_one.scratch_bytes();
      // But for the line with the count of its tasks, which lies behind all workers' parts.
      const int64_t own = workers > 1 ? others / (workers - 1) - 64 : 0;
      const GuardedBuffer scratch(static_cast<size_t>(driver.scratch_bytes()),
                                  GuardedBuffer::Against::kBack);
      if (scratch.bytes() > 0) std::memset(scratch.as<char>(), 0xA5, scratch.bytes());
      driver.start(scratch.as<char>(), {rows, static_cast<int64_t>(groups.size())});
      int64_t row = 0;
      for (const int64_t count : groups) {
        driver.add_group(draw.between(0, E - 1), row, count);
        row += count;
      }
      driver.deal();
      Counter counter(max_rows, weights.panels());
      driver.work(0, {.data = x.data(), .stride = K * size_of(dtype)}, counter);
      counter.expect_all(rows, tell);
      for (int64_t i = own; i < own * workers; ++i) {
        ASSERT_EQ(scratch.as<unsigned char>()[i], 0xA5) << "another worker's scratch";
      }
    }
  }
}

// The experts in the order in which one worker comes to them.
class Order final : public TileSink {
 public:
  void take(const TileResult& tile) override {
    if (experts_.empty() || experts_.back() != tile.expert) experts_.push_back(tile.expert);
  }
  const std::vector<int64_t>& experts() const { return experts_; }

 private:
  std::vector<int64_t> experts_;
};

TEST(TileDriver, OneWorkerBeginsWithTheLargestGroupsAnotherWithTheSmallest) {
  // Of the experts' groups, given the rows of each; the other worker of two does not come.
  const auto order = [](const std::vector<int64_t>& groups, int worker) {
    const auto count = static_cast<int64_t>(groups.size());
    const int64_t rows = std::accumulate(groups.begin(), groups.end(), int64_t{0});
    PackedWeights weights;
    EXPECT_TRUE(
        PackedWeights::create({.dtype = DType::kS8, .experts = count, .n = 64, .k = 64}, &weights)
            .ok());
    Context ctx({.threads = 2});
    TileDriver driver;
    EXPECT_TRUE(driver.prepare(ctx, weights, rows, count, 2, false).ok());
    const GuardedBuffer scratch(static_cast<size_t>(driver.scratch_bytes()),
                                GuardedBuffer::Against::kBack);
    driver.start(scratch.as<char>(), {rows, count});
    int64_t row = 0;
    for (int64_t expert = 0; expert < count; ++expert) {
      const int64_t group = groups[static_cast<size_t>(expert)];
      driver.add_group(expert, row, group);
      row += group;
    }
    driver.deal();
    const std::vector<char> x(static_cast<size_t>(rows * 64));
    Order sink;
    driver.work(worker, {.data = x.data(), .stride = 64}, sink);
    return sink.experts();
  };
  using Experts = std::vector<int64_t>;
  EXPECT_EQ(order({3, 60, 1, 20, 5, 2}, 0), Experts({1, 3, 4, 2, 5, 0}));
  EXPECT_EQ(order({3, 60, 1, 20, 5, 2}, 1), Experts({2, 5, 0, 1, 3, 4}));
  // Groups that are much alike, or all small, come as they lie.
  EXPECT_EQ(order({30, 20, 31, 20}, 0), Experts({0, 1, 2, 3}));
  EXPECT_EQ(order({3, 1, 2, 4}, 0), Experts({0, 1, 2, 3}));
}

}  // namespace
}  // namespace moeops
