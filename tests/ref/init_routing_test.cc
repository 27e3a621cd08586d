// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::expect_refused;

const float kNan = std::numeric_limits<float>::quiet_NaN();

// Three tokens of width 2 with two experts each, of four:
//   expert 0: slots 1, 2    expert 1: none    expert 2: slots 0, 4, 5    expert 3: slot 3
// so the slots in sorted order are 1 2 0 4 5 3, of the tokens 0 1 0 2 2 1.
class InitRouting : public testing::Test {
 protected:
  InitRouting() {
    args_.expert_count = 4;
    args_.x = {x_.data(), {3, 2}};
    args_.expert_ids = {ids_.data(), {3, 2}};
    args_.expanded_x = {expanded_x_.data(), {6, 2}};
    args_.row_index = {row_index_.data(), {6}};
    args_.valid_rows = {&valid_rows_, {1}};
    args_.dropped_rows = {&dropped_rows_, {1}};
  }

  void run() {
    const Status status = ref::init_routing(args_);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  void count(ExpertCounts counts, int64_t experts = 4) {
    args_.counts = counts;
    expert_tokens_.assign(static_cast<size_t>(2 * experts), 55);
    if (counts == ExpertCounts::kKeyValue) {
      args_.expert_tokens = {expert_tokens_.data(), {experts, 2}};
    } else {
      expert_tokens_.resize(static_cast<size_t>(experts));
      args_.expert_tokens = {expert_tokens_.data(), {experts}};
    }
  }
  void drop_pad(int64_t capacity) {
    args_.mode = RoutingMode::kDropPad;
    args_.capacity = capacity;
    expanded_x_.assign(static_cast<size_t>(4 * capacity * 2), 55.0f);
    args_.expanded_x = {expanded_x_.data(), {4, capacity, 2}};
  }
  void quantise(RoutingQuant quant) {
    args_.quant = quant;
    args_.expanded_x.dtype = DType::kS8;
    args_.expanded_x.data = q_.data();
    if (quant == RoutingQuant::kDynamic) scales(args_.expanded_x.rows());
  }
  void scales(int64_t rows) {
    expanded_scale_.assign(static_cast<size_t>(rows), 55.0f);
    args_.expanded_scale = {expanded_scale_.data(), {rows}};
  }

  std::vector<float> x_ = {0, 1, 10, 11, 20, 21};
  std::vector<int32_t> ids_ = {2, 0, 0, 3, 2, 2};
  std::vector<float> expanded_x_ = std::vector<float>(12, 55.0f);
  std::vector<int8_t> q_ = std::vector<int8_t>(16, 55);
  std::vector<float> expanded_scale_;
  std::vector<int32_t> row_index_ = std::vector<int32_t>(6, 55);
  std::vector<int64_t> expert_tokens_;
  int64_t valid_rows_ = 55, dropped_rows_ = 55;
  InitRoutingArgs args_;
};

TEST_F(InitRouting, SortsByExpertThenSlot) {
  run();
  EXPECT_EQ(expanded_x_, (std::vector<float>{0, 1, 10, 11, 0, 1, 20, 21, 20, 21, 10, 11}));
  EXPECT_EQ(row_index_, (std::vector<int32_t>{2, 0, 1, 5, 3, 4}));
  EXPECT_EQ(valid_rows_, 6);
  EXPECT_EQ(dropped_rows_, 0);
  args_.row_index_type = RowIndexType::kScatter;
  run();
  EXPECT_EQ(row_index_, (std::vector<int32_t>{1, 2, 0, 4, 5, 3}));
}

TEST_F(InitRouting, Counts) {
  count(ExpertCounts::kCount);
  run();
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{2, 0, 3, 1}));
  count(ExpertCounts::kCumsum);
  run();
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{2, 2, 5, 6}));
  count(ExpertCounts::kKeyValue);
  run();
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{0, 2, 2, 3, 3, 1, 0, 0}));
}

TEST_F(InitRouting, ARangeLeavesOutTheOtherExperts) {
  args_.expert_range = ExpertRange{1, 3};
  args_.expanded_x = {expanded_x_.data(), {3, 2}};
  count(ExpertCounts::kCount, 2);
  run();
  EXPECT_EQ(expanded_x_, (std::vector<float>{0, 1, 20, 21, 20, 21, 55, 55, 55, 55, 55, 55}));
  EXPECT_EQ(row_index_, (std::vector<int32_t>{0, -1, -1, -1, 1, 2}));
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(valid_rows_, 3);
  EXPECT_EQ(dropped_rows_, 0);
  args_.row_index_type = RowIndexType::kScatter;
  count(ExpertCounts::kKeyValue, 2);
  run();
  EXPECT_EQ(row_index_, (std::vector<int32_t>{0, 4, 5, -1, -1, -1}));
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{2, 3, 0, 0}));
}

TEST_F(InitRouting, TheCutoffDropsTheLastRows) {
  args_.active_rows = 3;
  count(ExpertCounts::kCumsum);
  run();
  EXPECT_EQ(expanded_x_, (std::vector<float>{0, 1, 10, 11, 0, 1, 55, 55, 55, 55, 55, 55}));
  EXPECT_EQ(row_index_, (std::vector<int32_t>{2, 0, 1, -1, -1, -1}));
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{2, 2, 5, 6}));  // before the cutoff
  EXPECT_EQ(valid_rows_, 3);
  EXPECT_EQ(dropped_rows_, 3);
  args_.row_index_type = RowIndexType::kScatter;
  run();
  EXPECT_EQ(row_index_, (std::vector<int32_t>{1, 2, 0, -1, -1, -1}));
  args_.active_rows = 7;
  run();
  EXPECT_EQ(valid_rows_, 6);
}

TEST_F(InitRouting, MaskedSlotsBelongToNoExpert) {
  ids_ = {-1, 0, 4, 3, 2, -1};
  args_.allow_masked = true;
  count(ExpertCounts::kCount);
  run();
  EXPECT_EQ(row_index_, (std::vector<int32_t>{-1, 0, -1, 2, 1, -1}));
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{1, 0, 1, 1}));
  EXPECT_EQ(valid_rows_, 3);
  EXPECT_EQ(dropped_rows_, 0);
  drop_pad(1);
  run();
  EXPECT_EQ(row_index_, (std::vector<int32_t>{-1, 0, -1, 3, 2, -1}));
  EXPECT_EQ(valid_rows_, 3);
  EXPECT_EQ(dropped_rows_, 3);
}

TEST_F(InitRouting, DropPadGivesEachExpertItsCapacity) {
  drop_pad(2);
  count(ExpertCounts::kCount);
  run();
  EXPECT_EQ(expanded_x_,
            (std::vector<float>{0, 1, 10, 11, 0, 0, 0, 0, 0, 1, 20, 21, 10, 11, 0, 0}));
  EXPECT_EQ(row_index_, (std::vector<int32_t>{4, 0, 1, 6, 5, -1}));
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{2, 0, 3, 1}));  // before the capacity
  EXPECT_EQ(valid_rows_, 5);
  EXPECT_EQ(dropped_rows_, 1);
}

TEST_F(InitRouting, ScalesGoWithTheirTokens) {
  const std::vector<float> scale = {1, 2, 3};
  args_.scale = {scale.data(), {3}};
  args_.active_rows = 4;
  scales(6);
  run();
  EXPECT_EQ(expanded_scale_, (std::vector<float>{1, 2, 1, 3, 55, 55}));
  drop_pad(2);
  scales(8);
  run();
  EXPECT_EQ(expanded_scale_, (std::vector<float>{1, 2, 0, 0, 1, 3, 2, 0}));
}

TEST_F(InitRouting, StaticQuantRoundsHalfToEvenAndClamps) {
  x_ = {0, 1, 100, -100, kNan, 2};
  const float scale = 2, offset = 0.5f;
  args_.scale = {&scale, {1}};
  args_.offset = {&offset, {1}};
  args_.active_rows = 4;
  quantise(RoutingQuant::kStatic);
  run();
  q_.resize(10);
  EXPECT_EQ(q_, (std::vector<int8_t>{0, 2, 127, -128, 0, 2, 0, 4, 55, 55}));
  q_.assign(16, 55);
  drop_pad(2);
  quantise(RoutingQuant::kStatic);
  run();
  EXPECT_EQ(q_, (std::vector<int8_t>{0, 2, 127, -128, 0, 0, 0, 0, 0, 2, 0, 4, 127, -128, 0, 0}));
}

TEST_F(InitRouting, DynamicQuantScalesEachRow) {
  x_ = {127, 1, 254, 4, kNan, 1};
  quantise(RoutingQuant::kDynamic);
  run();
  q_.resize(12);
  EXPECT_EQ(q_, (std::vector<int8_t>{127, 1, 127, 2, 127, 1, 0, 0, 0, 0, 127, 2}));
  ASSERT_TRUE(std::isnan(expanded_scale_[3]) && std::isnan(expanded_scale_[4]));
  expanded_scale_[3] = expanded_scale_[4] = 0;
  EXPECT_EQ(expanded_scale_, (std::vector<float>{1, 2, 1, 0, 0, 2}));
}

TEST_F(InitRouting, SmoothIsTheExpertsOwnOrOneForAll) {
  x_ = {1, 1, 1, 1, 1, 1};
  const std::vector<float> smooth = {127, 10, 20, 127};
  args_.expert_range = ExpertRange{2, 4};
  args_.scale = {smooth.data(), {2, 2}};
  quantise(RoutingQuant::kDynamic);
  run();
  q_.resize(8);
  EXPECT_EQ(q_, (std::vector<int8_t>{127, 10, 127, 10, 127, 10, 20, 127}));
  args_.scale = {smooth.data(), {1, 2}};
  run();
  EXPECT_EQ(q_, (std::vector<int8_t>{127, 10, 127, 10, 127, 10, 127, 10}));

  q_.assign(16, 55);
  args_.expert_range.reset();
  drop_pad(1);
  quantise(RoutingQuant::kDynamic);
  run();
  q_.resize(8);
  EXPECT_EQ(q_, (std::vector<int8_t>{127, 10, 0, 0, 127, 10, 127, 10}));
  EXPECT_EQ(expanded_scale_, (std::vector<float>{1, 0, 1, 1}));
}

TEST_F(InitRouting, CopiesWhateverTheBitsAre) {
  const uint16_t tokens[] = {0x7FC1, 0xFF80, 0x0001, 0x8000, 0x7F81, 0x1234};
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    std::vector<uint16_t> expanded(12);
    args_.x = {tokens, TensorLayout(dtype, {3, 2})};
    args_.expanded_x = {expanded.data(), TensorLayout(dtype, {6, 2})};
    run();
    EXPECT_EQ(expanded, (std::vector<uint16_t>{0x7FC1, 0xFF80, 0x0001, 0x8000, 0x7FC1, 0xFF80,
                                               0x7F81, 0x1234, 0x7F81, 0x1234, 0x0001, 0x8000}));
  }
}

TEST_F(InitRouting, RowsMayBeStrided) {
  const std::vector<float> x = {1, 2, 99, 3, 4};
  const std::vector<int32_t> ids = {1, 99, 99, 0};
  std::vector<float> expanded(6, 55.0f);
  std::vector<int64_t> expert_tokens(5, 55);
  args_.expert_count = 2;
  args_.x = {x.data(), {2, 2}, 3};
  args_.expert_ids = {ids.data(), {2, 1}, 3};
  args_.counts = ExpertCounts::kKeyValue;
  args_.expanded_x = {expanded.data(), {2, 2}, 4};
  args_.row_index = {row_index_.data(), {2}};
  args_.expert_tokens = {expert_tokens.data(), {2, 2}, 3};
  run();
  EXPECT_EQ(expanded, (std::vector<float>{3, 4, 55, 55, 1, 2}));
  EXPECT_EQ(expert_tokens, (std::vector<int64_t>{0, 1, 55, 1, 1}));
}

TEST_F(InitRouting, ZeroSizes) {
  args_.x = {x_.data(), {0, 2}};
  args_.expert_ids = {ids_.data(), {0, 2}};
  args_.row_index = {row_index_.data(), {0}};
  args_.expanded_x = {expanded_x_.data(), {0, 2}};
  count(ExpertCounts::kCount);
  run();
  EXPECT_EQ(expert_tokens_, (std::vector<int64_t>{0, 0, 0, 0}));
  EXPECT_EQ(valid_rows_, 0);
  drop_pad(1);
  run();
  EXPECT_EQ(expanded_x_, std::vector<float>(8, 0.0f));
  EXPECT_EQ(valid_rows_, 0);

  // No experts; nothing chosen; no columns.
  args_ = {};
  args_.x = {x_.data(), {3, 0}};
  args_.expert_ids = {ids_.data(), {3, 0}};
  args_.row_index = {row_index_.data(), {0}};
  args_.expanded_x = {expanded_x_.data(), {0, 0}};
  args_.expert_range = ExpertRange{0, 0};
  count(ExpertCounts::kKeyValue, 0);
  run();
}

TEST_F(InitRouting, EveryViewIsChecked) {
  using Args = InitRoutingArgs;
  const auto call = [](const Args& args) { return ref::init_routing(args); };
  std::vector<float> scale(6, 1.0f);
  float offset = 0;
  // Three experts of the range have all the rows: dynamic smooth of two is no legal form.
  args_.expert_range = ExpertRange{1, 4};
  args_.scale = {scale.data(), {3, 2}};
  args_.expanded_x = {expanded_x_.data(), {4, 2}};
  count(ExpertCounts::kKeyValue, 3);
  quantise(RoutingQuant::kDynamic);
  test::sweep_contract<Args>(
      args_, {{"x", &Args::x}, {"expert_ids", &Args::expert_ids}, {"scale", &Args::scale, false}},
      {{"expanded_x", &Args::expanded_x},
       {"expanded_scale", &Args::expanded_scale},
       {"row_index", &Args::row_index},
       {"expert_tokens", &Args::expert_tokens},
       {"valid_rows", &Args::valid_rows, false},
       {"dropped_rows", &Args::dropped_rows, false}},
      call);

  args_.expert_range.reset();
  drop_pad(2);
  count(ExpertCounts::kCount);
  quantise(RoutingQuant::kStatic);
  args_.expanded_scale = {};
  args_.scale = {scale.data(), {1}};
  args_.offset = {&offset, {1}};
  test::sweep_contract<Args>(args_,
                             {{"x", &Args::x},
                              {"expert_ids", &Args::expert_ids},
                              {"scale", &Args::scale},
                              {"offset", &Args::offset}},
                             {{"expanded_x", &Args::expanded_x},
                              {"row_index", &Args::row_index},
                              {"expert_tokens", &Args::expert_tokens}},
                             call);

  drop_pad(2);
  args_.quant = RoutingQuant::kNone;
  args_.scale = {scale.data(), {3}};
  args_.offset = {};
  scales(8);
  test::sweep_contract<Args>(
      args_, {{"x", &Args::x}, {"scale", &Args::scale}},
      {{"expanded_x", &Args::expanded_x}, {"expanded_scale", &Args::expanded_scale}}, call);
}

TEST_F(InitRouting, IdsOutsideTheExperts) {
  ids_ = {2, 0, 0, 4, 2, 99};
  expect_refused(ref::init_routing(args_), "init_routing: expert_ids[1,1] = 4 is not in [0, 4)");
  args_.allow_masked = true;
  expect_refused(ref::init_routing(args_),
                 "init_routing: expert_ids[2,1] = 99 is not in [0, 4) and does not mask");
  ids_ = {2, 0, -2, 4, 2, 0};
  expect_refused(ref::init_routing(args_),
                 "init_routing: expert_ids[1,0] = -2 is not in [0, 4) and does not mask");
  EXPECT_EQ(expanded_x_, std::vector<float>(12, 55.0f));
  EXPECT_EQ(row_index_, std::vector<int32_t>(6, 55));
}

TEST_F(InitRouting, Parameters) {
  args_.expert_count = -1;
  expect_refused(ref::init_routing(args_), "init_routing: expert_count = -1 is negative");
  args_.expert_count = 4;
  for (const ExpertRange& range : {ExpertRange{-1, 4}, ExpertRange{0, 5}, ExpertRange{3, 2}}) {
    args_.expert_range = range;
    expect_refused(ref::init_routing(args_),
                   "init_routing: expert_range = [" + std::to_string(range.begin) + ", " +
                       std::to_string(range.end) + ") does not lie in [0, 4)");
  }
  args_.expert_range.reset();
  args_.active_rows = -1;
  expect_refused(ref::init_routing(args_), "init_routing: active_rows = -1 is negative");
  args_.active_rows = 5;
  args_.expanded_x = {expanded_x_.data(), {4, 2}};
  expect_refused(ref::init_routing(args_),
                 "init_routing: expanded_x.shape[0] = 4, expected at least R = 5");
}

TEST_F(InitRouting, DropPadParameters) {
  for (const int64_t capacity : {0, 4, -1}) {
    drop_pad(2);
    args_.capacity = capacity;
    expect_refused(ref::init_routing(args_),
                   "init_routing: capacity = " + std::to_string(capacity) + " is not in [1, 3]");
  }
  drop_pad(3);
  args_.expert_range = ExpertRange{0, 3};
  expect_refused(ref::init_routing(args_),
                 "init_routing: expert_range = [0, 3), but drop_pad needs [0, 4)");
  args_.expert_range.reset();
  args_.row_index_type = RowIndexType::kScatter;
  expect_refused(ref::init_routing(args_),
                 "init_routing: row_index_type is scatter, but mode is drop_pad");
  args_.row_index_type = RowIndexType::kGather;
  args_.expert_count = int64_t{1} << 30;
  expect_refused(ref::init_routing(args_),
                 "init_routing: expert_count * capacity = 1073741824 * 3 does not fit in i32");
}

TEST_F(InitRouting, SlotsFitInI32) {
  // Refused by its sizes alone: nothing is read through the views.
  const int64_t T = int64_t{1} << 30;
  args_.x = {x_.data(), {T, 2}};
  args_.expert_ids = {ids_.data(), {T, 2}};
  args_.row_index = {row_index_.data(), {2 * T}};
  args_.valid_rows = args_.dropped_rows = {};
  expect_refused(ref::init_routing(args_), "init_routing: T * K = 2147483648 does not fit in i32");
}

TEST_F(InitRouting, ViewsWithoutAUse) {
  float one = 1;
  scales(6);
  expect_refused(ref::init_routing(args_),
                 "init_routing: expanded_scale is given, but scale is not");
  args_.expanded_scale = {};
  args_.offset = {&one, {1}};
  expect_refused(ref::init_routing(args_),
                 "init_routing: offset is given, but quant is not static");
  args_.offset = {};
  count(ExpertCounts::kCount);
  args_.counts = ExpertCounts::kNone;
  expect_refused(ref::init_routing(args_),
                 "init_routing: expert_tokens is given, but counts is none");
  args_.expert_tokens = {};
  quantise(RoutingQuant::kStatic);
  args_.scale = {&one, {1}};
  args_.offset = {&one, {1}};
  scales(6);
  expect_refused(ref::init_routing(args_),
                 "init_routing: expanded_scale is given, but quant is static");
}

// cumsum, clipped to the rows that a cutoff leaves, says whose rows they are.
TEST(ClipCumsum, FitsTheRowsOfACutoff) {
  for (uint64_t round = 0; round < 50; ++round) {
    const uint64_t seed = test::seed_of(round);
    std::mt19937_64 random(seed);
    const int64_t T = 6, K = 4, E = 5, N = T * K;
    std::vector<int32_t> ids(static_cast<size_t>(N)), row_index(ids.size());
    for (int32_t& id : ids) id = std::uniform_int_distribution<int32_t>(0, E - 1)(random);
    const std::vector<float> x(static_cast<size_t>(T), 0.0f);
    std::vector<float> expanded_x(ids.size());
    std::vector<int64_t> cumsum(static_cast<size_t>(E)), clipped(cumsum.size());
    InitRoutingArgs args;
    args.x = {x.data(), {T, 1}};
    args.expert_ids = {ids.data(), {T, K}};
    args.expert_count = E;
    args.counts = ExpertCounts::kCumsum;
    args.row_index_type = RowIndexType::kScatter;
    args.expanded_x = {expanded_x.data(), {N, 1}};
    args.row_index = {row_index.data(), {N}};
    args.expert_tokens = {cumsum.data(), {E}};
    ASSERT_TRUE(ref::cutoff_rows(T, K, 0.75, 0, &args.active_rows).ok());
    ASSERT_EQ(args.active_rows, 18);
    ASSERT_TRUE(ref::init_routing(args).ok());
    ASSERT_TRUE(
        ref::clip_cumsum({cumsum.data(), {E}}, args.active_rows, {clipped.data(), {E}}).ok());
    EXPECT_EQ(clipped.back(), args.active_rows) << test::replay_hint(seed);
    int64_t row = 0;
    for (int64_t e = 0; e < E; ++e) {
      for (; row < clipped[static_cast<size_t>(e)]; ++row) {
        const auto slot = static_cast<size_t>(row_index[static_cast<size_t>(row)]);
        EXPECT_EQ(ids[slot], e) << test::replay_hint(seed);
      }
    }
  }
}

TEST(ClipCumsum, Errors) {
  int64_t cumsum[] = {1, 2}, clipped[] = {55, 55};
  expect_refused(ref::clip_cumsum({cumsum, {2}}, -1, {clipped, {2}}),
                 "clip_cumsum: rows = -1 is negative");
  expect_refused(ref::clip_cumsum({cumsum, {2}}, 1, {clipped, {1}}),
                 "clip_cumsum: clipped.shape[0] = 1, expected E = 2 (from cumsum)");
  expect_refused(ref::clip_cumsum({cumsum, {2}}, 1, {cumsum, {2}}),
                 "clip_cumsum: output clipped overlaps input cumsum");
  EXPECT_EQ(clipped[0], 55);
  EXPECT_TRUE(ref::clip_cumsum({cumsum, {0}}, 1, {clipped, {0}}).ok());
}

int64_t cutoff(int64_t T, int64_t K, double factor, int64_t floor_tokens) {
  int64_t rows = -1;
  const Status status = ref::cutoff_rows(T, K, factor, floor_tokens, &rows);
  EXPECT_TRUE(status.ok()) << status.message();
  return rows;
}

TEST(CutoffRows, KeepsAFixedNumberOfExpertsAToken) {
  EXPECT_EQ(cutoff(10, 8, 0.5, 0), 40);
  EXPECT_EQ(cutoff(10, 8, 0.7, 0), 50);   // 5.6
  EXPECT_EQ(cutoff(10, 10, 0.7, 0), 70);  // 7 in double, though 0.7 is a little less
  EXPECT_EQ(cutoff(10, 8, 0.5, 15), 60);
  EXPECT_EQ(cutoff(10, 8, 0.5, 100), 80);
  EXPECT_EQ(cutoff(10, 8, 1.0, 0), 80);
  EXPECT_EQ(cutoff(0, 8, 0.5, 100), 0);
}

TEST(CutoffRows, LargeSizes) {
  EXPECT_EQ(cutoff(10, 8, 0.5, INT64_MAX), 80);
  EXPECT_EQ(cutoff(1, INT64_MAX, 1.0, 0), INT64_MAX);
  EXPECT_EQ(cutoff(INT64_MAX, 1, 1.0, 0), INT64_MAX);
}

TEST(CutoffRows, Errors) {
  int64_t rows = 55;
  const auto call = [&](int64_t T, int64_t K, double factor, int64_t floor_tokens) {
    return ref::cutoff_rows(T, K, factor, floor_tokens, &rows);
  };
  expect_refused(call(-1, 8, 0.5, 0), "cutoff_rows: T = -1 is negative");
  expect_refused(call(1, -8, 0.5, 0), "cutoff_rows: K = -8 is negative");
  expect_refused(call(1, 8, 0.5, -2), "cutoff_rows: floor_tokens = -2 is negative");
  expect_refused(call(1, 8, 0, 0), "cutoff_rows: topk_scaling_factor = 0 is not in (0, 1]");
  expect_refused(call(1, 8, 1.5, 0), "cutoff_rows: topk_scaling_factor = 1.5 is not in (0, 1]");
  expect_refused(call(1, 8, static_cast<double>(kNan), 0),
                 "cutoff_rows: topk_scaling_factor = nan is not in (0, 1]");
  expect_refused(call(1, 3, 0.3, 0),
                 "cutoff_rows: K * topk_scaling_factor = 3 * 0.3 keeps no expert of a token");
  expect_refused(call(1, 0, 1.0, 0),
                 "cutoff_rows: K * topk_scaling_factor = 0 * 1 keeps no expert of a token");
  expect_refused(call(INT64_MAX, 2, 0.5, 0),
                 "cutoff_rows: T * K = 9223372036854775807 * 2 overflows");
  EXPECT_EQ(rows, 55);
}

}  // namespace
}  // namespace moeops
