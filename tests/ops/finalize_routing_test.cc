// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/finalize_routing.h>
#include <moeops/ref/ref.h>

#include <functional>

#include "tests/ops/routing_support.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"

namespace moeops {
namespace {

using test::RoutingDraw;

FinalizeRoutingArgs random_call(RoutingDraw& draw) {
  FinalizeRoutingArgs args;
  const bool scales = draw.percent(80);
  const int64_t T = draw.percent(80) ? draw.between(0, 12) : draw.between(13, 90);
  const int64_t K = scales ? draw.of<int64_t>({0, 1, 2, 3, 8}) : 1;
  const int64_t H = draw.columns(), E = draw.between(1, 9), C = draw.between(1, 8);
  const DType dtype = draw.of({DType::kF32, DType::kBf16, DType::kF16});
  args.index_layout = draw.of({IndexLayout::kRow, IndexLayout::kColumn});
  args.rows = draw.of({ExpandedRows::kFlat, ExpandedRows::kDropPad});
  int64_t M = E * C;
  if (args.rows == ExpandedRows::kDropPad) {
    args.expanded = draw.floats(dtype, {E, C, H});
  } else {
    M = draw.between(0, T * K + 1);
    args.expanded = draw.floats(dtype, {M, H});
  }
  args.row_index = draw.integers(DType::kI32, {T * K}, -1, M - 1);
  if (T * K > 0 && draw.percent(4)) {
    const_cast<int32_t*>(args.row_index.row<int32_t>(0))[draw.between(0, T * K - 1)] =
        draw.of({-2, static_cast<int32_t>(M), INT32_MAX, INT32_MIN});
  }
  if (scales) args.scales = draw.floats(DType::kF32, {T, K}, 5);
  if (draw.percent(50)) args.expert_ids = draw.integers(DType::kI32, {T, K}, 0, E - 1);
  if (args.expert_ids.present() && draw.percent(70)) {
    args.bias = draw.floats(dtype, {E, H});
    if (T * K > 0 && draw.percent(4)) {
      const int64_t slot = draw.between(0, T * K - 1);
      const_cast<int32_t*>(args.expert_ids.row<int32_t>(slot / K))[slot % K] =
          draw.of({-1, static_cast<int32_t>(E)});
    }
  }
  if (draw.percent(50)) args.skip1 = draw.floats(dtype, {T, H});
  if (args.skip1.present() && draw.percent(50)) args.skip2 = draw.floats(dtype, {T, H});
  args.out = draw.view(dtype, {T, H});
  return args;
}

TEST(FinalizeRoutingOpt, MatchesTheReference) {
  for (uint64_t round = 0; round < 2000; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    RoutingDraw draw(seed);
    const FinalizeRoutingArgs args = random_call(draw);
    test::expect_like_reference(args, {&FinalizeRoutingArgs::out}, draw, ref::finalize_routing,
                                finalize_routing);
    if (testing::Test::HasFatalFailure()) return;
  }
}

// 24 tokens of three rows each, with everything there is.
struct Problem {
  explicit Problem(uint64_t seed = 3) : draw(seed) {
    expanded = draw.floats(DType::kBf16, {T * K, H}, 0);
    rows = draw.view(DType::kI32, {T * K});
    for (int64_t i = 0; i < T * K; ++i) {
      rows.row<int32_t>(0)[i] = static_cast<int32_t>((i * 29 + 3) % (T * K));
    }
    ids = draw.integers(DType::kI32, {T, K}, 0, E - 1);
    scales = draw.floats(DType::kF32, {T, K}, 0);
    skip1 = draw.floats(DType::kBf16, {T, H}, 0);
    out = draw.view(DType::kBf16, {T, H});
    args.expanded = expanded;
    args.row_index = rows;
    args.scales = scales;
    args.bias = draw.floats(DType::kBf16, {E, H}, 0);
    args.expert_ids = ids;
    args.skip1 = skip1;
    args.skip2 = draw.floats(DType::kBf16, {T, H}, 0);
    args.out = out;
  }
  std::vector<uint16_t> result(int64_t t) const {
    const auto* row = out.row<uint16_t>(t);
    return {row, row + H};
  }
  static constexpr int64_t T = 24, K = 3, H = 83, E = 5;
  RoutingDraw draw;
  TensorView expanded, rows, ids, scales, skip1, out;
  FinalizeRoutingArgs args;
};

TEST(FinalizeRoutingOpt, APoisonedRowReachesItsTokenOnly) {
  const test::LargeCallPaths large;
  for (const Isa isa : test::routing_isas()) {
    Problem p;
    Context ctx({.threads = 3, .isa = isa});
    ASSERT_TRUE(finalize_routing(ctx, p.args).ok());
    std::vector<std::vector<uint16_t>> clean;
    for (int64_t t = 0; t < Problem::T; ++t) clean.push_back(p.result(t));
    const int64_t row = p.rows.row<int32_t>(0)[7 * Problem::K + 1];
    for (int64_t j = 0; j < Problem::H; ++j) p.expanded.row<bf16>(row)[j] = to_bf16(NAN);
    ASSERT_TRUE(finalize_routing(ctx, p.args).ok());
    for (int64_t t = 0; t < Problem::T; ++t) {
      if (t != 7) {
        EXPECT_EQ(p.result(t), clean[static_cast<size_t>(t)]);
      }
    }
    EXPECT_TRUE(std::isnan(to_f32(p.out.row<bf16>(7)[0])));
    p.rows.row<int32_t>(0)[7 * Problem::K + 1] = -1;
    ASSERT_TRUE(finalize_routing(ctx, p.args).ok());
    EXPECT_FALSE(std::isnan(to_f32(p.out.row<bf16>(7)[0])));
  }
}

TEST(FinalizeRoutingOpt, PermutingTokensPermutesResults) {
  const test::LargeCallPaths large;
  for (const Isa isa : test::routing_isas()) {
    Problem p;
    p.args.skip1 = p.args.skip2 = {};
    Context ctx({.threads = 3, .isa = isa});
    ASSERT_TRUE(finalize_routing(ctx, p.args).ok());
    std::vector<std::vector<uint16_t>> clean;
    for (int64_t t = 0; t < Problem::T; ++t) clean.push_back(p.result(t));
    // Tokens backwards.
    for (int64_t t = 0; t < Problem::T / 2; ++t) {
      const int64_t other = Problem::T - 1 - t;
      for (int64_t k = 0; k < Problem::K; ++k) {
        std::swap(p.rows.row<int32_t>(0)[t * Problem::K + k],
                  p.rows.row<int32_t>(0)[other * Problem::K + k]);
        std::swap(p.scales.row<float>(t)[k], p.scales.row<float>(other)[k]);
        std::swap(p.ids.row<int32_t>(t)[k], p.ids.row<int32_t>(other)[k]);
      }
    }
    ASSERT_TRUE(finalize_routing(ctx, p.args).ok());
    for (int64_t t = 0; t < Problem::T; ++t) {
      EXPECT_EQ(p.result(t), clean[static_cast<size_t>(Problem::T - 1 - t)]);
    }
  }
}

TEST(FinalizeRoutingOpt, AllocatesNothingAfterTheFirstCall) {
  Problem p;
  Context ctx({.threads = 2});
  const test::LargeCallPaths large;
  test::expect_no_allocation([&] { return finalize_routing(ctx, p.args); });
}

TEST(FinalizeRoutingOpt, EveryViewIsChecked) {
  using Args = FinalizeRoutingArgs;
  Problem p;
  Context ctx;
  const auto call = [&](const Args& args) { return finalize_routing(ctx, args); };
  const std::vector<test::InputView<Args>> inputs = {
      {"expanded", &Args::expanded}, {"row_index", &Args::row_index},   {"scales", &Args::scales},
      {"bias", &Args::bias, false},  {"expert_ids", &Args::expert_ids}, {"skip1", &Args::skip1},
      {"skip2", &Args::skip2, false}};
  test::sweep_contract<Args>(p.args, inputs, {{"out", &Args::out}}, call);
}

// Every other error: as the reference words it, and nothing is written.
TEST(FinalizeRoutingOpt, RefusesWhatTheReferenceRefuses) {
  using Change = std::function<void(Problem&)>;
  const std::vector<std::pair<std::string, Change>> changes = {
      {"row_index[5] = 72 is not in [-1, 72)", [](Problem& p) { p.rows.row<int32_t>(0)[5] = 72; }},
      {"row_index[6] = -2 is not in [-1, 72)", [](Problem& p) { p.rows.row<int32_t>(0)[6] = -2; }},
      {"row_index[26] = 99 is not in [-1, 72)",
       [](Problem& p) {
         p.args.index_layout = IndexLayout::kColumn;
         p.rows.row<int32_t>(0)[26] = 99;
         p.rows.row<int32_t>(0)[3] = 99;  // of token 3, the other one of token 2
       }},
      {"expert_ids[4,2] = 5 is not in [0, 5)", [](Problem& p) { p.ids.row<int32_t>(4)[2] = 5; }},
      {"expert_ids[4,0] = -1 is not in [0, 5)", [](Problem& p) { p.ids.row<int32_t>(4)[0] = -1; }},
      {"index_layout = 2 is not one of its 2 choices",
       [](Problem& p) { p.args.index_layout = static_cast<IndexLayout>(2); }},
      {"index_layout = -1 is not one of its 2 choices",
       [](Problem& p) { p.args.index_layout = static_cast<IndexLayout>(-1); }},
      {"rows = 2 is not one of its 2 choices",
       [](Problem& p) { p.args.rows = static_cast<ExpandedRows>(2); }},
      {"rows = -1 is not one of its 2 choices",
       [](Problem& p) { p.args.rows = static_cast<ExpandedRows>(-1); }},
      {"bias is given, but expert_ids is not", [](Problem& p) { p.args.expert_ids = {}; }},
      {"skip2 is given, but skip1 is not", [](Problem& p) { p.args.skip1 = {}; }},
      {"skip1 has dtype f32, which is not legal here",
       [](Problem& p) { p.args.skip1.dtype = DType::kF32; }},
  };
  for (const auto& [message, change] : changes) {
    Problem p;
    change(p);
    std::memset(p.out.data, test::kBefore, test::span_bytes(p.out));
    for (const int threads : {1, 3}) {
      const test::LargeCallPaths large;
      Context ctx({.threads = threads});
      const Status status = finalize_routing(ctx, p.args);
      test::expect_refused(status, "finalize_routing: " + message);
      EXPECT_STREQ(status.message(), ref::finalize_routing(p.args).message());
    }
    const auto* bytes = static_cast<const unsigned char*>(p.out.data);
    for (size_t i = 0; i < test::span_bytes(p.out); ++i) ASSERT_EQ(bytes[i], test::kBefore);
  }
}

}  // namespace
}  // namespace moeops
