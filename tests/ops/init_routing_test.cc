// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/init_routing.h>
#include <moeops/ref/ref.h>
#include <omp.h>

#include <functional>
#include <numeric>
#include <thread>

#include "ops/init_routing/slot_sort.h"
#include "tests/ops/routing_support.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/refused.h"

namespace moeops {
namespace {

using test::expect_refused;
using test::RoutingDraw;

const std::vector<TensorView InitRoutingArgs::*> kOutputs = {
    &InitRoutingArgs::expanded_x, &InitRoutingArgs::expanded_scale,
    &InitRoutingArgs::row_index,  &InitRoutingArgs::expert_tokens,
    &InitRoutingArgs::valid_rows, &InitRoutingArgs::dropped_rows};

// Mostly a legal call; some have an id that is not, or too few rows.
InitRoutingArgs random_call(RoutingDraw& draw) {
  InitRoutingArgs args;
  const int64_t T = draw.percent(80) ? draw.between(0, 12) : draw.between(13, 90);
  const int64_t K = draw.of<int64_t>({0, 1, 2, 3, 8});
  const int64_t H = draw.columns();
  const int64_t N = T * K;
  // From 1024 experts on, or four a slot, only the chosen ones are counted.
  const int64_t E =
      draw.percent(80) ? draw.between(1, 20) : draw.of<int64_t>({0, 64, 300, 1200, 5000});
  args.expert_count = E;
  args.mode = draw.of({RoutingMode::kDropless, RoutingMode::kDropless, RoutingMode::kDropPad});
  const bool drop_pad = args.mode == RoutingMode::kDropPad && E * std::max<int64_t>(T, 1) < 4000;
  if (!drop_pad) args.mode = RoutingMode::kDropless;
  args.quant = draw.of({RoutingQuant::kNone, RoutingQuant::kStatic, RoutingQuant::kDynamic});
  args.counts = draw.of(
      {ExpertCounts::kNone, ExpertCounts::kCount, ExpertCounts::kCumsum, ExpertCounts::kKeyValue});
  args.allow_masked = draw.percent(30);
  if (drop_pad) {
    args.capacity = draw.between(1, std::max<int64_t>(T, 1));
  } else {
    args.row_index_type = draw.of({RowIndexType::kGather, RowIndexType::kScatter});
    if (draw.percent(50)) {
      const int64_t begin = draw.between(0, E);
      args.expert_range = ExpertRange{begin, draw.between(begin, E)};
    }
    if (draw.percent(50)) args.active_rows = draw.between(0, N + 2);
  }
  const ExpertRange range = args.expert_range.value_or(ExpertRange{0, E});
  const int64_t experts = range.end - range.begin;

  const DType dtype = draw.of({DType::kF32, DType::kBf16, DType::kF16});
  args.x = draw.floats(dtype, {T, H});
  const int64_t masked = args.allow_masked ? 1 : 0;
  args.expert_ids = E == 0 && !args.allow_masked
                        ? draw.integers(DType::kI32, {T, K}, 0, 3)
                        : draw.integers(DType::kI32, {T, K}, -masked, E - 1 + masked);
  if (N > 0 && draw.percent(5)) {
    const auto slot = draw.between(0, N - 1);
    auto* id = const_cast<int32_t*>(args.expert_ids.row<int32_t>(slot / K)) + slot % K;
    *id = draw.of(
        {-1, -2, static_cast<int32_t>(E), static_cast<int32_t>(E + 1), INT32_MAX, INT32_MIN});
  }
  const int64_t rows = drop_pad ? E * args.capacity : draw.percent(70) ? N : draw.between(0, N);
  switch (args.quant) {
    case RoutingQuant::kNone:
      if (draw.percent(50)) args.scale = draw.floats(DType::kF32, {T});
      break;
    case RoutingQuant::kStatic:
      args.scale = draw.floats(DType::kF32, {1});
      args.offset = draw.floats(DType::kF32, {1});
      break;
    case RoutingQuant::kDynamic:
      if (draw.percent(60)) {
        args.scale = draw.floats(DType::kF32, {draw.percent(50) ? 1 : experts, H}, 0);
      }
      break;
  }
  const bool quantised = args.quant != RoutingQuant::kNone;
  const DType out = quantised ? DType::kS8 : dtype;
  args.expanded_x = drop_pad ? draw.view(out, {E, args.capacity, H}) : draw.view(out, {rows, H});
  if (args.quant == RoutingQuant::kDynamic || (!quantised && args.scale.present())) {
    args.expanded_scale = draw.view(DType::kF32, {rows});
  }
  args.row_index = draw.view(DType::kI32, {N});
  if (args.counts == ExpertCounts::kKeyValue) {
    args.expert_tokens = draw.view(DType::kI64, {experts, 2});
  } else if (args.counts != ExpertCounts::kNone) {
    args.expert_tokens = draw.view(DType::kI64, {experts});
  }
  if (draw.percent(70)) args.valid_rows = draw.view(DType::kI64, {1});
  if (draw.percent(70)) args.dropped_rows = draw.view(DType::kI64, {1});
  return args;
}

TEST(InitRoutingOpt, MatchesTheReference) {
  for (uint64_t round = 0; round < 2500; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    RoutingDraw draw(seed);
    const InitRoutingArgs args = random_call(draw);
    test::expect_like_reference(args, kOutputs, draw, ref::init_routing, init_routing);
    if (testing::Test::HasFatalFailure()) return;
  }
}

// A call in plain memory, every expert in it.
struct Problem {
  Problem(int64_t tokens, int64_t columns, int64_t choices, int64_t experts, uint64_t seed)
      : T(tokens), H(columns), K(choices), E(experts), N(T * K) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    x.resize(static_cast<size_t>(T * H));
    for (float& v : x) v = normal(random);
    ids.resize(static_cast<size_t>(N));
    for (int32_t& id : ids) {
      id = static_cast<int32_t>(std::uniform_int_distribution<int64_t>(0, E - 1)(random));
    }
    expanded.assign(static_cast<size_t>(N * H), 55.0f);
    q.assign(expanded.size(), 55);
    scale.assign(static_cast<size_t>(N), 55.0f);
    row_index.assign(static_cast<size_t>(N), 55);
    counts.assign(static_cast<size_t>(E), 55);
    args.x = {x.data(), {T, H}};
    args.expert_ids = {ids.data(), {T, K}};
    args.expert_count = E;
    args.counts = ExpertCounts::kCount;
    args.expanded_x = {expanded.data(), {N, H}};
    args.row_index = {row_index.data(), {N}};
    args.expert_tokens = {counts.data(), {E}};
    args.valid_rows = {&valid, {1}};
    args.dropped_rows = {&dropped, {1}};
  }
  Problem(const Problem&) = delete;

  void quantise() {
    args.quant = RoutingQuant::kDynamic;
    args.expanded_x = {q.data(), {N, H}};
    args.expanded_scale = {scale.data(), {N}};
  }

  int64_t T, H, K, E, N;
  std::vector<float> x, expanded, scale;
  std::vector<int8_t> q;
  std::vector<int32_t> ids, row_index;
  std::vector<int64_t> counts;
  int64_t valid = 55, dropped = 55;
  InitRoutingArgs args;
};

// By the definition, not by the reference, whose sort would take long.
void expect_sorted(const Problem& p) {
  std::vector<int64_t> counts(static_cast<size_t>(p.E));
  for (const int32_t id : p.ids) ++counts[static_cast<size_t>(id)];
  EXPECT_EQ(p.counts, counts);
  std::vector<int64_t> next(counts.size());
  std::exclusive_scan(counts.begin(), counts.end(), next.begin(), int64_t{0});
  for (size_t slot = 0; slot < p.ids.size(); ++slot) {
    const int64_t row = next[static_cast<size_t>(p.ids[slot])]++;
    ASSERT_EQ(p.row_index[slot], row) << "slot " << slot;
    for (int64_t j = 0; j < p.H; ++j) {
      ASSERT_EQ(
          p.expanded[static_cast<size_t>(row * p.H + j)],
          p.x[slot / static_cast<size_t>(p.K) * static_cast<size_t>(p.H) + static_cast<size_t>(j)]);
    }
  }
}

TEST(InitRoutingOpt, AMillionTokens) {
  Problem p(1'000'000, 1, 3, 256, 7);
  for (const int threads : {1, 2, 7}) {
    Context ctx({.threads = threads});
    std::fill(p.row_index.begin(), p.row_index.end(), 55);
    const Status status = init_routing(ctx, p.args);
    ASSERT_TRUE(status.ok()) << status.message();
    expect_sorted(p);
  }
}

// More experts than tokens, of which only the chosen are counted.
TEST(InitRoutingOpt, AMillionExperts) {
  Problem p(20'000, 1, 4, 1'000'000, 8);
  Context ctx({.threads = 3});
  ASSERT_TRUE(init_routing(ctx, p.args).ok());
  expect_sorted(p);
}

TEST(InitRoutingOpt, PermutingTokensPermutesRows) {
  const test::LargeCallPaths large;
  for (const Isa isa : test::routing_isas()) {
    Problem p(60, 37, 4, 9, 11);
    Problem other(60, 37, 4, 9, 11);
    std::vector<int64_t> from(60);  // token t of `other` is token from[t] of p
    std::iota(from.begin(), from.end(), 0);
    std::shuffle(from.begin(), from.end(), std::mt19937_64(12));
    for (int64_t t = 0; t < 60; ++t) {
      const int64_t f = from[static_cast<size_t>(t)];
      std::copy_n(p.x.begin() + f * 37, 37, other.x.begin() + t * 37);
      std::copy_n(p.ids.begin() + f * 4, 4, other.ids.begin() + t * 4);
    }
    for (const bool quantised : {false, true}) {
      if (quantised) {
        p.quantise();
        other.quantise();
      }
      Context ctx({.threads = 3, .isa = isa});
      ASSERT_TRUE(init_routing(ctx, p.args).ok());
      ASSERT_TRUE(init_routing(ctx, other.args).ok());
      EXPECT_EQ(p.counts, other.counts);
      for (int64_t slot = 0; slot < p.N; ++slot) {
        const int64_t f = from[static_cast<size_t>(slot / 4)] * 4 + slot % 4;
        const int64_t a = p.row_index[static_cast<size_t>(f)] * p.H;
        const int64_t b = other.row_index[static_cast<size_t>(slot)] * p.H;
        if (quantised) {
          EXPECT_TRUE(std::equal(p.q.begin() + a, p.q.begin() + a + p.H, other.q.begin() + b));
        } else {
          EXPECT_TRUE(std::equal(p.expanded.begin() + a, p.expanded.begin() + a + p.H,
                                 other.expanded.begin() + b));
        }
      }
    }
  }
}

TEST(InitRoutingOpt, APoisonedTokenStaysAlone) {
  const test::LargeCallPaths large;
  for (const Isa isa : test::routing_isas()) {
    Problem p(40, 70, 3, 5, 13);
    p.quantise();
    Context ctx({.threads = 2, .isa = isa});
    ASSERT_TRUE(init_routing(ctx, p.args).ok());
    const std::vector<int8_t> q = p.q;
    const std::vector<float> scale = p.scale;
    std::fill_n(p.x.begin() + 17 * p.H, p.H, std::numeric_limits<float>::quiet_NaN());
    ASSERT_TRUE(init_routing(ctx, p.args).ok());
    for (int64_t slot = 0; slot < p.N; ++slot) {
      const auto row = static_cast<size_t>(p.row_index[static_cast<size_t>(slot)]);
      if (slot / p.K == 17) {
        EXPECT_TRUE(std::isnan(p.scale[row]));
        continue;
      }
      EXPECT_EQ(p.scale[row], scale[row]);
      const auto first = static_cast<int64_t>(row) * p.H;
      EXPECT_TRUE(std::equal(q.begin() + first, q.begin() + first + p.H, p.q.begin() + first));
    }
  }
}

// From a region of the caller's, and from two threads at once.
TEST(InitRoutingOpt, SameBitsConcurrentlyAndNested) {
  const test::LargeCallPaths large;
  Problem expected(300, 20, 4, 16, 17);
  ASSERT_TRUE(ref::init_routing(expected.args).ok());
  std::vector<std::unique_ptr<Problem>> problems;
  for (int i = 0; i < 5; ++i) problems.push_back(std::make_unique<Problem>(300, 20, 4, 16, 17));
#pragma omp parallel num_threads(3)
  {
    Context ctx({.threads = 2});
    Problem& p = *problems[static_cast<size_t>(omp_get_thread_num())];
    EXPECT_TRUE(init_routing(ctx, p.args).ok());
  }
  std::vector<std::thread> threads;
  for (size_t i = 3; i < 5; ++i) {
    threads.emplace_back([&, i] {
      Context ctx({.threads = 2});
      for (int repeat = 0; repeat < 50; ++repeat) {
        EXPECT_TRUE(init_routing(ctx, problems[i]->args).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(problems[0]->row_index, expected.row_index);
  for (const auto& p : problems) {
    if (p->valid == 55) continue;  // the region had fewer threads
    EXPECT_EQ(p->row_index, expected.row_index);
    EXPECT_EQ(p->expanded, expected.expanded);
  }
}

TEST(InitRoutingOpt, AllocatesNothingAfterTheFirstCall) {
  Problem p(16, 64, 4, 32, 19);
  Context ctx({.threads = 2});
  const test::LargeCallPaths large;
  std::mt19937_64 random(20);
  for (const bool quantised : {false, true}) {
    if (quantised) p.quantise();
    for (const RowIndexType type : {RowIndexType::kGather, RowIndexType::kScatter}) {
      p.args.row_index_type = type;
      test::expect_no_allocation([&] {
        std::shuffle(p.ids.begin(), p.ids.end(), random);
        return init_routing(ctx, p.args);
      });
    }
  }
}

TEST(InitRoutingOpt, EveryViewIsChecked) {
  using Args = InitRoutingArgs;
  Context ctx;
  const auto call = [&](const Args& args) { return init_routing(ctx, args); };
  Problem p(5, 6, 3, 4, 23);
  std::vector<float> smooth(24, 1.0f);
  p.quantise();
  p.args.scale = {smooth.data(), {4, 6}};
  test::sweep_contract<Args>(
      p.args, {{"x", &Args::x}, {"expert_ids", &Args::expert_ids}, {"scale", &Args::scale, false}},
      {{"expanded_x", &Args::expanded_x},
       {"expanded_scale", &Args::expanded_scale},
       {"row_index", &Args::row_index},
       {"expert_tokens", &Args::expert_tokens},
       {"valid_rows", &Args::valid_rows, false},
       {"dropped_rows", &Args::dropped_rows, false}},
      call);

  float offset = 0;
  p.args.quant = RoutingQuant::kStatic;
  p.args.mode = RoutingMode::kDropPad;
  p.args.capacity = 3;
  p.args.expanded_x = {p.q.data(), {4, 3, 6}};
  p.args.expanded_scale = {};
  p.args.scale = {smooth.data(), {1}};
  p.args.offset = {&offset, {1}};
  test::sweep_contract<Args>(
      p.args, {{"x", &Args::x}, {"scale", &Args::scale}, {"offset", &Args::offset}},
      {{"expanded_x", &Args::expanded_x}, {"row_index", &Args::row_index}}, call);

  p.args.quant = RoutingQuant::kNone;
  p.args.offset = {};
  p.args.expanded_x = {p.expanded.data(), {4, 3, 6}};
  p.args.scale = {smooth.data(), {5}};
  p.args.expanded_scale = {p.scale.data(), {12}};
  test::sweep_contract<Args>(
      p.args, {{"x", &Args::x}, {"scale", &Args::scale}},
      {{"expanded_x", &Args::expanded_x}, {"expanded_scale", &Args::expanded_scale}}, call);
}

// Every other error: as the reference words it, and nothing is written.
TEST(InitRoutingOpt, RefusesWhatTheReferenceRefuses) {
  Problem p(5, 6, 3, 4, 29);
  float one = 1;
  using Change = std::function<void(InitRoutingArgs&)>;
  const auto drop_pad = [&](InitRoutingArgs& a) {
    a.mode = RoutingMode::kDropPad;
    a.capacity = 3;
    a.expanded_x = {p.expanded.data(), {4, 3, 6}};
  };
  const std::vector<std::pair<std::string, Change>> changes = {
      {"mode = 2 is not one of its 2 choices",
       [](auto& a) { a.mode = static_cast<RoutingMode>(2); }},
      {"mode = -1 is not one of its 2 choices",
       [](auto& a) { a.mode = static_cast<RoutingMode>(-1); }},
      {"counts = 4 is not one of its 4 choices",
       [](auto& a) { a.counts = static_cast<ExpertCounts>(4); }},
      {"counts = -1 is not one of its 4 choices",
       [](auto& a) { a.counts = static_cast<ExpertCounts>(-1); }},
      {"row_index_type = 2 is not one of its 2 choices",
       [](auto& a) { a.row_index_type = static_cast<RowIndexType>(2); }},
      {"row_index_type = -1 is not one of its 2 choices",
       [](auto& a) { a.row_index_type = static_cast<RowIndexType>(-1); }},
      {"quant = 3 is not one of its 3 choices",
       [](auto& a) { a.quant = static_cast<RoutingQuant>(3); }},
      {"quant = -1 is not one of its 3 choices",
       [](auto& a) { a.quant = static_cast<RoutingQuant>(-1); }},
      {"expert_count = -1 is negative", [](auto& a) { a.expert_count = -1; }},
      {"expert_range = [-1, 4) does not lie in [0, 4)",
       [](auto& a) {
         a.expert_range = ExpertRange{-1, 4};
       }},
      {"expert_range = [0, 5) does not lie in [0, 4)",
       [](auto& a) {
         a.expert_range = ExpertRange{0, 5};
       }},
      {"expert_range = [3, 2) does not lie in [0, 4)",
       [](auto& a) {
         a.expert_range = ExpertRange{3, 2};
       }},
      {"active_rows = -1 is negative", [](auto& a) { a.active_rows = -1; }},
      {"expanded_x.shape[0] = 14, expected at least R = 15",
       [](auto& a) { a.expanded_x.shape[0] = 14; }},
      {"expert_ids[1,2] = 4 is not in [0, 4)", [&](auto&) { p.ids[5] = 4; }},
      {"expert_ids[1,1] = -3 is not in [0, 4) and does not mask",
       [&](auto& a) {
         a.allow_masked = true;
         p.ids[4] = -3;
       }},
      {"capacity = 0 is not in [1, 5]",
       [&](auto& a) {
         drop_pad(a);
         a.capacity = 0;
       }},
      {"capacity = 6 is not in [1, 5]",
       [&](auto& a) {
         drop_pad(a);
         a.capacity = 6;
       }},
      {"expert_range = [0, 3), but drop_pad needs [0, 4)",
       [&](auto& a) {
         drop_pad(a);
         a.expert_range = ExpertRange{0, 3};
       }},
      {"row_index_type is scatter, but mode is drop_pad",
       [&](auto& a) {
         drop_pad(a);
         a.row_index_type = RowIndexType::kScatter;
       }},
      {"expert_count * capacity = 1073741824 * 3 does not fit in i32",
       [&](auto& a) {
         drop_pad(a);
         a.expert_count = int64_t{1} << 30;
       }},
      {"expanded_scale is given, but scale is not",
       [&](auto& a) {
         a.expanded_scale = {p.scale.data(), {15}};
       }},
      {"offset is given, but quant is not static",
       [&](auto& a) {
         a.offset = {&one, {1}};
       }},
      {"expert_tokens is given, but counts is none",
       [](auto& a) { a.counts = ExpertCounts::kNone; }},
      {"expanded_scale is given, but quant is static",
       [&](auto& a) {
         a.quant = RoutingQuant::kStatic;
         a.expanded_x = {p.q.data(), {15, 6}};
         a.scale = a.offset = {&one, {1}};
         a.expanded_scale = {p.scale.data(), {15}};
       }},
      {"T * K = 2147483648 does not fit in i32",
       [&](auto& a) {
         a.x.shape[0] = a.expert_ids.shape[0] = int64_t{1} << 30;
         a.expert_ids.shape[1] = 2;
         a.row_index = {p.row_index.data(), {int64_t{1} << 31}};
         a.valid_rows = a.dropped_rows = {};
       }},
  };
  const std::vector<int32_t> ids = p.ids;
  for (const auto& [message, change] : changes) {
    InitRoutingArgs args = p.args;
    change(args);
    for (const int threads : {1, 3}) {
      const test::LargeCallPaths large;
      Context ctx({.threads = threads});
      const Status status = init_routing(ctx, args);
      expect_refused(status, "init_routing: " + message);
      EXPECT_STREQ(status.message(), ref::init_routing(args).message());
    }
    p.ids = ids;
  }
  EXPECT_EQ(p.expanded, std::vector<float>(p.expanded.size(), 55.0f));
  EXPECT_EQ(p.row_index, std::vector<int32_t>(p.row_index.size(), 55));
  EXPECT_EQ(p.counts, std::vector<int64_t>(p.counts.size(), 55));
  EXPECT_EQ(p.valid, 55);
}

TEST(InitRoutingOpt, SizesBesideAZero) {
  Context ctx({.threads = 2});
  const test::LargeCallPaths large;
  constexpr int64_t kHuge = INT64_MAX / 2;
  InitRoutingArgs args;
  args.x = {static_cast<const float*>(nullptr), {0, kHuge}};
  args.expert_ids = {static_cast<const int32_t*>(nullptr), {0, kHuge}};
  args.expanded_x = {static_cast<float*>(nullptr), {0, kHuge}};
  args.row_index = {static_cast<int32_t*>(nullptr), {0}};
  EXPECT_TRUE(init_routing(ctx, args).ok());
  args.x = {static_cast<const float*>(nullptr), {kHuge, 0}};
  args.expert_ids = {static_cast<const int32_t*>(nullptr), {kHuge, 0}};
  args.expanded_x = {static_cast<float*>(nullptr), {kHuge, 0}};
  args.expert_count = kHuge;
  EXPECT_TRUE(init_routing(ctx, args).ok());
}

// cutoff_rows and clip_cumsum are what the reference's are.
TEST(CutoffRowsOpt, MatchesTheReference) {
  for (uint64_t round = 0; round < 2000; ++round) {
    const uint64_t seed = test::seed_of(round);
    RoutingDraw draw(seed);
    const auto size = [&] {
      return draw.percent(80) ? draw.between(-1, 20)
                              : draw.between(0, draw.of({INT64_MAX, int64_t{1} << 33}));
    };
    const int64_t T = size(), K = size(), floor_tokens = size();
    const double factor =
        draw.percent(90) ? std::uniform_real_distribution(0.0, 1.0)(draw.random)
                         : draw.of({0.0, 1.0, -0.5, 1.5, std::numeric_limits<double>::quiet_NaN()});
    int64_t rows = 55, expected = 55;
    const Status status = cutoff_rows(T, K, factor, floor_tokens, &rows);
    const Status reference = ref::cutoff_rows(T, K, factor, floor_tokens, &expected);
    ASSERT_STREQ(status.message(), reference.message()) << test::replay_hint(seed);
    ASSERT_EQ(rows, expected) << test::replay_hint(seed);
  }
}

TEST(ClipCumsumOpt, ClipsAndRefuses) {
  int64_t cumsum[] = {1, 4, 9}, clipped[] = {55, 55, 55};
  ASSERT_TRUE(clip_cumsum({cumsum, {3}}, 5, {clipped, {3}}).ok());
  EXPECT_EQ(std::vector<int64_t>(clipped, clipped + 3), (std::vector<int64_t>{1, 4, 5}));
  expect_refused(clip_cumsum({cumsum, {3}}, -1, {clipped, {3}}),
                 "clip_cumsum: rows = -1 is negative");
  expect_refused(clip_cumsum({cumsum, {3}}, 1, {clipped, {1}}),
                 "clip_cumsum: clipped.shape[0] = 1, expected E = 3 (from cumsum)");
  expect_refused(clip_cumsum({cumsum, {3}}, 1, {cumsum, {3}}),
                 "clip_cumsum: output clipped overlaps input cumsum");
}

}  // namespace
}  // namespace moeops
