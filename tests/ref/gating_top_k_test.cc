// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::expect_refused;

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();

struct Result {
  std::vector<float> weights;
  std::vector<int32_t> ids;
  std::vector<float> scores;
};

// args holds the parameters; dense f32 rows of E.
Result gate(GatingTopKArgs args, const std::vector<float>& logits, int64_t E,
            const std::vector<float>& bias = {}) {
  const int64_t T = static_cast<int64_t>(logits.size()) / E;
  const auto chosen = static_cast<size_t>(T * args.k);
  Result result{std::vector<float>(chosen, 55.0f), std::vector<int32_t>(chosen, 55),
                std::vector<float>(logits.size(), 55.0f)};
  args.logits = {logits.data(), {T, E}};
  if (!bias.empty()) args.bias = {bias.data(), {E}};
  args.weights = {result.weights.data(), {T, args.k}};
  args.expert_ids = {result.ids.data(), {T, args.k}};
  args.scores = {result.scores.data(), {T, E}};
  const Status status = ref::gating_top_k(args);
  EXPECT_TRUE(status.ok()) << status.message();
  return result;
}

GatingTopKArgs softmax(int64_t k) {
  GatingTopKArgs args;
  args.k = k;
  return args;
}

GatingTopKArgs sigmoid(int64_t k) {
  GatingTopKArgs args;
  args.k = k;
  args.score = GatingScore::kSigmoid;
  return args;
}

GatingTopKArgs grouped(int64_t k, int64_t group_count, int64_t k_group, GroupSelect select) {
  GatingTopKArgs args = sigmoid(k);
  args.group_count = group_count;
  args.k_group = k_group;
  args.group_select = select;
  return args;
}

TEST(GatingTopK, SoftmaxTakesTheLargest) {
  const std::vector<float> logits = {std::log(1.0f), std::log(4.0f), std::log(2.0f),
                                     std::log(3.0f)};
  const Result r = gate(softmax(2), logits, 4);
  EXPECT_EQ(r.ids, (std::vector<int32_t>{1, 3}));
  EXPECT_NEAR(r.weights[0], 0.4f, 1e-6);
  EXPECT_NEAR(r.weights[1], 0.3f, 1e-6);
  for (size_t e = 0; e < 4; ++e) {
    EXPECT_NEAR(r.scores[e], (std::vector<float>{0.1f, 0.4f, 0.2f, 0.3f}[e]), 1e-6);
  }
}

TEST(GatingTopK, SoftmaxDoesNotOverflow) {
  EXPECT_EQ(gate(softmax(1), {1000, 1000, -kInf, 1000, 1000}, 5).scores,
            (std::vector<float>{0.25, 0.25, 0, 0.25, 0.25}));
}

TEST(GatingTopK, BiasChoosesButDoesNotWeigh) {
  const Result r = gate(sigmoid(3), {0, kInf, 0, -kInf}, 4, {3, 0, 1, 2});
  EXPECT_EQ(r.ids, (std::vector<int32_t>{0, 3, 2}));  // 3.5, 1, 1.5, 2
  EXPECT_EQ(r.weights, (std::vector<float>{0.5, 0, 0.5}));
  EXPECT_EQ(r.scores, (std::vector<float>{0.5, 1, 0.5, 0}));
  GatingTopKArgs args = sigmoid(2);
  args.renormalize = true;
  EXPECT_EQ(gate(args, {0, 0}, 2, {3, 0}).weights, (std::vector<float>{0.5, 0.5}));
}

TEST(GatingTopK, RenormalizeThenFactor) {
  GatingTopKArgs args = sigmoid(2);
  args.renormalize = true;
  args.routed_scaling_factor = 3;
  EXPECT_EQ(gate(args, {-kInf, 0, 0}, 3).weights, (std::vector<float>{1.5, 1.5}));
  args.eps = 1;
  EXPECT_EQ(gate(args, {-kInf, 0, 0}, 3).weights, (std::vector<float>{0.75, 0.75}));
  args.renormalize = false;
  EXPECT_EQ(gate(args, {-kInf, 0, 0}, 3).weights, (std::vector<float>{1.5, 1.5}));
  // With scores of 0 eps is all there is.
  args.renormalize = true;
  EXPECT_EQ(gate(args, {-kInf, -kInf, -kInf}, 3).weights, (std::vector<float>{0, 0}));
}

TEST(GatingTopK, KeepsTheBestGroups) {
  const std::vector<float> logits(8, 0.0f);
  const std::vector<float> bias = {9, 0, 5, 5, 8, 1, 0, 0};
  // Maxima 9, 5, 8, 0.
  EXPECT_EQ(gate(grouped(4, 4, 2, GroupSelect::kMax), logits, 8, bias).ids,
            (std::vector<int32_t>{0, 4, 5, 1}));
  // Sums 9, 10, 9, 0: of the equal groups 0 and 2 the lower stays.
  EXPECT_EQ(gate(grouped(4, 4, 2, GroupSelect::kTop2Sum), logits, 8, bias).ids,
            (std::vector<int32_t>{0, 2, 3, 1}));
}

TEST(GatingTopK, Top2SumTakesTheTwoLargestWhereverTheyAre) {
  const std::vector<float> logits(6, 0.0f);
  for (const std::vector<float>& bias :
       {std::vector<float>{2, 2, 2, 0, 1, 4},  // 4 and 5
        std::vector<float>{2, 2, 2, 4, 0, 1}, std::vector<float>{2, 2, 2, 1, 4, 0}}) {
    const Result r = gate(grouped(1, 2, 1, GroupSelect::kTop2Sum), logits, 6, bias);
    EXPECT_EQ(bias[static_cast<size_t>(r.ids[0])], 4);
  }
}

TEST(GatingTopK, OneGroupIsNotScored) {
  EXPECT_EQ(gate(grouped(1, 1, 1, GroupSelect::kTop2Sum), {0}, 1).ids, (std::vector<int32_t>{0}));
}

TEST(GatingTopK, NanRanksBelowMinusInfinity) {
  EXPECT_EQ(gate(sigmoid(4), {kNan, 0, kNan, 0}, 4, {0, -kInf, 0, 1}).ids,
            (std::vector<int32_t>{3, 1, 0, 2}));
  // Experts outside the kept groups have -inf, which is better than NaN.
  EXPECT_EQ(gate(grouped(2, 2, 1, GroupSelect::kMax), {kNan, 0, 0, 0}, 4, {0, 5, 4, 4}).ids,
            (std::vector<int32_t>{1, 2}));
}

TEST(GatingTopK, NanInGroupScores) {
  const std::vector<float> logits = {kNan, 0, 0, 0};
  const std::vector<float> bias = {0, 5, 4, 4};
  EXPECT_EQ(gate(grouped(1, 2, 1, GroupSelect::kMax), logits, 4, bias).ids,
            (std::vector<int32_t>{1}));
  EXPECT_EQ(gate(grouped(1, 2, 1, GroupSelect::kTop2Sum), logits, 4, bias).ids,
            (std::vector<int32_t>{2}));  // 5.5 + NaN is NaN
  EXPECT_EQ(gate(grouped(1, 2, 1, GroupSelect::kMax), {kNan, kNan, 0, 0}, 4, {9, 9, -9, -9}).ids,
            (std::vector<int32_t>{2}));
}

TEST(GatingTopK, ANonFiniteLogitIsItsTokensAlone) {
  const std::vector<float> clean = {1, 2, 3, 4, 5, 6, 9, 8, 7};
  for (const GatingTopKArgs& args : {softmax(2), sigmoid(2)}) {
    const Result expected = gate(args, clean, 3);
    for (const float bad : {kNan, kInf}) {
      std::vector<float> logits = clean;
      logits[4] = bad;
      const Result r = gate(args, logits, 3);
      for (const size_t i : std::vector<size_t>{0, 1, 4, 5}) {
        EXPECT_EQ(r.ids[i], expected.ids[i]);
        EXPECT_EQ(r.weights[i], expected.weights[i]);
      }
      for (const size_t i : std::vector<size_t>{0, 1, 2, 6, 7, 8})
        EXPECT_EQ(r.scores[i], expected.scores[i]);
    }
  }
  EXPECT_EQ(gate(softmax(2), {1, kNan, 3}, 3).ids, (std::vector<int32_t>{0, 1}));  // all NaN
}

// Against the definition of a ranking, with many ties and NaN.
TEST(GatingTopK, IdsAreDistinctAndRanked) {
  for (uint64_t round = 0; round < 50; ++round) {
    const uint64_t seed = test::seed_of(round);
    std::mt19937_64 random(seed);
    const auto draw = [&](int64_t low, int64_t high) {
      return std::uniform_int_distribution<int64_t>(low, high)(random);
    };
    const int64_t T = 5, E = draw(1, 20), K = draw(1, E);
    std::vector<float> logits(static_cast<size_t>(T * E));
    for (float& v : logits) v = draw(0, 9) == 0 ? kNan : static_cast<float>(draw(-2, 2));
    const Result r = gate(sigmoid(K), logits, E);
    for (int64_t t = 0; t < T; ++t) {
      const auto before = [&](int64_t a, int64_t b) {
        const float x = logits[static_cast<size_t>(t * E + a)];
        const float y = logits[static_cast<size_t>(t * E + b)];
        if (std::isnan(x) || std::isnan(y)) {
          return std::isnan(x) == std::isnan(y) ? a < b : std::isnan(y);
        }
        return x == y ? a < b : x > y;
      };
      const auto at = r.ids.begin() + t * K;
      const std::set<int64_t> ids(at, at + K);
      ASSERT_EQ(ids.size(), static_cast<size_t>(K)) << test::replay_hint(seed);
      for (int64_t k = 1; k < K; ++k) {
        EXPECT_TRUE(before(at[k - 1], at[k])) << test::replay_hint(seed);
      }
      for (int64_t e = 0; e < E; ++e) {
        EXPECT_TRUE(ids.contains(e) || before(at[K - 1], e)) << test::replay_hint(seed);
      }
    }
  }
}

TEST(GatingTopK, FinishedTokensAreMasked) {
  const std::vector<float> logits = {0, 1, 1, 0, 0, 1};
  const bool finished[] = {false, true, false};
  std::vector<float> weights(6);
  std::vector<int32_t> ids(6), row_index(6);
  GatingTopKArgs args = sigmoid(2);
  args.logits = {logits.data(), {3, 2}};
  args.finished = {finished, {3}};
  args.weights = {weights.data(), {3, 2}};
  args.expert_ids = {ids.data(), {3, 2}};
  args.row_index = {row_index.data(), {3, 2}};
  ASSERT_TRUE(ref::gating_top_k(args).ok());
  EXPECT_EQ(ids, (std::vector<int32_t>{1, 0, 2, 2, 1, 0}));
  EXPECT_EQ(weights, gate(sigmoid(2), logits, 2).weights);
  EXPECT_EQ(row_index, (std::vector<int32_t>{0, 3, 1, 4, 2, 5}));
}

TEST(GatingTopK, ReadsBf16AndF16) {
  const bf16 logits_bf16[] = {{0x0000}, {0xFF80}, {0x7F80}};  // 0, -inf, inf
  const f16 logits_f16[] = {{0x0000}, {0xFC00}, {0x7C00}};
  for (const ConstTensorView& logits :
       {ConstTensorView(logits_bf16, {1, 3}), ConstTensorView(logits_f16, {1, 3})}) {
    std::vector<float> weights(3);
    std::vector<int32_t> ids(3);
    GatingTopKArgs args = sigmoid(3);
    args.logits = logits;
    args.weights = {weights.data(), {1, 3}};
    args.expert_ids = {ids.data(), {1, 3}};
    ASSERT_TRUE(ref::gating_top_k(args).ok());
    EXPECT_EQ(ids, (std::vector<int32_t>{2, 0, 1})) << to_string(logits.dtype);
    EXPECT_EQ(weights, (std::vector<float>{1, 0.5, 0})) << to_string(logits.dtype);
  }
}

TEST(GatingTopK, RowsMayBeStrided) {
  const std::vector<float> logits = {0, kInf, 99, kInf, 0};
  std::vector<float> weights(3, 55.0f), scores(5, 55.0f);
  std::vector<int32_t> ids(4, 55), row_index(3, 55);
  GatingTopKArgs args = sigmoid(1);
  args.logits = {logits.data(), {2, 2}, 3};
  args.weights = {weights.data(), {2, 1}, 2};
  args.expert_ids = {ids.data(), {2, 1}, 3};
  args.scores = {scores.data(), {2, 2}, 3};
  args.row_index = {row_index.data(), {2, 1}, 2};
  ASSERT_TRUE(ref::gating_top_k(args).ok());
  EXPECT_EQ(weights, (std::vector<float>{1, 55, 1}));
  EXPECT_EQ(ids, (std::vector<int32_t>{1, 55, 55, 0}));
  EXPECT_EQ(scores, (std::vector<float>{0.5, 1, 55, 1, 0.5}));
  EXPECT_EQ(row_index, (std::vector<int32_t>{0, 55, 1}));
}

TEST(GatingTopK, NoTokens) { EXPECT_TRUE(gate(softmax(2), {}, 4).ids.empty()); }

class GatingTopKErrors : public testing::Test {
 protected:
  GatingTopKErrors() {
    args_.logits = {logits_, {2, 6}};
    args_.bias = {bias_, {6}};
    args_.finished = {finished_, {2}};
    args_.scores = {scores_, {2, 6}};
    resize(2);
  }
  // Outputs for that many experts a token.
  void resize(int64_t k) {
    args_.k = k;
    args_.weights = {weights_, {2, k}};
    args_.expert_ids = {ids_, {2, k}};
    args_.row_index = {row_index_, {2, k}};
  }
  Status call(int64_t k, int64_t group_count, int64_t k_group) {
    resize(k);
    args_.group_count = group_count;
    args_.k_group = k_group;
    return ref::gating_top_k(args_);
  }
  float logits_[12] = {}, bias_[6] = {}, scores_[12] = {}, weights_[16] = {};
  bool finished_[2] = {};
  int32_t ids_[16] = {}, row_index_[16] = {};
  GatingTopKArgs args_;
};

TEST_F(GatingTopKErrors, EveryViewIsChecked) {
  using Args = GatingTopKArgs;
  test::sweep_contract<Args>(args_,
                             {{"logits", &Args::logits},
                              {"bias", &Args::bias, false},
                              {"finished", &Args::finished, false}},
                             {{"weights", &Args::weights},
                              {"expert_ids", &Args::expert_ids},
                              {"scores", &Args::scores, false},
                              {"row_index", &Args::row_index, false}},
                             [](const Args& args) { return ref::gating_top_k(args); });
}

TEST_F(GatingTopKErrors, Parameters) {
  EXPECT_TRUE(call(4, 3, 2).ok());
  expect_refused(call(0, 1, 1), "gating_top_k: k = 0 is less than 1");
  expect_refused(call(-1, 1, 1), "gating_top_k: k = -1 is less than 1");
  expect_refused(call(2, 0, 1), "gating_top_k: group_count = 0 is less than 1");
  expect_refused(call(2, 3, 0), "gating_top_k: k_group = 0 is not in [1, group_count = 3]");
  expect_refused(call(2, 3, 4), "gating_top_k: k_group = 4 is not in [1, group_count = 3]");
  expect_refused(call(2, 4, 1), "gating_top_k: group_count = 4 does not divide the 6 experts");
  expect_refused(call(5, 3, 2), "gating_top_k: k = 5 is more than the 4 experts to choose from");
  expect_refused(call(7, 1, 1), "gating_top_k: k = 7 is more than the 6 experts to choose from");
  args_.group_select = GroupSelect::kTop2Sum;
  EXPECT_TRUE(call(4, 3, 2).ok());
  expect_refused(call(2, 6, 3), "gating_top_k: group_select is top2_sum, but a group has 1 expert");
}

TEST_F(GatingTopKErrors, IndicesFitInI32) {
  // Refused by its sizes alone: nothing is read through the views.
  const int64_t T = int64_t{1} << 30;
  args_ = softmax(2);
  args_.logits = {logits_, {T, 2}};
  args_.weights = {weights_, {T, 2}};
  args_.expert_ids = {ids_, {T, 2}};
  args_.row_index = {row_index_, {T, 2}};
  expect_refused(ref::gating_top_k(args_),
                 "gating_top_k: row_index: T * K = 1073741824 * 2 does not fit in i32");
  args_ = softmax(1);
  args_.logits = {logits_, {1, int64_t{1} << 31}};
  args_.weights = {weights_, {1, 1}};
  args_.expert_ids = {ids_, {1, 1}};
  expect_refused(ref::gating_top_k(args_), "gating_top_k: E = 2147483648 does not fit in i32");
}

}  // namespace
}  // namespace moeops
