// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::expect_refused;

const float kNan = std::numeric_limits<float>::quiet_NaN();

// Three tokens; expert 0 takes token 2, expert 1 the tokens 0 and 2.
class PermuteWithMap : public testing::Test {
 protected:
  PermuteWithMap() {
    args_.tokens = {tokens_.data(), {3, 1}};
    args_.map = {map_, {3, 2}};
    args_.probs = {probs_.data(), {3, 2}};
    rows(3);
  }
  void rows(int64_t M) {
    permuted_.assign(static_cast<size_t>(M), 55.0f);
    sorted_indices_.assign(permuted_.size(), 55);
    permuted_probs_.assign(permuted_.size(), 55.0f);
    args_.permuted = {permuted_.data(), {M, 1}};
    args_.sorted_indices = {sorted_indices_.data(), {M}};
    args_.permuted_probs = {permuted_probs_.data(), {M}};
  }
  Status drop_and_pad(int64_t num_out_tokens) {
    args_.drop_and_pad = true;
    args_.num_out_tokens = num_out_tokens;
    return ref::permute_with_map(args_);
  }

  std::vector<float> tokens_ = {10, 20, 30};
  bool map_[6] = {false, true, false, false, true, true};
  std::vector<float> probs_ = {0, 1, 2, 3, 4, 5};
  std::vector<float> permuted_, permuted_probs_;
  std::vector<int32_t> sorted_indices_;
  PermuteWithMapArgs args_;
};

TEST_F(PermuteWithMap, ExpertsThenTokens) {
  args_.num_out_tokens = 99;  // not read
  ASSERT_TRUE(ref::permute_with_map(args_).ok());
  EXPECT_EQ(permuted_, (std::vector<float>{30, 10, 30}));
  EXPECT_EQ(sorted_indices_, (std::vector<int32_t>{2, 0, 2}));
  EXPECT_EQ(permuted_probs_, (std::vector<float>{4, 1, 5}));
  args_.probs = {};
  args_.permuted_probs = {};
  EXPECT_TRUE(ref::permute_with_map(args_).ok());
}

TEST_F(PermuteWithMap, PadsWithTokensThatWereNotChosen) {
  rows(4);
  ASSERT_TRUE(drop_and_pad(4).ok());
  EXPECT_EQ(sorted_indices_, (std::vector<int32_t>{2, 0, 0, 2}));
  EXPECT_EQ(permuted_, (std::vector<float>{30, 10, 10, 30}));
  EXPECT_EQ(permuted_probs_, (std::vector<float>{4, 0, 1, 5}));
  rows(6);
  ASSERT_TRUE(drop_and_pad(6).ok());
  EXPECT_EQ(sorted_indices_, (std::vector<int32_t>{2, 0, 1, 0, 2, 1}));
}

TEST_F(PermuteWithMap, DropsWhatDoesNotFit) {
  rows(2);
  ASSERT_TRUE(drop_and_pad(2).ok());
  EXPECT_EQ(sorted_indices_, (std::vector<int32_t>{2, 0}));
}

TEST_F(PermuteWithMap, StridedRowsOfAnyBits) {
  const uint16_t tokens[] = {0x7F81, 1, 99, 0xFFC1, 2};
  const bool map[] = {false, true, true, true};  // token 0: no; the second is behind the row
  const float probs[] = {1, 99, 99, 4};
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    std::vector<uint16_t> permuted(2, 55);
    args_.tokens = {tokens, TensorLayout(dtype, {2, 2}, 3)};
    args_.map = {map, {2, 1}, 2};
    args_.probs = {probs, {2, 1}, 3};
    args_.permuted = {permuted.data(), TensorLayout(dtype, {1, 2})};
    args_.sorted_indices = {sorted_indices_.data(), {1}};
    args_.permuted_probs = {permuted_probs_.data(), {1}};
    ASSERT_TRUE(ref::permute_with_map(args_).ok());
    EXPECT_EQ(permuted, (std::vector<uint16_t>{0xFFC1, 2}));
    EXPECT_EQ(permuted_probs_[0], 4);
  }
  rows(4);
  permuted_ = {55, 55, 55, 55, 55, 55, 55};
  args_.tokens = {tokens_.data(), {3, 1}};
  args_.map = {map_, {3, 2}};
  args_.probs = {probs_.data(), {3, 2}};
  args_.permuted = {permuted_.data(), {4, 1}, 2};
  ASSERT_TRUE(drop_and_pad(4).ok());
  EXPECT_EQ(permuted_, (std::vector<float>{30, 55, 10, 55, 10, 55, 30}));
}

TEST_F(PermuteWithMap, ZeroSizes) {
  rows(0);
  std::fill_n(map_, 6, false);
  EXPECT_TRUE(ref::permute_with_map(args_).ok());
  for (const auto& [T, E] : {std::pair<int64_t, int64_t>{0, 2}, {3, 0}, {0, 0}}) {
    args_.tokens = {tokens_.data(), {T, 1}};
    args_.map = {map_, {T, E}};
    args_.probs = {probs_.data(), {T, E}};
    args_.drop_and_pad = false;
    EXPECT_TRUE(ref::permute_with_map(args_).ok());
    EXPECT_TRUE(drop_and_pad(0).ok());
  }
  expect_refused(drop_and_pad(2),
                 "permute_with_map: num_out_tokens = 2, expected 0 for T = 0, E = 0");
}

TEST_F(PermuteWithMap, EveryViewIsChecked) {
  using Args = PermuteWithMapArgs;
  test::sweep_contract<Args>(
      args_, {{"tokens", &Args::tokens}, {"map", &Args::map}, {"probs", &Args::probs}},
      {{"permuted", &Args::permuted},
       {"sorted_indices", &Args::sorted_indices},
       {"permuted_probs", &Args::permuted_probs}},
      [](const Args& args) { return ref::permute_with_map(args); });
}

TEST_F(PermuteWithMap, Parameters) {
  rows(4);
  expect_refused(ref::permute_with_map(args_),
                 "permute_with_map: permuted.shape[0] = 4, expected M = 3 (from map)");
  expect_refused(drop_and_pad(2),
                 "permute_with_map: permuted.shape[0] = 4, expected M = 2 (from num_out_tokens)");
  expect_refused(drop_and_pad(5),
                 "permute_with_map: num_out_tokens = 5 is not a multiple of E = 2");
  expect_refused(drop_and_pad(0),
                 "permute_with_map: num_out_tokens / E = 0 / 2 is not in [1, T = 3]");
  expect_refused(drop_and_pad(-2),
                 "permute_with_map: num_out_tokens / E = -2 / 2 is not in [1, T = 3]");
  expect_refused(drop_and_pad(8),
                 "permute_with_map: num_out_tokens / E = 8 / 2 is not in [1, T = 3]");
  rows(3);
  args_.drop_and_pad = false;
  args_.probs = {};
  expect_refused(ref::permute_with_map(args_),
                 "permute_with_map: permuted_probs is given, but probs is not");
}

TEST_F(PermuteWithMap, TokensFitInI32) {
  // Refused by its sizes alone: nothing is read through the views.
  const int64_t T = int64_t{1} << 31;
  args_.tokens = {tokens_.data(), {T, 1}};
  args_.map = {map_, {T, 2}};
  args_.probs = {};
  args_.permuted_probs = {};
  expect_refused(ref::permute_with_map(args_),
                 "permute_with_map: T = 2147483648 does not fit in i32");
}

class UnpermuteWithMap : public testing::Test {
 protected:
  UnpermuteWithMap() {
    args_.permuted = {permuted_.data(), {4, 1}};
    args_.sorted_indices = {sorted_indices_.data(), {4}};
    args_.permuted_probs = {probs_.data(), {4}};
    args_.num_tokens = 3;
    args_.tokens = {tokens_.data(), {3, 1}};
  }
  std::vector<float> run() {
    const Status status = ref::unpermute_with_map(args_);
    EXPECT_TRUE(status.ok()) << status.message();
    return tokens_;
  }

  std::vector<float> permuted_ = {3, 5, 7, 9};
  std::vector<int32_t> sorted_indices_ = {2, 0, 2, 2};
  std::vector<float> probs_ = {1, 10, 100, 1000};
  std::vector<float> tokens_ = {55, 55, 55};
  UnpermuteWithMapArgs args_;
};

TEST_F(UnpermuteWithMap, AddsEachRowToItsToken) {
  EXPECT_EQ(run(), (std::vector<float>{50, 0, 9703}));
  args_.permuted_probs = {};
  EXPECT_EQ(run(), (std::vector<float>{5, 0, 19}));
}

TEST_F(UnpermuteWithMap, AddsInTheOrderOfTheRows) {
  permuted_ = {1, 1, 0x1p24f, -0x1p24f};
  sorted_indices_ = {0, 0, 0, 0};
  probs_ = {1, 1, 1, 1};
  EXPECT_EQ(run()[0], 2);  // 2^24 + 2 is exact
  permuted_ = {0x1p24f, 1, 1, -0x1p24f};
  EXPECT_EQ(run()[0], 0);  // 2^24 + 1 rounds to 2^24
}

TEST_F(UnpermuteWithMap, MultiplyAndAddRoundSeparately) {
  // (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24; the last bit is lost when the product is rounded.
  permuted_ = {1 + 0x1p-11f, 1 + 0x1p-12f, 0, 0};
  sorted_indices_ = {0, 0, 1, 1};
  probs_ = {-1, 1 + 0x1p-12f, 0, 0};
  EXPECT_EQ(run()[0], 0);
}

TEST_F(UnpermuteWithMap, NanReachesItsTokenOnly) {
  permuted_[1] = kNan;
  EXPECT_EQ(run()[2], 9703);
  EXPECT_EQ(tokens_[1], 0);
  EXPECT_TRUE(std::isnan(tokens_[0]));
}

TEST_F(UnpermuteWithMap, SumsInF32AndRoundsOnce) {
  const bf16 rows[] = {{0x4380}, {0x3F80}, {0x3F80}};  // 256 + 1 is no bf16, 256 + 1 + 1 is
  const int32_t sorted_indices[] = {0, 0, 0};
  bf16 token{};
  args_.permuted = {rows, {3, 1}};
  args_.sorted_indices = {sorted_indices, {3}};
  args_.permuted_probs = {};
  args_.num_tokens = 1;
  args_.tokens = {&token, {1, 1}};
  ASSERT_TRUE(ref::unpermute_with_map(args_).ok());
  EXPECT_EQ(token.bits, 0x4381);  // 258
}

TEST_F(UnpermuteWithMap, RowsMayBeStrided) {
  const float permuted[] = {1, 2, 99, 3, 4};
  std::vector<float> tokens(6, 55.0f);
  sorted_indices_ = {1, 0};
  args_.permuted = {permuted, {2, 2}, 3};
  args_.sorted_indices = {sorted_indices_.data(), {2}};
  args_.permuted_probs = {};
  args_.num_tokens = 2;
  args_.tokens = {tokens.data(), {2, 2}, 4};
  ASSERT_TRUE(ref::unpermute_with_map(args_).ok());
  EXPECT_EQ(tokens, (std::vector<float>{3, 4, 55, 55, 1, 2}));
}

TEST_F(UnpermuteWithMap, ZeroSizes) {
  args_.permuted = {static_cast<const float*>(nullptr), {0, 1}};
  args_.sorted_indices = {static_cast<const int32_t*>(nullptr), {0}};
  args_.permuted_probs = {static_cast<const float*>(nullptr), {0}};
  EXPECT_EQ(run(), (std::vector<float>{0, 0, 0}));
  args_.num_tokens = 0;
  args_.tokens = {static_cast<float*>(nullptr), {0, 1}};
  EXPECT_TRUE(ref::unpermute_with_map(args_).ok());
}

TEST_F(UnpermuteWithMap, EveryViewIsChecked) {
  using Args = UnpermuteWithMapArgs;
  test::sweep_contract<Args>(args_,
                             {{"permuted", &Args::permuted},
                              {"sorted_indices", &Args::sorted_indices},
                              {"permuted_probs", &Args::permuted_probs, false}},
                             {{"tokens", &Args::tokens}},
                             [](const Args& args) { return ref::unpermute_with_map(args); });
}

TEST_F(UnpermuteWithMap, IndicesOutsideTheTokens) {
  sorted_indices_[3] = 3;
  expect_refused(ref::unpermute_with_map(args_),
                 "unpermute_with_map: sorted_indices[3] = 3 is not in [0, 3)");
  sorted_indices_[1] = -1;
  expect_refused(ref::unpermute_with_map(args_),
                 "unpermute_with_map: sorted_indices[1] = -1 is not in [0, 3)");
  EXPECT_EQ(tokens_, (std::vector<float>{55, 55, 55}));
  args_.num_tokens = -1;
  expect_refused(ref::unpermute_with_map(args_), "unpermute_with_map: num_tokens = -1 is negative");
  args_.num_tokens = 2;
  expect_refused(ref::unpermute_with_map(args_),
                 "unpermute_with_map: tokens.shape[0] = 3, expected T = 2 (from num_tokens)");
}

// Each token comes back as often as it went out, in both modes.
TEST(PermuteWithMapAndBack, GivesTheTokens) {
  for (uint64_t round = 0; round < 50; ++round) {
    const uint64_t seed = test::seed_of(round);
    std::mt19937_64 random(seed);
    const int64_t T = 7, H = 3, E = 4, capacity = 3;
    std::vector<float> tokens(static_cast<size_t>(T * H)), back(tokens.size());
    for (float& v : tokens) v = static_cast<float>(std::uniform_int_distribution(-9, 9)(random));
    const auto map = std::make_unique<bool[]>(static_cast<size_t>(T * E));
    for (int64_t i = 0; i < T * E; ++i) map[static_cast<size_t>(i)] = random() % 2 == 0;
    for (const bool drop_and_pad : {false, true}) {
      const int64_t M =
          drop_and_pad ? E * capacity : std::count(map.get(), map.get() + T * E, true);
      std::vector<float> permuted(static_cast<size_t>(M * H));
      std::vector<int32_t> sorted_indices(static_cast<size_t>(M));
      PermuteWithMapArgs to;
      to.tokens = {tokens.data(), {T, H}};
      to.map = {map.get(), {T, E}};
      to.drop_and_pad = drop_and_pad;
      to.num_out_tokens = E * capacity;
      to.permuted = {permuted.data(), {M, H}};
      to.sorted_indices = {sorted_indices.data(), {M}};
      ASSERT_TRUE(ref::permute_with_map(to).ok());
      UnpermuteWithMapArgs from;
      from.permuted = to.permuted;
      from.sorted_indices = to.sorted_indices;
      from.num_tokens = T;
      from.tokens = {back.data(), {T, H}};
      ASSERT_TRUE(ref::unpermute_with_map(from).ok());
      for (int64_t t = 0; t < T; ++t) {
        const auto times = drop_and_pad
                               ? std::count(sorted_indices.begin(), sorted_indices.end(), t)
                               : std::count(map.get() + t * E, map.get() + (t + 1) * E, true);
        for (int64_t j = 0; j < H; ++j) {
          const auto i = static_cast<size_t>(t * H + j);
          EXPECT_EQ(back[i], static_cast<float>(times) * tokens[i]) << test::replay_hint(seed);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moeops
