// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/token_permute.h>
#include <moeops/ref/ref.h>

#include <functional>
#include <numeric>

#include "tests/ops/routing_support.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"

namespace moeops {
namespace {

using test::expect_refused;
using test::RoutingDraw;

const float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr uint64_t kRounds = 1200;

template <class Body>
void for_rounds(Body body) {
  for (uint64_t round = 0; round < kRounds; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    RoutingDraw draw(seed);
    body(draw);
    if (testing::Test::HasFatalFailure()) return;
  }
}

int64_t random_tokens(RoutingDraw& draw) {
  return draw.percent(80) ? draw.between(0, 12) : draw.between(13, 90);
}

DType random_dtype(RoutingDraw& draw) { return draw.of({DType::kF32, DType::kBf16, DType::kF16}); }

TEST(TokenPermuteOpt, MatchesTheReference) {
  for_rounds([](RoutingDraw& draw) {
    const int64_t T = random_tokens(draw), K = draw.of<int64_t>({0, 1, 2, 3, 8}),
                  H = draw.columns(), N = T * K;
    const DType dtype = random_dtype(draw);
    TokenPermuteArgs args;
    args.tokens = draw.floats(dtype, {T, H});
    // Ids that are counted as they are, or numbered first by one, two or three digits.
    const int64_t most = draw.of<int64_t>({0, 7, 300, 2000, 100'000, INT32_MAX});
    args.expert_ids = draw.integers(DType::kI32, {T, K}, 0, most);
    if (N > 0 && draw.percent(5)) {
      const int64_t slot = draw.between(0, N - 1);
      const_cast<int32_t*>(args.expert_ids.row<int32_t>(slot / K))[slot % K] =
          draw.of({-1, INT32_MIN});
    }
    if (draw.percent(60)) args.num_out_tokens = draw.between(-N - 2, N + 2);
    int64_t M = N;
    if (args.num_out_tokens > 0) M = std::min(N, args.num_out_tokens);
    if (args.num_out_tokens < 0) M = std::max<int64_t>(0, N + args.num_out_tokens);
    args.permuted = draw.view(dtype, {M, H});
    args.sorted_indices = draw.view(DType::kI32, {N});
    test::expect_like_reference(args,
                                {&TokenPermuteArgs::permuted, &TokenPermuteArgs::sorted_indices},
                                draw, ref::token_permute, token_permute);
  });
}

TEST(TokenUnpermuteOpt, MatchesTheReference) {
  for_rounds([](RoutingDraw& draw) {
    const bool probs = draw.percent(80);
    const int64_t T = random_tokens(draw), K = probs ? draw.of<int64_t>({0, 1, 2, 3, 8, 40}) : 1,
                  H = draw.columns(), M = draw.between(0, T * K + 1);
    const DType dtype = random_dtype(draw);
    TokenUnpermuteArgs args;
    args.permuted = draw.floats(dtype, {M, H});
    args.sorted_indices = draw.integers(DType::kI32, {T * K}, -2, M + 1);
    if (probs) args.probs = draw.floats(DType::kF32, {T, K}, 10);
    args.tokens = draw.view(dtype, {T, H});
    test::expect_like_reference(args, {&TokenUnpermuteArgs::tokens}, draw, ref::token_unpermute,
                                token_unpermute);
  });
}

TEST(PermuteWithMapOpt, MatchesTheReference) {
  for_rounds([](RoutingDraw& draw) {
    const int64_t T = random_tokens(draw), H = draw.columns(),
                  E = draw.percent(80) ? draw.between(0, 20) : draw.between(21, 90);
    const DType dtype = random_dtype(draw);
    PermuteWithMapArgs args;
    args.tokens = draw.floats(dtype, {T, H});
    const int64_t often = draw.between(0, 3);  // of how many places one is set
    TensorView map = draw.integers(DType::kBool, {T, E}, -often * 2, 1);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t e = 0; e < E; ++e) {
        uint8_t& set = map.row<uint8_t>(t)[e];
        // Whatever is not 0 sets the place.
        set = set > 127 || set == 0 ? 0 : draw.percent(90) ? 1 : 2;
      }
    }
    args.map = map;
    if (draw.percent(50)) args.probs = draw.floats(DType::kF32, {T, E});
    int64_t M = 0;
    if (draw.percent(50)) {
      args.drop_and_pad = true;
      const bool legal = draw.percent(90);
      args.num_out_tokens = T == 0 || E == 0 ? (legal ? 0 : 3)
                            : legal          ? E * draw.between(1, T)
                                             : draw.between(-1, E * T + E);
      M = std::max<int64_t>(args.num_out_tokens, 0);
    } else {
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t e = 0; e < E; ++e) M += map.row<uint8_t>(t)[e] != 0 ? 1 : 0;
      }
      if (draw.percent(5)) ++M;
    }
    args.permuted = draw.view(dtype, {M, H});
    args.sorted_indices = draw.view(DType::kI32, {M});
    if (args.probs.present()) args.permuted_probs = draw.view(DType::kF32, {M});
    test::expect_like_reference(args,
                                {&PermuteWithMapArgs::permuted, &PermuteWithMapArgs::sorted_indices,
                                 &PermuteWithMapArgs::permuted_probs},
                                draw, ref::permute_with_map, permute_with_map);
  });
}

TEST(UnpermuteWithMapOpt, MatchesTheReference) {
  for_rounds([](RoutingDraw& draw) {
    // Also far more tokens than rows: then only the tokens that have rows are counted.
    const int64_t T = draw.percent(85) ? random_tokens(draw) : 1500,
                  M = T == 0 ? draw.of<int64_t>({0, 0, 2}) : draw.between(0, 60),
                  H = T > 1000 ? draw.between(0, 20) : draw.columns();
    const DType dtype = random_dtype(draw);
    UnpermuteWithMapArgs args;
    args.permuted = draw.floats(dtype, {M, H});
    args.sorted_indices = draw.integers(DType::kI32, {M}, 0, std::max<int64_t>(T - 1, 0));
    if (M > 0 && draw.percent(5)) {
      const_cast<int32_t*>(args.sorted_indices.row<int32_t>(0))[draw.between(0, M - 1)] =
          draw.of({-1, static_cast<int32_t>(T), INT32_MAX, INT32_MIN});
    }
    if (draw.percent(70)) args.permuted_probs = draw.floats(DType::kF32, {M}, 10);
    args.num_tokens = T;
    args.tokens = draw.view(dtype, {T, H});
    test::expect_like_reference(args, {&UnpermuteWithMapArgs::tokens}, draw,
                                ref::unpermute_with_map, unpermute_with_map);
  });
}

// A million tokens with any ids, there and back.
TEST(TokenPermuteOpt, AMillionTokensThereAndBack) {
  constexpr int64_t T = 1'000'000, K = 2;
  std::mt19937_64 random(3);
  std::vector<float> tokens(T), permuted(T * K), back(T);
  std::vector<int32_t> ids(T * K), rows(T * K);
  for (float& v : tokens) v = std::normal_distribution<float>()(random);
  const std::vector<float> probs(T * K, 0.5f);
  for (const int64_t most : {int64_t{255}, int64_t{INT32_MAX}}) {
    for (int32_t& id : ids) {
      id = static_cast<int32_t>(std::uniform_int_distribution<int64_t>(0, most)(random));
    }
    for (const int threads : {1, 2, 7}) {
      Context ctx({.threads = threads});
      TokenPermuteArgs there;
      there.tokens = {tokens.data(), {T, 1}};
      there.expert_ids = {ids.data(), {T, K}};
      there.permuted = {permuted.data(), {T * K, 1}};
      there.sorted_indices = {rows.data(), {T * K}};
      ASSERT_TRUE(token_permute(ctx, there).ok());
      std::vector<int32_t> slot_of(rows.size(), -1);
      for (size_t slot = 0; slot < rows.size(); ++slot) {
        ASSERT_EQ(slot_of[static_cast<size_t>(rows[slot])], -1);
        slot_of[static_cast<size_t>(rows[slot])] = static_cast<int32_t>(slot);
      }
      for (size_t i = 1; i < slot_of.size(); ++i) {
        const auto a = static_cast<size_t>(slot_of[i - 1]), b = static_cast<size_t>(slot_of[i]);
        ASSERT_TRUE(ids[a] < ids[b] || (ids[a] == ids[b] && a < b)) << "row " << i;
      }
      TokenUnpermuteArgs way_back;
      way_back.permuted = {permuted.data(), {T * K, 1}};
      way_back.sorted_indices = {rows.data(), {T * K}};
      way_back.probs = {probs.data(), {T, K}};
      way_back.tokens = {back.data(), {T, 1}};
      ASSERT_TRUE(token_unpermute(ctx, way_back).ok());
      ASSERT_EQ(back, tokens);
    }
  }
}

TEST(TokenPermuteOpt, UnpermuteBringsEveryTokenBack) {
  const test::LargeCallPaths large;
  for (const Isa isa : test::routing_isas()) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      RoutingDraw draw(5);
      const int64_t T = 50, H = 77;
      Context ctx({.threads = 3, .isa = isa});
      TokenPermuteArgs there;
      there.tokens = draw.floats(dtype, {T, H}, 0);
      there.expert_ids = draw.integers(DType::kI32, {T, 1}, 0, 12);
      there.permuted = draw.view(dtype, {T, H});
      there.sorted_indices = draw.view(DType::kI32, {T});
      ASSERT_TRUE(token_permute(ctx, there).ok());
      TokenUnpermuteArgs back;
      back.permuted = there.permuted;
      back.sorted_indices = there.sorted_indices;
      back.tokens = draw.view(dtype, {T, H});
      ASSERT_TRUE(token_unpermute(ctx, back).ok());
      const auto row_bytes = static_cast<size_t>(H * size_of(dtype));
      const auto row = [&](const auto& v, int64_t t) {
        return static_cast<const char*>(v.data) + t * v.row_stride * size_of(dtype);
      };
      for (int64_t t = 0; t < T; ++t) {
        EXPECT_EQ(0, std::memcmp(row(there.tokens, t), row(back.tokens, t), row_bytes));
      }
    }
  }
}

TEST(PermuteWithMapOpt, UnpermuteBringsEveryTokenBack) {
  const test::LargeCallPaths large;
  const int64_t T = 64, E = 24, H = 33;
  for (const Isa isa : test::routing_isas()) {
    RoutingDraw draw(7);
    Context ctx({.threads = 3, .isa = isa});
    PermuteWithMapArgs there;
    there.tokens = draw.floats(DType::kBf16, {T, H}, 0);
    const TensorView map = draw.integers(DType::kBool, {T, E}, 0, 0);
    const TensorView probs = draw.floats(DType::kF32, {T, E});
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t k = 0; k < 4; ++k) {  // four of them, a quarter each
        const int64_t e = (t * 5 + k * 7) % E;
        map.row<uint8_t>(t)[e] = 1;
        probs.row<float>(t)[e] = 0.25f;
      }
    }
    there.map = map;
    there.probs = probs;
    there.permuted = draw.view(DType::kBf16, {T * 4, H});
    there.sorted_indices = draw.view(DType::kI32, {T * 4});
    there.permuted_probs = draw.view(DType::kF32, {T * 4});
    ASSERT_TRUE(permute_with_map(ctx, there).ok());
    UnpermuteWithMapArgs back;
    back.permuted = there.permuted;
    back.sorted_indices = there.sorted_indices;
    back.permuted_probs = there.permuted_probs;
    back.num_tokens = T;
    back.tokens = draw.view(DType::kBf16, {T, H});
    ASSERT_TRUE(unpermute_with_map(ctx, back).ok());
    for (int64_t t = 0; t < T; ++t) {
      EXPECT_EQ(0, std::memcmp(there.tokens.row<bf16>(t), back.tokens.row<bf16>(t),
                               static_cast<size_t>(H) * sizeof(bf16)));
    }
  }
}

// 30 tokens of two rows each, in some order.
struct Sums {
  Sums() : draw(9) {
    permuted = draw.floats(DType::kBf16, {2 * T, H}, 0);
    rows = draw.integers(DType::kI32, {2 * T}, 0, 0);
    for (int64_t i = 0; i < 2 * T; ++i) {
      rows.row<int32_t>(0)[i] = static_cast<int32_t>((i * 23 + 5) % (2 * T));
    }
    probs = draw.floats(DType::kF32, {T, 2}, 0);
    tokens = draw.view(DType::kBf16, {T, H});
    args.permuted = permuted;
    args.sorted_indices = rows;
    args.probs = probs;
    args.tokens = tokens;
  }
  std::vector<uint16_t> result(int64_t t) const {
    const auto* row = tokens.row<uint16_t>(t);
    return {row, row + H};
  }
  static constexpr int64_t T = 30, H = 45;
  RoutingDraw draw;
  TensorView permuted, rows, probs, tokens;
  TokenUnpermuteArgs args;
};

TEST(TokenUnpermuteOpt, APoisonedRowReachesItsTokenOnly) {
  const test::LargeCallPaths large;
  for (const Isa isa : test::routing_isas()) {
    Sums sums;
    Context ctx({.threads = 3, .isa = isa});
    ASSERT_TRUE(token_unpermute(ctx, sums.args).ok());
    std::vector<std::vector<uint16_t>> clean;
    for (int64_t t = 0; t < Sums::T; ++t) clean.push_back(sums.result(t));
    const int64_t row = sums.rows.row<int32_t>(0)[2 * 13 + 1];
    for (int64_t j = 0; j < Sums::H; ++j) sums.permuted.row<bf16>(row)[j] = to_bf16(kNan);
    ASSERT_TRUE(token_unpermute(ctx, sums.args).ok());
    for (int64_t t = 0; t < Sums::T; ++t) {
      if (t != 13) {
        EXPECT_EQ(sums.result(t), clean[static_cast<size_t>(t)]);
      }
    }
    for (int64_t j = 0; j < Sums::H; ++j) {
      EXPECT_TRUE(std::isnan(to_f32(sums.tokens.row<bf16>(13)[j])));
    }
    // Not even there when its weight is 0.
    sums.probs.row<float>(13)[1] = -0.0f;
    ASSERT_TRUE(token_unpermute(ctx, sums.args).ok());
    for (int64_t j = 0; j < Sums::H; ++j) {
      EXPECT_FALSE(std::isnan(to_f32(sums.tokens.row<bf16>(13)[j])));
    }
  }
}

TEST(TokenPermuteOpt, AllocateNothingAfterTheFirstCall) {
  Context ctx({.threads = 2});
  const test::LargeCallPaths large;
  RoutingDraw draw(11);
  const int64_t T = 16, K = 4, H = 50;
  TokenPermuteArgs permute;
  permute.tokens = draw.floats(DType::kBf16, {T, H});
  permute.permuted = draw.view(DType::kBf16, {T * K, H});
  permute.sorted_indices = draw.view(DType::kI32, {T * K});
  const TensorView ids = draw.view(DType::kI32, {T, K});
  permute.expert_ids = ids;
  test::expect_no_allocation([&] {
    const int64_t most = draw.of<int64_t>({3, 3000, INT32_MAX});
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t k = 0; k < K; ++k) {
        ids.row<int32_t>(t)[k] = static_cast<int32_t>(draw.between(0, most));
      }
    }
    return token_permute(ctx, permute);
  });
  Sums sums;
  test::expect_no_allocation([&] { return token_unpermute(ctx, sums.args); });

  PermuteWithMapArgs with_map;
  with_map.tokens = permute.tokens;
  with_map.map = draw.integers(DType::kBool, {T, K}, 1, 1);
  with_map.permuted = permute.permuted;
  with_map.sorted_indices = permute.sorted_indices;
  test::expect_no_allocation([&] { return permute_with_map(ctx, with_map); });
  UnpermuteWithMapArgs back;
  back.permuted = permute.permuted;
  back.sorted_indices = permute.sorted_indices;
  back.num_tokens = T;
  back.tokens = draw.view(DType::kBf16, {T, H});
  test::expect_no_allocation([&] { return unpermute_with_map(ctx, back); });
}

class PermuteErrors : public testing::Test {
 protected:
  Context ctx_;
  std::vector<float> tokens_ = std::vector<float>(12, 1.0f);
  std::vector<float> permuted_ = std::vector<float>(24, 55.0f);
  std::vector<float> probs_ = std::vector<float>(8, 0.5f);
  std::vector<float> row_probs_ = std::vector<float>(8, 55.0f);
  std::vector<int32_t> ids_ = {1, 0, 2, 1, 0, 3, 3, 2};
  std::vector<int32_t> rows_ = std::vector<int32_t>(8, 55);
  std::vector<uint8_t> map_ = {1, 1, 0, 1, 1, 1, 1, 0};
};

TEST_F(PermuteErrors, TokenPermute) {
  using Args = TokenPermuteArgs;
  const auto call = [&](const Args& args) { return token_permute(ctx_, args); };
  Args args;
  args.tokens = {tokens_.data(), {4, 3}};
  args.expert_ids = {ids_.data(), {4, 2}};
  args.permuted = {permuted_.data(), {8, 3}};
  args.sorted_indices = {rows_.data(), {8}};
  test::sweep_contract<Args>(
      args, {{"tokens", &Args::tokens}, {"expert_ids", &Args::expert_ids}},
      {{"permuted", &Args::permuted}, {"sorted_indices", &Args::sorted_indices}}, call);
  std::fill(permuted_.begin(), permuted_.end(), 55.0f);
  for (const int threads : {1, 3}) {
    const test::LargeCallPaths large;
    Context ctx({.threads = threads});
    ids_[5] = -7;
    expect_refused(token_permute(ctx, args), "token_permute: expert_ids[2,1] = -7 is negative");
  }
  EXPECT_EQ(permuted_, std::vector<float>(24, 55.0f));
  args.num_out_tokens = -3;
  expect_refused(call(args),
                 "token_permute: permuted.shape[0] = 8, expected M = 5 (from num_out_tokens)");
  args.num_out_tokens = 0;
  const int64_t T = int64_t{1} << 30;
  args.tokens.shape[0] = args.expert_ids.shape[0] = T;
  args.permuted.shape = {2 * T, 0};
  args.tokens.shape[1] = 0;
  args.sorted_indices = {rows_.data(), {2 * T}};
  expect_refused(call(args), "token_permute: T * K = 2147483648 does not fit in i32");
}

TEST_F(PermuteErrors, TokenUnpermute) {
  using Args = TokenUnpermuteArgs;
  Args args;
  rows_ = {0, 3, 1, 2, 7, 6, 5, 4};
  args.permuted = {permuted_.data(), {8, 3}};
  args.sorted_indices = {rows_.data(), {8}};
  args.probs = {probs_.data(), {4, 2}};
  args.tokens = {tokens_.data(), {4, 3}};
  const auto call = [&](const Args& a) { return token_unpermute(ctx_, a); };
  test::sweep_contract<Args>(args,
                             {{"sorted_indices", &Args::sorted_indices}, {"probs", &Args::probs}},
                             {{"tokens", &Args::tokens}}, call);
  // Any number of rows is legal, so that the sweep does not fit `permuted`.
  for (const auto& [what, view] : test::sweep_internal::malformed(args.permuted)) {
    if (what == "smaller shape[0]") continue;
    Args bad = args;
    bad.permuted = view;
    EXPECT_EQ(call(bad).code(), StatusCode::kInvalidArgument) << what;
  }
  args.tokens.data = permuted_.data();
  expect_refused(call(args), "token_unpermute: output tokens overlaps input permuted");
}

TEST_F(PermuteErrors, PermuteWithMap) {
  using Args = PermuteWithMapArgs;
  const auto call = [&](const Args& args) { return permute_with_map(ctx_, args); };
  Args args;
  args.tokens = {tokens_.data(), {4, 3}};
  args.map = {map_.data(), TensorLayout(DType::kBool, {4, 2})};
  args.probs = {probs_.data(), {4, 2}};
  args.permuted = {permuted_.data(), {6, 3}};
  args.sorted_indices = {rows_.data(), {6}};
  args.permuted_probs = {row_probs_.data(), {6}};
  const std::vector<test::InputView<Args>> inputs = {
      {"tokens", &Args::tokens}, {"map", &Args::map}, {"probs", &Args::probs}};
  const std::vector<test::OutputView<Args>> outputs = {{"permuted", &Args::permuted},
                                                       {"sorted_indices", &Args::sorted_indices},
                                                       {"permuted_probs", &Args::permuted_probs}};
  test::sweep_contract<Args>(args, inputs, outputs, call);
  std::fill(permuted_.begin(), permuted_.end(), 55.0f);
  map_[2] = 1;
  for (const int threads : {1, 3}) {
    const test::LargeCallPaths large;
    Context ctx({.threads = threads});
    expect_refused(permute_with_map(ctx, args),
                   "permute_with_map: permuted.shape[0] = 6, expected M = 7 (from map)");
  }
  map_[2] = 0;
  EXPECT_EQ(permuted_, std::vector<float>(24, 55.0f));
  args.drop_and_pad = true;
  args.num_out_tokens = 6;
  test::sweep_contract<Args>(args, inputs, outputs, call);
  const auto refused = [&](const char* message) {
    const Status status = call(args);
    expect_refused(status, std::string("permute_with_map: ") + message);
    EXPECT_STREQ(status.message(), ref::permute_with_map(args).message());
  };
  args.num_out_tokens = 7;
  refused("num_out_tokens = 7 is not a multiple of E = 2");
  args.num_out_tokens = 0;
  refused("num_out_tokens / E = 0 / 2 is not in [1, T = 4]");
  args.num_out_tokens = 10;
  refused("num_out_tokens / E = 10 / 2 is not in [1, T = 4]");
  args.num_out_tokens = -2;
  refused("num_out_tokens / E = -2 / 2 is not in [1, T = 4]");
  args.num_out_tokens = 6;
  args.permuted_probs = {};
  refused("permuted_probs is missing");
  args.permuted_probs = {row_probs_.data(), {6}};
  args.probs = {};
  refused("permuted_probs is given, but probs is not");
  args.permuted_probs = {};
  args.map.shape[1] = 0;
  refused("num_out_tokens = 6, expected 0 for T = 4, E = 0");
  args.map.shape = {int64_t{1} << 31, 0};
  args.tokens.shape = {int64_t{1} << 31, 0};
  refused("T = 2147483648 does not fit in i32");
}

TEST_F(PermuteErrors, UnpermuteWithMap) {
  using Args = UnpermuteWithMapArgs;
  Args args;
  rows_ = {0, 3, 1, 2, 0, 1, 1, 2};
  args.permuted = {permuted_.data(), {8, 3}};
  args.sorted_indices = {rows_.data(), {8}};
  args.permuted_probs = {probs_.data(), {8}};
  args.num_tokens = 4;
  args.tokens = {tokens_.data(), {4, 3}};
  test::sweep_contract<Args>(args,
                             {{"permuted", &Args::permuted},
                              {"sorted_indices", &Args::sorted_indices},
                              {"permuted_probs", &Args::permuted_probs, false}},
                             {{"tokens", &Args::tokens}},
                             [&](const Args& a) { return unpermute_with_map(ctx_, a); });
  std::fill(tokens_.begin(), tokens_.end(), 55.0f);
  for (const int32_t bad : {-1, 4}) {
    for (const int threads : {1, 3}) {
      const test::LargeCallPaths large;
      Context ctx({.threads = threads});
      rows_[6] = bad;
      expect_refused(unpermute_with_map(ctx, args), "unpermute_with_map: sorted_indices[6] = " +
                                                        std::to_string(bad) + " is not in [0, 4)");
    }
  }
  EXPECT_EQ(tokens_, std::vector<float>(12, 55.0f));
  args.num_tokens = -4;
  expect_refused(unpermute_with_map(ctx_, args), "unpermute_with_map: num_tokens = -4 is negative");
}

}  // namespace
}  // namespace moeops
