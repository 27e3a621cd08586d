// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::expect_refused;

const float kNan = std::numeric_limits<float>::quiet_NaN();

class TokenPermute : public testing::Test {
 protected:
  // permuted has `rows` rows.
  Status run(int64_t num_out_tokens, int64_t rows) {
    permuted_.assign(static_cast<size_t>(2 * rows), 55.0f);
    args_.num_out_tokens = num_out_tokens;
    args_.tokens = {tokens_.data(), {3, 2}};
    args_.expert_ids = {ids_.data(), {3, 2}};
    args_.permuted = {permuted_.data(), {rows, 2}};
    args_.sorted_indices = {sorted_indices_.data(), {6}};
    return ref::token_permute(args_);
  }

  std::vector<float> tokens_ = {0, 1, 10, 11, 20, 21};
  // Slots by expert: 1, 2 | 0, 4, 5 | 3, of the tokens 0 1 | 0 2 2 | 1.
  std::vector<int32_t> ids_ = {2, 0, 0, INT32_MAX, 2, 2};
  std::vector<float> permuted_;
  std::vector<int32_t> sorted_indices_ = std::vector<int32_t>(6, 55);
  TokenPermuteArgs args_;
};

TEST_F(TokenPermute, SortsByExpertThenSlot) {
  ASSERT_TRUE(run(0, 6).ok());
  EXPECT_EQ(permuted_, (std::vector<float>{0, 1, 10, 11, 0, 1, 20, 21, 20, 21, 10, 11}));
  EXPECT_EQ(sorted_indices_, (std::vector<int32_t>{2, 0, 1, 5, 3, 4}));
}

TEST_F(TokenPermute, NumOutTokensKeepsTheFirstRows) {
  for (const int64_t num_out_tokens : {2, -4}) {
    ASSERT_TRUE(run(num_out_tokens, 2).ok());
    EXPECT_EQ(permuted_, (std::vector<float>{0, 1, 10, 11}));
    EXPECT_EQ(sorted_indices_, (std::vector<int32_t>{2, 0, 1, 5, 3, 4}));  // all of them
  }
  EXPECT_TRUE(run(6, 6).ok());
  EXPECT_TRUE(run(7, 6).ok());
  EXPECT_TRUE(run(-6, 0).ok());
  EXPECT_TRUE(run(-7, 0).ok());
  EXPECT_TRUE(run(INT64_MIN, 0).ok());
  expect_refused(run(-7, 1),
                 "token_permute: permuted.shape[0] = 1, expected M = 0 (from num_out_tokens)");
  expect_refused(run(-4, 3),
                 "token_permute: permuted.shape[0] = 3, expected M = 2 (from num_out_tokens)");
}

TEST_F(TokenPermute, NegativeIds) {
  ids_[3] = -1;
  expect_refused(run(0, 6), "token_permute: expert_ids[1,1] = -1 is negative");
  EXPECT_EQ(permuted_, std::vector<float>(12, 55.0f));
  EXPECT_EQ(sorted_indices_, std::vector<int32_t>(6, 55));
}

TEST_F(TokenPermute, EveryViewIsChecked) {
  using Args = TokenPermuteArgs;
  ASSERT_TRUE(run(0, 6).ok());
  test::sweep_contract<Args>(
      args_, {{"tokens", &Args::tokens}, {"expert_ids", &Args::expert_ids}},
      {{"permuted", &Args::permuted}, {"sorted_indices", &Args::sorted_indices}},
      [](const Args& args) { return ref::token_permute(args); });
}

TEST_F(TokenPermute, SlotsFitInI32) {
  // Refused by its sizes alone: nothing is read through the views.
  const int64_t T = int64_t{1} << 30;
  args_.tokens = {tokens_.data(), {T, 2}};
  args_.expert_ids = {ids_.data(), {T, 2}};
  args_.num_out_tokens = 1;
  permuted_.resize(2);
  args_.permuted = {permuted_.data(), {1, 2}};
  args_.sorted_indices = {sorted_indices_.data(), {2 * T}};
  expect_refused(ref::token_permute(args_),
                 "token_permute: T * K = 2147483648 does not fit in i32");
}

TEST_F(TokenPermute, StridedRowsOfAnyBits) {
  const uint16_t tokens[] = {0x7FC1, 0xFF80, 99, 0x7F81, 0x0001};
  const int32_t ids[] = {7, 99, 3};
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    std::vector<uint16_t> permuted(6, 55);
    args_.tokens = {tokens, TensorLayout(dtype, {2, 2}, 3)};
    args_.expert_ids = {ids, {2, 1}, 2};
    args_.permuted = {permuted.data(), TensorLayout(dtype, {2, 2}, 4)};
    args_.sorted_indices = {sorted_indices_.data(), {2}};
    ASSERT_TRUE(ref::token_permute(args_).ok());
    EXPECT_EQ(permuted, (std::vector<uint16_t>{0x7F81, 0x0001, 55, 55, 0x7FC1, 0xFF80}));
  }
}

TEST_F(TokenPermute, ZeroSizes) {
  args_.tokens = {static_cast<const float*>(nullptr), {0, 2}};
  args_.expert_ids = {static_cast<const int32_t*>(nullptr), {0, 2}};
  args_.permuted = {static_cast<float*>(nullptr), {0, 2}};
  args_.sorted_indices = {static_cast<int32_t*>(nullptr), {0}};
  EXPECT_TRUE(ref::token_permute(args_).ok());
  ids_ = {1, 0, 0, 1, 1, 1};
  args_.tokens = {static_cast<const float*>(nullptr), {3, 0}};
  args_.expert_ids = {ids_.data(), {3, 2}};
  args_.permuted = {static_cast<float*>(nullptr), {6, 0}};
  args_.sorted_indices = {sorted_indices_.data(), {6}};
  EXPECT_TRUE(ref::token_permute(args_).ok());
  EXPECT_EQ(sorted_indices_, (std::vector<int32_t>{2, 0, 1, 3, 4, 5}));
}

// Two rows of one column each, whatever their dtype.
class TokenUnpermute : public testing::Test {
 protected:
  TokenUnpermute() {
    args_.permuted = {permuted_.data(), {2, 1}};
    args_.sorted_indices = {sorted_indices_.data(), {4}};
    args_.probs = {probs_.data(), {2, 2}};
    args_.tokens = {tokens_.data(), {2, 1}};
  }
  std::vector<float> run() {
    const Status status = ref::token_unpermute(args_);
    EXPECT_TRUE(status.ok()) << status.message();
    return tokens_;
  }

  std::vector<float> permuted_ = {3, 5};
  std::vector<int32_t> sorted_indices_ = {1, 0, 0, 1};
  std::vector<float> probs_ = {1, 2, 10, 20};
  std::vector<float> tokens_ = {55, 55};
  TokenUnpermuteArgs args_;
};

TEST_F(TokenUnpermute, SumsTheWeightedRows) { EXPECT_EQ(run(), (std::vector<float>{11, 130})); }

TEST_F(TokenUnpermute, WithoutProbsEachTokenHasOneRow) {
  args_.probs = {};
  args_.sorted_indices = {sorted_indices_.data(), {2}};
  EXPECT_EQ(run(), (std::vector<float>{5, 3}));
}

TEST_F(TokenUnpermute, SkipsSlotsWithoutARowOrAWeight) {
  permuted_[0] = kNan;
  sorted_indices_ = {1, -1, 0, 1};
  probs_ = {1, kNan, 0, 20};
  EXPECT_EQ(run(), (std::vector<float>{5, 100}));
  probs_[2] = -0.0f;
  EXPECT_EQ(run(), (std::vector<float>{5, 100}));
  sorted_indices_ = {2, INT32_MIN, INT32_MAX, -7};
  EXPECT_EQ(run(), (std::vector<float>{0, 0}));
}

TEST_F(TokenUnpermute, NanReachesItsTokenOnly) {
  permuted_[0] = kNan;
  sorted_indices_ = {1, 1, 0, 1};
  EXPECT_EQ(run()[0], 15);
  EXPECT_TRUE(std::isnan(tokens_[1]));
}

TEST_F(TokenUnpermute, MultipliesAndAddsWithOneRounding) {
  // (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24; the last bit is lost when the product is rounded.
  permuted_ = {1 + 0x1p-11f, 1 + 0x1p-12f};
  sorted_indices_ = {0, 1, -1, -1};
  probs_ = {-1, 1 + 0x1p-12f, 0, 0};
  EXPECT_EQ(run()[0], 0x1p-24f);
}

TEST_F(TokenUnpermute, SumsInF32AndRoundsOnce) {
  // 256 + 1 is no bf16, 256 + 1 + 1 is.
  const bf16 rows[] = {{0x4380}, {0x3F80}};  // 256, 1
  sorted_indices_ = {0, 1, 1};
  probs_ = {1, 1, 1};
  bf16 token{};
  args_.permuted = {rows, {2, 1}};
  args_.sorted_indices = {sorted_indices_.data(), {3}};
  args_.probs = {probs_.data(), {1, 3}};
  args_.tokens = {&token, {1, 1}};
  ASSERT_TRUE(ref::token_unpermute(args_).ok());
  EXPECT_EQ(token.bits, 0x4381);  // 258
}

TEST_F(TokenUnpermute, RowsMayBeStrided) {
  const float permuted[] = {3, 4, 99, 5, 6};
  const float probs[] = {1, 99, 2};
  std::vector<float> tokens(6, 55.0f);
  args_.permuted = {permuted, {2, 2}, 3};
  args_.sorted_indices = {sorted_indices_.data(), {2}};
  args_.probs = {probs, {2, 1}, 2};
  args_.tokens = {tokens.data(), {2, 2}, 4};
  ASSERT_TRUE(ref::token_unpermute(args_).ok());
  EXPECT_EQ(tokens, (std::vector<float>{5, 6, 55, 55, 6, 8}));
}

TEST_F(TokenUnpermute, ZeroSizes) {
  args_.permuted = {static_cast<const float*>(nullptr), {0, 1}};
  EXPECT_EQ(run(), (std::vector<float>{0, 0}));
  tokens_ = {55, 55};
  args_.sorted_indices = {static_cast<const int32_t*>(nullptr), {0}};
  args_.probs = {static_cast<const float*>(nullptr), {2, 0}};
  EXPECT_EQ(run(), (std::vector<float>{0, 0}));
  args_.probs = {};
  args_.tokens = {static_cast<float*>(nullptr), {0, 1}};
  EXPECT_TRUE(ref::token_unpermute(args_).ok());
}

TEST_F(TokenUnpermute, EveryViewIsChecked) {
  using Args = TokenUnpermuteArgs;
  const auto call = [](const Args& args) { return ref::token_unpermute(args); };
  test::sweep_contract<Args>(args_,
                             {{"sorted_indices", &Args::sorted_indices}, {"probs", &Args::probs}},
                             {{"tokens", &Args::tokens}}, call);
  // Any number of rows is legal, so that the sweep does not fit `permuted`.
  for (const auto& [what, view] : test::sweep_internal::malformed(args_.permuted)) {
    if (what == "smaller shape[0]") continue;
    Args bad = args_;
    bad.permuted = view;
    EXPECT_EQ(call(bad).code(), StatusCode::kInvalidArgument) << what;
  }
  args_.tokens.data = permuted_.data();
  expect_refused(call(args_), "token_unpermute: output tokens overlaps input permuted");
}

TEST_F(TokenUnpermute, SizesAgree) {
  args_.sorted_indices = {sorted_indices_.data(), {3}};
  expect_refused(ref::token_unpermute(args_),
                 "token_unpermute: sorted_indices.shape[0] = 3, expected T * K = 4 (from probs)");
  args_.probs = {};
  expect_refused(ref::token_unpermute(args_),
                 "token_unpermute: sorted_indices.shape[0] = 3, expected T * K = 2 (from tokens)");
}

// Halves of a token's own rows make the token again, and rows that were not permuted are missing.
TEST(TokenPermuteAndBack, GivesTheTokens) {
  for (uint64_t round = 0; round < 50; ++round) {
    const uint64_t seed = test::seed_of(round);
    std::mt19937_64 random(seed);
    const int64_t T = 9, H = 3, K = 2, N = T * K, M = 11;
    std::vector<float> tokens(static_cast<size_t>(T * H)), back(tokens.size());
    for (float& v : tokens) v = std::normal_distribution<float>()(random);
    std::vector<int32_t> ids(static_cast<size_t>(N)), sorted_indices(ids.size());
    for (int32_t& id : ids) id = std::uniform_int_distribution<int32_t>(0, 4)(random);
    const std::vector<float> probs(ids.size(), 0.5f);
    for (const int64_t rows : {N, M}) {
      std::vector<float> permuted(static_cast<size_t>(rows * H));
      TokenPermuteArgs to;
      to.tokens = {tokens.data(), {T, H}};
      to.expert_ids = {ids.data(), {T, K}};
      to.num_out_tokens = rows;
      to.permuted = {permuted.data(), {rows, H}};
      to.sorted_indices = {sorted_indices.data(), {N}};
      ASSERT_TRUE(ref::token_permute(to).ok());
      TokenUnpermuteArgs from;
      from.permuted = to.permuted;
      from.sorted_indices = to.sorted_indices;
      from.probs = {probs.data(), {T, K}};
      from.tokens = {back.data(), {T, H}};
      ASSERT_TRUE(ref::token_unpermute(from).ok());
      for (size_t i = 0; i < tokens.size(); ++i) {
        const size_t t = i / static_cast<size_t>(H);
        const int rows_of_token =
            (sorted_indices[2 * t] < rows ? 1 : 0) + (sorted_indices[2 * t + 1] < rows ? 1 : 0);
        EXPECT_EQ(back[i], static_cast<float>(rows_of_token) * 0.5f * tokens[i])
            << test::replay_hint(seed);
      }
    }
  }
}

}  // namespace
}  // namespace moeops
