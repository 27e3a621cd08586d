// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <malloc.h>
#include <moeops/ops/gating_top_k.h>
#include <moeops/ref/ref.h>
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/support/contract_sweep.h"
#include "tests/support/guarded_buffer.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using test::GuardedBuffer;

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();

std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= machine().isa) all.push_back(isa);
  }
  return all;
}

// NaN equals NaN; 0 does not equal -0.
bool same(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) ||
         (std::isnan(a) && std::isnan(b));
}

// How many floats lie between two, which may be of 16-bit logits' scores: never negative.
int64_t ulps(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) == std::isnan(b) ? 0 : INT64_MAX;
  return std::abs(int64_t{std::bit_cast<int32_t>(a)} - std::bit_cast<int32_t>(b));
}

// A [rows, columns] matrix between guard pages, its rows `stride` elements apart.
template <class T>
struct Matrix {
  Matrix(int64_t matrix_rows, int64_t matrix_columns, int64_t extra, GuardedBuffer::Against side)
      : rows(matrix_rows),
        columns(matrix_columns),
        stride(columns + extra),
        buffer(sizeof(T) * static_cast<size_t>(rows == 0 ? 0 : (rows - 1) * stride + columns),
               side) {}
  T& at(int64_t i, int64_t j) const { return buffer.template as<T>()[i * stride + j]; }
  operator TensorView() const {  // NOLINT(google-explicit-constructor)
    return {buffer.template as<T>(), {rows, columns}, stride};
  }
  operator ConstTensorView() const { return TensorView(*this); }  // NOLINT
  void fill(T value) const {
    std::fill_n(buffer.template as<T>(), buffer.bytes() / sizeof(T), value);
  }

  int64_t rows, columns, stride;
  GuardedBuffer buffer;
};

struct Draw {
  std::mt19937_64 random;
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  template <class T>
  T of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }
  float normal(float deviation) { return std::normal_distribution<float>(0, deviation)(random); }
};

// A call with all its memory.
struct Problem {
  // 0: scores whose exp is exact, so that the reference's bits are expected; above: the deviation
  // of the logits.
  Problem(Draw& draw, int64_t T, int64_t E, float deviation) {
    const auto side = draw.of({GuardedBuffer::Against::kFront, GuardedBuffer::Against::kBack});
    const auto extra = [&] { return draw.of<int64_t>({0, 0, 1, 7}); };
    args.score = draw.of({GatingScore::kSoftmax, GatingScore::kSigmoid});
    args.renormalize = draw.one_in(2);
    args.routed_scaling_factor = draw.of({1.0f, 2.5f});
    if (draw.one_in(4)) args.eps = 0.5f;
    if (draw.one_in(2)) {
      std::vector<int64_t> divisors;
      for (int64_t g = 1; g <= E; ++g) {
        if (E % g == 0) divisors.push_back(g);
      }
      args.group_count =
          divisors[static_cast<size_t>(draw.between(0, static_cast<int64_t>(divisors.size()) - 1))];
      args.k_group = draw.between(1, args.group_count);
      if (args.group_count < E) {
        args.group_select = draw.of({GroupSelect::kMax, GroupSelect::kTop2Sum});
      }
    }
    const int64_t most = E / args.group_count * args.k_group;
    args.k = std::min(most, draw.one_in(3) ? draw.between(1, most) : draw.between(1, 10));

    logits = std::make_unique<Matrix<float>>(T, E, extra(), side);
    logits->fill(kNan);
    const bool wild = draw.one_in(3);
    const bool ties = draw.one_in(3);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t e = 0; e < E; ++e) {
        float& x = logits->at(t, e);
        if (deviation == 0) {
          x = args.score == GatingScore::kSoftmax ? draw.of({0.0f, 0.0f, -kInf})
                                                  : draw.of({0.0f, kInf, -kInf, -0.0f});
        } else {
          x = ties ? static_cast<float>(draw.between(-2, 2)) : draw.normal(deviation);
        }
        if (wild && draw.one_in(4)) x = draw.of({kNan, -kNan, -kInf, kNan, kInf});
      }
    }
    const DType dtype = draw.of({DType::kF32, DType::kBf16, DType::kF16});
    args.logits = *logits;
    if (dtype != DType::kF32) {
      halves = std::make_unique<Matrix<uint16_t>>(T, E, extra(), side);
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t e = 0; e < E; ++e) {
          const float x = logits->at(t, e);
          halves->at(t, e) = dtype == DType::kBf16 ? to_bf16(x).bits : to_f16(x).bits;
        }
      }
      args.logits =
          ConstTensorView(halves->buffer.as<void>(), TensorLayout(dtype, {T, E}, halves->stride));
    }
    if (draw.one_in(2)) {
      bias = std::make_unique<Matrix<float>>(1, E, 0, side);
      for (int64_t e = 0; e < E; ++e) {
        bias->at(0, e) = draw.one_in(2) ? draw.normal(0.3f) : draw.of({0.0f, 0.25f, -0.0f, -1.0f});
        if (wild && draw.one_in(8)) bias->at(0, e) = draw.of({kNan, -kInf, kInf});
      }
      args.bias = {bias->buffer.as<float>(), {E}};
    }
    if (draw.one_in(3)) {
      finished = std::make_unique<Matrix<bool>>(1, T, 0, side);
      for (int64_t t = 0; t < T; ++t) finished->at(0, t) = draw.one_in(2);
      args.finished = {finished->buffer.as<bool>(), {T}};
    }
    weights = std::make_unique<Matrix<float>>(T, args.k, extra(), side);
    ids = std::make_unique<Matrix<int32_t>>(T, args.k, extra(), side);
    scores = std::make_unique<Matrix<float>>(T, E, extra(), side);
    row_index = std::make_unique<Matrix<int32_t>>(T, args.k, extra(), side);
    args.weights = *weights;
    args.expert_ids = *ids;
    if (draw.one_in(2)) args.row_index = *row_index;
    args.scores = *scores;
  }

  struct Outputs {
    std::vector<float> weights, scores;
    std::vector<int32_t> ids, row_index;
    bool operator==(const Outputs& other) const {
      return std::equal(weights.begin(), weights.end(), other.weights.begin(), other.weights.end(),
                        same) &&
             std::equal(scores.begin(), scores.end(), other.scores.begin(), other.scores.end(),
                        same) &&
             ids == other.ids && row_index == other.row_index;
    }
  };
  // Everything that the outputs' memory holds, what lies between rows included.
  template <class Call>
  Outputs run(const Call& call) const {
    weights->fill(-7.0f);
    scores->fill(-7.0f);
    ids->fill(-7);
    row_index->fill(-7);
    const Status status = call(args);
    EXPECT_TRUE(status.ok()) << status.message();
    const auto all = [](const auto& matrix) {
      const auto* data = &matrix->at(0, 0);
      return std::vector(data, data + matrix->buffer.bytes() / sizeof(*data));
    };
    return {all(weights), all(scores), all(ids), all(row_index)};
  }
  Outputs run(const ContextOptions& options) const {
    Context ctx(options);
    return run([&](const GatingTopKArgs& a) { return gating_top_k(ctx, a); });
  }
  Outputs run_ref() const {
    return run([](const GatingTopKArgs& a) { return ref::gating_top_k(a); });
  }

  std::string text() const {
    return std::string(args.score == GatingScore::kSoftmax ? "softmax " : "sigmoid ") +
           to_string(args.logits.dtype) + " T " + std::to_string(logits->rows) + " E " +
           std::to_string(logits->columns) + " k " + std::to_string(args.k) + " groups " +
           std::to_string(args.k_group) + " of " + std::to_string(args.group_count);
  }

  GatingTopKArgs args;
  std::unique_ptr<Matrix<float>> logits;
  std::unique_ptr<Matrix<uint16_t>> halves;
  std::unique_ptr<Matrix<float>> bias;
  std::unique_ptr<Matrix<bool>> finished;
  std::unique_ptr<Matrix<float>> weights, scores;
  std::unique_ptr<Matrix<int32_t>> ids, row_index;
};

// Whether the outputs that the problem holds now follow from the scores among them: the choice by
// the reference, to which the scores go as a bias (a logit of -inf has score 0), the weights by
// their definition.
void expect_consistent(const Problem& problem, const std::string& what) {
  const GatingTopKArgs& args = problem.args;
  const int64_t T = problem.logits->rows;
  const int64_t E = problem.logits->columns;
  const std::vector<float> logits(static_cast<size_t>(E), -kInf);
  std::vector<float> b(static_cast<size_t>(E));
  std::vector<float> weights(static_cast<size_t>(args.k));
  std::vector<int32_t> ids(static_cast<size_t>(args.k));
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t e = 0; e < E; ++e) {
      b[static_cast<size_t>(e)] =
          problem.scores->at(t, e) + (problem.bias ? problem.bias->at(0, e) : 0.0f);
    }
    GatingTopKArgs choice = args;
    choice.score = GatingScore::kSigmoid;
    choice.logits = {logits.data(), {1, E}};
    choice.bias = {b.data(), {E}};
    choice.finished = {};
    choice.weights = {weights.data(), {1, args.k}};
    choice.expert_ids = {ids.data(), {1, args.k}};
    choice.scores = {};
    choice.row_index = {};
    ASSERT_TRUE(ref::gating_top_k(choice).ok());
    float sum = 0;
    for (const int32_t id : ids) sum += problem.scores->at(t, id);
    const bool finished = problem.finished && problem.finished->at(0, t);
    for (int64_t k = 0; k < args.k; ++k) {
      const int32_t id = ids[static_cast<size_t>(k)];
      ASSERT_EQ(problem.ids->at(t, k), finished ? E : id) << what << " at " << t << "," << k;
      float y = problem.scores->at(t, id);
      if (args.renormalize) y = y / (sum + args.eps);
      const float weight = y * args.routed_scaling_factor;
      ASSERT_PRED2(same, problem.weights->at(t, k), weight) << what << " at " << t << "," << k;
      if (args.row_index.present()) {
        ASSERT_EQ(problem.row_index->at(t, k), k * T + t) << what;
      }
    }
  }
}

// Of the scores, as the contract states it.
int64_t bound_in_ulps(const GatingTopKArgs& args) {
  return args.score == GatingScore::kSigmoid ? 4 : 4 + args.logits.dim(1);
}

// Every ISA gives the same bits; scores are near the reference's, and the rest follows from them.
TEST(OptimisedGatingTopK, MatchesTheReferenceOnRandomProblems) {
  for (uint64_t round = 0; round < 3000; ++round) {
    const uint64_t seed = test::seed_of(round);
    Draw draw{std::mt19937_64(seed)};
    const int64_t T = draw.of<int64_t>({0, 1, 2, 7, 8, 9, 17});
    const int64_t E = draw.one_in(8)   ? draw.of<int64_t>({128, 160, 256, 384, 512})
                      : draw.one_in(2) ? draw.between(1, 70)
                                       : 4 * draw.between(1, 40);
    const float deviation = draw.of({0.0f, 0.1f, 2.0f, 40.0f});
    const Problem problem(draw, T, E, deviation);
    SCOPED_TRACE(test::replay_hint(seed) + ", " + problem.text());
    const Problem::Outputs expected = problem.run_ref();
    const std::vector<Isa> all = isas();
    const Problem::Outputs first = problem.run(ContextOptions{.threads = 1, .isa = all[0]});
    ASSERT_NO_FATAL_FAILURE(expect_consistent(problem, to_string(all[0])));
    for (const Isa isa : all) {
      ASSERT_TRUE(problem.run(ContextOptions{.threads = 1, .isa = isa}) == first) << to_string(isa);
    }
    if (deviation == 0) {
      ASSERT_TRUE(first == expected);
    }
    for (size_t i = 0; i < first.scores.size(); ++i) {
      ASSERT_LE(ulps(first.scores[i], expected.scores[i]), bound_in_ulps(problem.args))
          << first.scores[i] << " for " << expected.scores[i];
    }
    // Without `scores` nothing else changes.
    Problem::Outputs without = first;
    GatingTopKArgs args = problem.args;
    args.scores = {};
    Context ctx({.threads = 2});
    std::fill(without.scores.begin(), without.scores.end(), -7.0f);
    ASSERT_TRUE(problem.run([&](const GatingTopKArgs&) { return gating_top_k(ctx, args); }) ==
                without);
  }
}

// The reference's choice, unless scores differ by no more than the last bits of exp.
TEST(OptimisedGatingTopK, ChoosesAsTheReferenceDoes) {
  int64_t rows = 0;
  int64_t different = 0;
  for (uint64_t round = 0; round < 60; ++round) {
    const uint64_t seed = test::seed_of(round);
    Draw draw{std::mt19937_64(seed)};
    Problem problem(draw, 40, draw.of<int64_t>({8, 32, 128, 256, 512}), 1.0f);
    const int64_t E = problem.logits->columns;
    for (int64_t t = 0; t < 40; ++t) {
      for (int64_t e = 0; e < E; ++e) problem.logits->at(t, e) = draw.normal(1.0f);
    }
    problem.args.logits = *problem.logits;
    problem.args.bias = {};
    problem.args.finished = {};
    problem.args.group_count = problem.args.k_group = 1;
    problem.args.k = std::min<int64_t>(problem.args.k, 10);
    problem.args.weights.shape[1] = problem.args.expert_ids.shape[1] = problem.args.k;
    problem.args.row_index = {};
    problem.run_ref();
    std::vector<int32_t> expected;
    std::vector<float> scores;
    for (int64_t t = 0; t < 40; ++t) {
      for (int64_t k = 0; k < problem.args.k; ++k) {
        expected.push_back(problem.ids->at(t, k));
        scores.push_back(problem.scores->at(t, problem.ids->at(t, k)));
      }
    }
    problem.run(ContextOptions{.threads = 1});
    size_t i = 0;
    for (int64_t t = 0; t < 40; ++t) {
      bool equal = true;
      for (int64_t k = 0; k < problem.args.k; ++k, ++i) {
        const int32_t id = problem.ids->at(t, k);
        equal = equal && id == expected[i];
        ASSERT_LE(ulps(problem.scores->at(t, id), scores[i]), bound_in_ulps(problem.args))
            << test::replay_hint(seed);
      }
      ++rows;
      different += !equal;
    }
  }
  EXPECT_LE(different, rows / 100);
}

TEST(OptimisedGatingTopK, SameBitsForAnyNumberOfWorkers) {
  for (uint64_t round = 0; round < 6; ++round) {
    const uint64_t seed = test::seed_of(round);
    Draw draw{std::mt19937_64(seed)};
    const Problem problem(draw, 2500, draw.of<int64_t>({64, 100, 256}), 2.0f);
    SCOPED_TRACE(test::replay_hint(seed) + ", " + problem.text());
    const Problem::Outputs expected = problem.run(ContextOptions{.threads = 1, .isa = isas()[0]});
    for (const Isa isa : isas()) {
      for (const int threads : {1, 2, 3, 7}) {
        ASSERT_TRUE(problem.run(ContextOptions{.threads = threads, .isa = isa}) == expected)
            << to_string(isa) << " with " << threads << " workers";
      }
    }
    // From inside a caller's parallel region.
    bool nested = false;
#pragma omp parallel num_threads(2)
#pragma omp single
    nested = problem.run(ContextOptions{.threads = 2}) == expected;
    EXPECT_TRUE(nested);
  }
}

// DeepSeek-V3's settings on [T, E] logits.
struct Simple {
  Simple(int64_t T, int64_t E, uint64_t seed) : logits(static_cast<size_t>(T * E)) {
    Draw draw{std::mt19937_64(seed)};
    for (float& x : logits) x = draw.normal(1.0f);
    for (int64_t e = 0; e < E; ++e) bias.push_back(draw.normal(0.1f));
    weights.resize(static_cast<size_t>(T * 8));
    ids.resize(weights.size());
    args.logits = {logits.data(), {T, E}};
    args.bias = {bias.data(), {E}};
    args.k = 8;
    args.score = GatingScore::kSigmoid;
    args.group_count = 8;
    args.k_group = 4;
    args.group_select = GroupSelect::kTop2Sum;
    args.renormalize = true;
    args.routed_scaling_factor = 2.5f;
    args.weights = {weights.data(), {T, 8}};
    args.expert_ids = {ids.data(), {T, 8}};
  }
  Simple(const Simple&) = delete;
  void run(Context& ctx) {
    const Status status = gating_top_k(ctx, args);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  GatingTopKArgs args;
  std::vector<float> logits, bias, weights;
  std::vector<int32_t> ids;
};

TEST(OptimisedGatingTopK, PermutingTokensPermutesTheirResults) {
  const int64_t T = 61, E = 64;
  for (const GatingScore score : {GatingScore::kSoftmax, GatingScore::kSigmoid}) {
    Simple a(T, E, 1), b(T, E, 1);
    a.args.score = b.args.score = score;
    std::vector<int64_t> order(static_cast<size_t>(T));
    for (int64_t t = 0; t < T; ++t) order[static_cast<size_t>(t)] = t;
    std::shuffle(order.begin(), order.end(), std::mt19937_64(2));
    for (int64_t t = 0; t < T; ++t) {
      std::copy_n(a.logits.begin() + order[static_cast<size_t>(t)] * E, E,
                  b.logits.begin() + t * E);
    }
    Context ctx;
    a.run(ctx);
    b.run(ctx);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t k = 0; k < 8; ++k) {
        const auto from = static_cast<size_t>(order[static_cast<size_t>(t)] * 8 + k);
        const auto to = static_cast<size_t>(t * 8 + k);
        ASSERT_EQ(b.ids[to], a.ids[from]);
        ASSERT_PRED2(same, b.weights[to], a.weights[from]);
      }
    }
  }
}

TEST(OptimisedGatingTopK, ANonFiniteLogitIsItsTokensAlone) {
  const int64_t T = 19, E = 64;
  for (const Isa isa : isas()) {
    Context ctx({.isa = isa});
    for (const GatingScore score : {GatingScore::kSoftmax, GatingScore::kSigmoid}) {
      for (const float bad : {kNan, kInf, -kInf}) {
        Simple clean(T, E, 3), poisoned(T, E, 3);
        clean.args.score = poisoned.args.score = score;
        for (int64_t e = 0; e < E; e += 5) poisoned.logits[static_cast<size_t>(6 * E + e)] = bad;
        clean.run(ctx);
        poisoned.run(ctx);
        for (size_t i = 0; i < clean.ids.size(); ++i) {
          if (i / 8 == 6) {
            ASSERT_TRUE(poisoned.ids[i] >= 0 && poisoned.ids[i] < E);
            continue;
          }
          ASSERT_EQ(poisoned.ids[i], clean.ids[i]);
          ASSERT_PRED2(same, poisoned.weights[i], clean.weights[i]);
        }
      }
    }
  }
}

TEST(OptimisedGatingTopK, AllocatesNothingAfterTheFirstCall) {
  for (const GatingScore score : {GatingScore::kSoftmax, GatingScore::kSigmoid}) {
    Simple simple(33, 256, 4);
    simple.args.score = score;
    Context ctx({.threads = 1});  // one worker: mallinfo2 sees this thread's arena
    simple.run(ctx);
    for (int i = 0; i < 50; ++i) {
      std::rotate(simple.logits.begin(), simple.logits.begin() + 17, simple.logits.end());
      const struct mallinfo2 before = mallinfo2();
      const Status status = gating_top_k(ctx, simple.args);
      const struct mallinfo2 after = mallinfo2();
      ASSERT_TRUE(status.ok());
      ASSERT_EQ(after.uordblks, before.uordblks);
      ASSERT_EQ(after.hblkhd, before.hblkhd);
    }
  }
}

class OptimisedGatingTopKErrors : public testing::Test {
 protected:
  OptimisedGatingTopKErrors() {
    args_.logits = {logits_, {2, 6}};
    args_.bias = {bias_, {6}};
    args_.finished = {finished_, {2}};
    args_.scores = {scores_, {2, 6}};
    resize(2);
  }
  void resize(int64_t k) {
    args_.k = k;
    args_.weights = {weights_, {2, k}};
    args_.expert_ids = {ids_, {2, k}};
    args_.row_index = {row_index_, {2, k}};
  }
  // Refused with the reference's words.
  void expect_refused() {
    const Status expected = ref::gating_top_k(args_);
    const Status status = gating_top_k(ctx_, args_);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_STREQ(status.message(), expected.message());
  }
  Context ctx_;
  float logits_[12] = {}, bias_[6] = {}, scores_[12] = {}, weights_[16] = {};
  bool finished_[2] = {};
  int32_t ids_[16] = {}, row_index_[16] = {};
  GatingTopKArgs args_;
};

TEST_F(OptimisedGatingTopKErrors, EveryViewIsChecked) {
  using Args = GatingTopKArgs;
  test::sweep_contract<Args>(args_,
                             {{"logits", &Args::logits},
                              {"bias", &Args::bias, false},
                              {"finished", &Args::finished, false}},
                             {{"weights", &Args::weights},
                              {"expert_ids", &Args::expert_ids},
                              {"scores", &Args::scores, false},
                              {"row_index", &Args::row_index, false}},
                             [&](const Args& args) { return gating_top_k(ctx_, args); });
}

TEST_F(OptimisedGatingTopKErrors, Parameters) {
  struct Bad {
    int64_t k, group_count, k_group;
    GroupSelect select = GroupSelect::kMax;
  };
  for (const Bad& bad :
       {Bad{0, 1, 1}, Bad{-1, 1, 1}, Bad{2, 0, 1}, Bad{2, -1, 1}, Bad{2, 3, 0}, Bad{2, 3, 4},
        Bad{2, 4, 1}, Bad{5, 3, 2}, Bad{7, 1, 1}, Bad{2, 6, 3, GroupSelect::kTop2Sum},
        Bad{INT64_MIN, INT64_MIN, INT64_MIN}, Bad{INT64_MAX, 1, 1}, Bad{1, INT64_MAX, 1}}) {
    resize(bad.k);
    args_.group_count = bad.group_count;
    args_.k_group = bad.k_group;
    args_.group_select = bad.select;
    expect_refused();
  }
}

TEST_F(OptimisedGatingTopKErrors, ValuesThatAreNoEnumerators) {
  std::fill_n(weights_, 16, 55.0f);
  for (const int value : {2, -1}) {
    const std::string text = " = " + std::to_string(value) + " is not one of its 2 choices";
    args_.score = static_cast<GatingScore>(value);
    expect_refused();
    EXPECT_EQ(gating_top_k(ctx_, args_).message(), "gating_top_k: score" + text);
    args_.score = GatingScore::kSoftmax;
    args_.group_select = static_cast<GroupSelect>(value);
    expect_refused();
    EXPECT_EQ(gating_top_k(ctx_, args_).message(), "gating_top_k: group_select" + text);
    args_.group_select = GroupSelect::kMax;
  }
  for (const float weight : weights_) EXPECT_EQ(weight, 55.0f);
  for (const int32_t id : ids_) EXPECT_EQ(id, 0);
}

TEST_F(OptimisedGatingTopKErrors, IndicesFitInI32) {
  // Refused by its sizes alone: nothing is read through the views.
  const int64_t T = int64_t{1} << 30;
  args_ = {};
  args_.k = 2;
  args_.logits = {logits_, {T, 2}};
  args_.weights = {weights_, {T, 2}};
  args_.expert_ids = {ids_, {T, 2}};
  args_.row_index = {row_index_, {T, 2}};
  expect_refused();
  args_ = {};
  args_.k = 1;
  args_.logits = {logits_, {1, int64_t{1} << 31}};
  args_.weights = {weights_, {1, 1}};
  args_.expert_ids = {ids_, {1, 1}};
  expect_refused();
}

TEST_F(OptimisedGatingTopKErrors, OfTheContext) {
  Context broken({.threads = -1});
  EXPECT_EQ(gating_top_k(broken, args_).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace moeops
