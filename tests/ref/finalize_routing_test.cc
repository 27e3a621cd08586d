// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

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

// Two tokens of one column, two experts each, with everything there is.
class FinalizeRouting : public testing::Test {
 protected:
  FinalizeRouting() {
    args_.expanded = {expanded_.data(), {4, 1}};
    args_.row_index = {row_index_.data(), {4}};
    args_.scales = {scales_.data(), {2, 2}};
    args_.bias = {bias_.data(), {3, 1}};
    args_.expert_ids = {ids_.data(), {2, 2}};
    args_.skip1 = {skip1_.data(), {2, 1}};
    args_.skip2 = {skip2_.data(), {2, 1}};
    args_.out = {out_.data(), {2, 1}};
  }
  std::vector<float> run() {
    const Status status = ref::finalize_routing(args_);
    EXPECT_TRUE(status.ok()) << status.message();
    return out_;
  }

  std::vector<float> expanded_ = {1, 2, 3, 4};
  std::vector<int32_t> row_index_ = {3, 0, 2, 1};
  std::vector<float> scales_ = {1, 10, 100, 1000};
  std::vector<float> bias_ = {0.25, 0.5, 0};
  std::vector<int32_t> ids_ = {0, 1, 2, 0};
  std::vector<float> skip1_ = {1e4, 2e4};
  std::vector<float> skip2_ = {1e5, 2e5};
  std::vector<float> out_ = {55, 55};
  FinalizeRoutingArgs args_;
};

TEST_F(FinalizeRouting, SumsEverything) {
  // 1 * 4.25 + 10 * 1.5; 100 * 3 + 1000 * 2.25
  EXPECT_EQ(run(), (std::vector<float>{110019.25, 222550}));
  args_.skip2 = {};
  EXPECT_EQ(run(), (std::vector<float>{10019.25, 22550}));
  args_.skip1 = {};
  EXPECT_EQ(run(), (std::vector<float>{19.25, 2550}));
  args_.bias = {};
  ids_ = {99, -5, 99, -5};  // nothing reads them
  EXPECT_EQ(run(), (std::vector<float>{14, 2300}));
  args_.expert_ids = {};
  EXPECT_EQ(run(), (std::vector<float>{14, 2300}));
}

TEST_F(FinalizeRouting, ColumnLayoutHoldsTheFirstChoicesFirst) {
  args_.index_layout = IndexLayout::kColumn;
  row_index_ = {3, 2, 0, 1};
  EXPECT_EQ(run(), (std::vector<float>{110019.25, 222550}));
}

TEST_F(FinalizeRouting, WithoutScalesEachTokenHasOneRow) {
  args_.scales = {};
  args_.row_index = {row_index_.data(), {2}};
  args_.expert_ids = {ids_.data(), {2, 1}};
  args_.skip1 = args_.skip2 = {};
  EXPECT_EQ(run(), (std::vector<float>{4.25, 1.5}));
}

TEST_F(FinalizeRouting, ADroppedSlotContributesNothing) {
  row_index_ = {-1, 0, -1, -1};
  ids_ = {99, 1, -5, 99};  // not read, but for slot 1
  scales_ = {kNan, 10, kNan, kNan};
  EXPECT_EQ(run(), (std::vector<float>{110015, 220000}));
}

TEST_F(FinalizeRouting, DropPadHasTheRowsOfEachExpert) {
  const std::vector<float> expanded = {1, 2, 3, 4, 5, 6};
  row_index_ = {5, 0, 4, 1};
  args_.expanded = {expanded.data(), {3, 2, 1}};
  args_.rows = ExpandedRows::kDropPad;
  args_.skip1 = args_.skip2 = {};
  EXPECT_EQ(run(), (std::vector<float>{21.25, 2750}));
}

TEST_F(FinalizeRouting, MultiplyAndAddRoundSeparately) {
  // (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24; the last bit is lost when the product is rounded.
  expanded_[0] = 1 + 0x1p-12f;
  row_index_ = {-1, 0, -1, -1};
  scales_[1] = 1 + 0x1p-12f;
  skip1_[0] = -1 - 0x1p-11f;
  args_.bias = {};
  args_.skip2 = {};
  EXPECT_EQ(run()[0], 0);
}

TEST_F(FinalizeRouting, BeginsWithTheSumOfTheSkips) {
  expanded_ = {1, 1, 1, 1};
  scales_ = {1, 1, 1, 1};
  skip1_[0] = 0x1p24f;
  skip2_[0] = 1;
  args_.bias = {};
  EXPECT_EQ(run()[0], 0x1p24f);  // each 1 is lost; together they would not be
}

TEST_F(FinalizeRouting, NanReachesItsTokenOnly) {
  expanded_[2] = kNan;
  EXPECT_EQ(run()[0], 110019.25);
  EXPECT_TRUE(std::isnan(out_[1]));
  scales_[2] = 0;  // a weight of 0 does not hide it
  EXPECT_TRUE(std::isnan(run()[1]));
}

TEST_F(FinalizeRouting, SumsInF32AndRoundsOnce) {
  // 256 + 1 is no bf16, 256 + 1 + 1 is; 2048 + 1 is no f16, 2048 + 1 + 1 is.
  const bf16 rows_bf16[] = {{0x3F80}}, skip_bf16[] = {{0x4380}};
  const f16 rows_f16[] = {{0x3C00}}, skip_f16[] = {{0x6800}};
  uint16_t out = 0;
  const auto call = [&](const ConstTensorView& rows, const ConstTensorView& skip) {
    row_index_ = {0, 0};
    scales_ = {1, 1};
    FinalizeRoutingArgs args;
    args.expanded = rows;
    args.row_index = {row_index_.data(), {2}};
    args.scales = {scales_.data(), {1, 2}};
    args.skip1 = skip;
    args.out = {&out, TensorLayout(rows.dtype, {1, 1})};
    EXPECT_TRUE(ref::finalize_routing(args).ok());
    return out;
  };
  EXPECT_EQ(call({rows_bf16, {1, 1}}, {skip_bf16, {1, 1}}), 0x4381);
  EXPECT_EQ(call({rows_f16, {1, 1}}, {skip_f16, {1, 1}}), 0x6801);
}

TEST_F(FinalizeRouting, RowsMayBeStrided) {
  const float expanded[] = {1, 2, 99, 3, 4};
  const float scales[] = {1, 99, 10};
  const float bias[] = {0.5, 0.25, 99, 99, 0, 0};
  const int32_t ids[] = {0, 99, 99, 99, 1};
  const float skip1[] = {100, 200, 99, 300, 400}, skip2[] = {1000, 2000, 99, 3000, 4000};
  std::vector<float> out(6, 55.0f);
  row_index_ = {1, 0};
  args_.expanded = {expanded, {2, 2}, 3};
  args_.row_index = {row_index_.data(), {2}};
  args_.scales = {scales, {2, 1}, 2};
  args_.bias = {bias, {2, 2}, 4};
  args_.expert_ids = {ids, {2, 1}, 4};
  args_.skip1 = {skip1, {2, 2}, 3};
  args_.skip2 = {skip2, {2, 2}, 3};
  args_.out = {out.data(), {2, 2}, 4};
  ASSERT_TRUE(ref::finalize_routing(args_).ok());
  EXPECT_EQ(out, (std::vector<float>{1103.5, 2204.25, 55, 55, 3310, 4420}));
}

TEST_F(FinalizeRouting, ZeroSizes) {
  row_index_ = {-1, -1, -1, -1};
  args_.expanded = {static_cast<const float*>(nullptr), {0, 1}};
  EXPECT_EQ(run(), (std::vector<float>{110000, 220000}));
  args_.scales = {static_cast<const float*>(nullptr), {2, 0}};
  args_.expert_ids = {static_cast<const int32_t*>(nullptr), {2, 0}};
  args_.row_index = {static_cast<const int32_t*>(nullptr), {0}};
  out_ = {55, 55};
  EXPECT_EQ(run(), (std::vector<float>{110000, 220000}));
  args_ = {};
  args_.expanded = {expanded_.data(), {4, 1}};
  args_.row_index = {static_cast<const int32_t*>(nullptr), {0}};
  args_.out = {static_cast<float*>(nullptr), {0, 1}};
  EXPECT_TRUE(ref::finalize_routing(args_).ok());
}

TEST_F(FinalizeRouting, EveryViewIsChecked) {
  using Args = FinalizeRoutingArgs;
  const auto call = [](const Args& args) { return ref::finalize_routing(args); };
  const std::vector<test::InputView<Args>> inputs = {
      {"expanded", &Args::expanded}, {"row_index", &Args::row_index},   {"scales", &Args::scales},
      {"bias", &Args::bias, false},  {"expert_ids", &Args::expert_ids}, {"skip1", &Args::skip1},
      {"skip2", &Args::skip2, false}};
  test::sweep_contract<Args>(args_, inputs, {{"out", &Args::out}}, call);
  const std::vector<float> expanded(6, 1.0f);
  row_index_[0] = 5;
  args_.expanded = {expanded.data(), {3, 2, 1}};
  args_.rows = ExpandedRows::kDropPad;
  test::sweep_contract<Args>(args_, inputs, {{"out", &Args::out}}, call);
}

TEST_F(FinalizeRouting, RowsAndExpertsThatAreNotThere) {
  row_index_[2] = 4;
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: row_index[2] = 4 is not in [-1, 4)");
  row_index_[2] = -2;
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: row_index[2] = -2 is not in [-1, 4)");
  args_.index_layout = IndexLayout::kColumn;
  row_index_ = {3, 0, 9, 1};  // of token 0, its second choice
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: row_index[2] = 9 is not in [-1, 4)");
  row_index_ = {3, 0, 2, 1};
  ids_[3] = 3;
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: expert_ids[1,1] = 3 is not in [0, 3)");
  ids_[3] = -1;
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: expert_ids[1,1] = -1 is not in [0, 3)");
  EXPECT_EQ(out_, (std::vector<float>{55, 55}));
}

TEST_F(FinalizeRouting, ViewsThatNeedOthers) {
  args_.skip1 = {};
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: skip2 is given, but skip1 is not");
  args_.skip2 = {};
  args_.expert_ids = {};
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: bias is given, but expert_ids is not");
  args_.bias = {};
  EXPECT_TRUE(ref::finalize_routing(args_).ok());
  args_.row_index = {row_index_.data(), {3}};
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: row_index.shape[0] = 3, expected T * K = 4 (from scales)");
  args_.scales = {};
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: row_index.shape[0] = 3, expected T * K = 2 (from out)");
  args_.row_index = {row_index_.data(), {2}};
  args_.expert_ids = {ids_.data(), {2, 2}};
  expect_refused(ref::finalize_routing(args_),
                 "finalize_routing: expert_ids.shape[1] = 2, expected K = 1 (from the absent "
                 "scales)");
}

// What init_routing sent out comes back: the sum of the scales of the slots that have a row.
TEST(FinalizeRoutingAfterInit, GivesTheTokens) {
  for (uint64_t round = 0; round < 50; ++round) {
    const uint64_t seed = test::seed_of(round);
    std::mt19937_64 random(seed);
    const int64_t T = 8, H = 3, K = 4, E = 5, C = 3, N = T * K;
    std::vector<float> x(static_cast<size_t>(T * H)), out(x.size());
    for (float& v : x) v = static_cast<float>(std::uniform_int_distribution(-9, 9)(random));
    std::vector<int32_t> ids(static_cast<size_t>(N)), row_index(ids.size());
    for (int32_t& id : ids) id = std::uniform_int_distribution<int32_t>(-1, E)(random);
    const std::vector<float> scales(ids.size(), 0.25f);
    for (const RoutingMode mode : {RoutingMode::kDropless, RoutingMode::kDropPad}) {
      const bool drop_pad = mode == RoutingMode::kDropPad;
      std::vector<float> expanded(static_cast<size_t>((drop_pad ? E * C : N) * H));
      InitRoutingArgs to;
      to.x = {x.data(), {T, H}};
      to.expert_ids = {ids.data(), {T, K}};
      to.expert_count = E;
      to.mode = mode;
      to.capacity = C;
      to.active_rows = 20;
      to.allow_masked = true;
      to.expanded_x =
          drop_pad ? TensorView(expanded.data(), {E, C, H}) : TensorView(expanded.data(), {N, H});
      to.row_index = {row_index.data(), {N}};
      ASSERT_TRUE(ref::init_routing(to).ok());
      FinalizeRoutingArgs from;
      from.expanded = to.expanded_x;
      from.row_index = to.row_index;
      from.scales = {scales.data(), {T, K}};
      from.rows = drop_pad ? ExpandedRows::kDropPad : ExpandedRows::kFlat;
      from.out = {out.data(), {T, H}};
      ASSERT_TRUE(ref::finalize_routing(from).ok());
      for (int64_t t = 0; t < T; ++t) {
        float weight = 0;
        for (int64_t k = 0; k < K; ++k) {
          const auto slot = static_cast<size_t>(t * K + k);
          if (ids[slot] == -1 || ids[slot] == E) {
            EXPECT_EQ(row_index[slot], -1) << test::replay_hint(seed);
          }
          if (row_index[slot] >= 0) weight += 0.25f;
        }
        for (int64_t j = 0; j < H; ++j) {
          const auto i = static_cast<size_t>(t * H + j);
          EXPECT_EQ(out[i], weight * x[i]) << test::replay_hint(seed);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moeops
